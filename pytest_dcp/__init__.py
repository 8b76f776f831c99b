"""Fresh multi-process PyTorch worlds for pytest.

PYTEST_DONT_REWRITE: this module is only the plugin's name, for `pytest -p pytest_dcp` and for the
entry point; it hands pytest to `pytest_dcp.plugin` and imports nothing heavy. Modules that need
torch are imported at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointFileMissingError,
    CheckpointMismatchError,
    CheckpointReplacedError,
    DcpError,
    DivergedError,
    FaultError,
    LateMarkerError,
    LawError,
    LostRank,
    NotACheckpointError,
    PlanError,
    ProcessExitError,
    RankFailure,
    RecordingError,
    ReplicaMismatchError,
    SaveAbandonedError,
    SaverProcessError,
    StoreResponseError,
    UnknownNameError,
    UnsupportedVersionError,
    UntrustedPickleError,
    WorldError,
)

if TYPE_CHECKING:
    from pytest_dcp._engine.simulation.simulate import simulate
    from pytest_dcp._engine.simulation.simulation import Simulation
    from pytest_dcp._harness.adoption.process_hooks import NotAdoptedWarning
    from pytest_dcp._harness.controller.exit_warnings import LeftBehindWarning
    from pytest_dcp._harness.controller.rank_warnings import ChangedStateWarning
    from pytest_dcp._harness.controller.world_test_mixin import WorldTestMixin
    from pytest_dcp._harness.controller.worlds_fixture import FunctionWorld, Running, Worlds
    from pytest_dcp._harness.rank.carried_state import LostStateWarning
    from pytest_dcp._harness.rank.world_fixture import RankWorld as World
    from pytest_dcp.api import announce_death
    from pytest_dcp.faults.storage import FaultyStorage

__all__ = [
    "World",
    "Worlds",
    "FunctionWorld",
    "Running",
    "FaultyStorage",
    "WorldTestMixin",
    "announce_death",
    "simulate",
    "Simulation",
    "ChangedStateWarning",
    "LeftBehindWarning",
    "LostStateWarning",
    "NotAdoptedWarning",
    "DcpError",
    "WorldError",
    "RankFailure",
    "LostRank",
    "DivergedError",
    "ProcessExitError",
    "LateMarkerError",
    "LawError",
    "FaultError",
    "RecordingError",
    "StoreResponseError",
    "UnsupportedVersionError",
    "CheckpointError",
    "CheckpointCorruptError",
    "CheckpointExistsError",
    "CheckpointFileMissingError",
    "CheckpointMismatchError",
    "CheckpointReplacedError",
    "NotACheckpointError",
    "UnknownNameError",
    "PlanError",
    "ReplicaMismatchError",
    "SaveAbandonedError",
    "SaverProcessError",
    "UntrustedPickleError",
    "pytest_plugins",
]

pytest_plugins = ["pytest_dcp.plugin"]

_LAZY = {
    "World": "pytest_dcp._harness.rank.world_fixture:RankWorld",
    "Worlds": "pytest_dcp._harness.controller.worlds_fixture:Worlds",
    "FunctionWorld": "pytest_dcp._harness.controller.worlds_fixture:FunctionWorld",
    "Running": "pytest_dcp._harness.controller.worlds_fixture:Running",
    "WorldTestMixin": "pytest_dcp._harness.controller.world_test_mixin:WorldTestMixin",
    "FaultyStorage": "pytest_dcp.faults.storage:FaultyStorage",
    "announce_death": "pytest_dcp.api:announce_death",
    "simulate": "pytest_dcp._engine.simulation.simulate:simulate",
    "Simulation": "pytest_dcp._engine.simulation.simulation:Simulation",
    "ChangedStateWarning": "pytest_dcp._harness.controller.rank_warnings:ChangedStateWarning",
    "LostStateWarning": "pytest_dcp._harness.rank.carried_state:LostStateWarning",
    "LeftBehindWarning": "pytest_dcp._harness.controller.exit_warnings:LeftBehindWarning",
    "NotAdoptedWarning": "pytest_dcp._harness.adoption.process_hooks:NotAdoptedWarning",
}
"""Name -> module and name there."""


# There is no __dir__: pytest gets each name that dir() of a plugin gives, which would import torch.
def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, _, there = _LAZY[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(module), there)
    return value
