"""Events of calls for `dcp_logger`: the names of `torch.distributed.checkpoint.logger`.

The logger is torch's own object, so handlers registered for it hear our saves and loads.
"""

from typing import TYPE_CHECKING

from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._engine.verbs.call_events import log_calls

__all__: list[str] = []

_dcp_method_logger = log_calls
"""Torch's name for it."""

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
