"""The planners that `save` and `load` use by default.

Names, arguments and hooks are as in `torch.distributed.checkpoint.default_planner`; subclasses
written for torch's planners work with these. Plans are columns (`plan.columns`) that look like
torch's lists of items; a subclass that overrides one of the planning hooks gets plain lists, which
it may change freely.
"""

from typing import TYPE_CHECKING

# torch's name for it, which other libraries import.
from pytest_dcp._engine.planners.empty_state_dict import (
    _EmptyStateDictLoadPlanner as _EmptyStateDictLoadPlanner,
)
from pytest_dcp._engine.planners.load_planner import DefaultLoadPlanner
from pytest_dcp._engine.planners.local_load_plan import (
    create_default_global_load_plan,
    create_default_local_load_plan,
)
from pytest_dcp._engine.planners.save_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
    create_default_local_save_plan,
)
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "DefaultSavePlanner",
    "DefaultLoadPlanner",
    "create_default_local_load_plan",
    "create_default_global_load_plan",
    "create_default_local_save_plan",
    "create_default_global_save_plan",
]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
