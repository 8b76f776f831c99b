"""Faults as values, a storage that fails on command, the folders that a crash could leave, and
checkpoints made to harm their reader.

A name is imported when it is first used: the plugin takes the fixture and the options of this
package into every session, and torch must not come with them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pytest_dcp.errors import FaultError, RecordingError, StoreResponseError

if TYPE_CHECKING:
    from pytest_dcp.faults.crashes.crash_state import CrashState, Recording, recorded
    from pytest_dcp.faults.damage import Damaged
    from pytest_dcp.faults.hostile.folders import Hostile, hostile_folders
    from pytest_dcp.faults.hostile.fuzzing import fuzzed_metadata
    from pytest_dcp.faults.hostile.pickles import malicious_pickles, memory_bombs
    from pytest_dcp.faults.injection.injection import HOOKS, Injection
    from pytest_dcp.faults.injection.torch_test_storages import (
        FaultyStorageReader,
        FaultyStorageWriter,
    )
    from pytest_dcp.faults.kinds.at_rest import (
        BitFlip,
        Damage,
        Foreign,
        Missing,
        StaleFile,
        Swap,
        Truncate,
        ZeroSector,
    )
    from pytest_dcp.faults.kinds.base import (
        Exit,
        Fault,
        Hang,
        Kill,
        LostReply,
        Moment,
        Raise,
        Slow,
        Stop,
        Unpicklable,
        UnpicklableError,
        Unrebuildable,
        UnrebuildableError,
        WrongShape,
        WrongType,
    )
    from pytest_dcp.faults.kinds.operations import (
        Denied,
        Errno,
        InputOutput,
        Interrupted,
        LyingSync,
        NoSpace,
        PartialListing,
        PreconditionFailed,
        Quota,
        ReadOnly,
        ShortRead,
        ShortWrite,
        Stale,
        StaleListing,
        StorageFault,
        SyncFailsOnce,
        TornRename,
        TornWrite,
        Unavailable,
    )
    from pytest_dcp.faults.storage import FaultyStorage, Injected
    from pytest_dcp.faults.tap.operation import OPERATION_KINDS, Operation

__all__ = [
    "FaultyStorage",
    "Recording",
    "CrashState",
    "recorded",
    "Injected",
    "Injection",
    "HOOKS",
    "OPERATION_KINDS",
    "Operation",
    "Moment",
    "Fault",
    "Raise",
    "Unpicklable",
    "Unrebuildable",
    "LostReply",
    "Hang",
    "Slow",
    "WrongType",
    "WrongShape",
    "Kill",
    "Stop",
    "Exit",
    "StorageFault",
    "Errno",
    "NoSpace",
    "Quota",
    "ReadOnly",
    "Denied",
    "Stale",
    "Interrupted",
    "InputOutput",
    "SyncFailsOnce",
    "LyingSync",
    "ShortRead",
    "ShortWrite",
    "TornWrite",
    "TornRename",
    "PartialListing",
    "StaleListing",
    "Unavailable",
    "PreconditionFailed",
    "Damage",
    "BitFlip",
    "ZeroSector",
    "Truncate",
    "Missing",
    "Foreign",
    "Swap",
    "StaleFile",
    "Hostile",
    "hostile_folders",
    "malicious_pickles",
    "memory_bombs",
    "fuzzed_metadata",
    "Damaged",
    "FaultError",
    "RecordingError",
    "StoreResponseError",
    "UnpicklableError",
    "UnrebuildableError",
    "FaultyStorageReader",
    "FaultyStorageWriter",
]

_MODULES = {
    "crashes.crash_state": "CrashState Recording recorded",
    "damage": "Damaged",
    "hostile.folders": "Hostile hostile_folders",
    "hostile.fuzzing": "fuzzed_metadata",
    "hostile.pickles": "malicious_pickles memory_bombs",
    "injection.injection": "HOOKS Injection",
    "injection.torch_test_storages": "FaultyStorageReader FaultyStorageWriter",
    "kinds.at_rest": "BitFlip Damage Foreign Missing StaleFile Swap Truncate ZeroSector",
    "kinds.base": (
        "Exit Fault Hang Kill LostReply Moment Raise Slow Stop Unpicklable "
        "UnpicklableError Unrebuildable UnrebuildableError WrongShape WrongType"
    ),
    "kinds.operations": (
        "Denied Errno InputOutput Interrupted LyingSync NoSpace PartialListing "
        "PreconditionFailed Quota ReadOnly ShortRead ShortWrite Stale StaleListing "
        "StorageFault SyncFailsOnce TornRename TornWrite Unavailable"
    ),
    "storage": "FaultyStorage Injected",
    "tap.operation": "OPERATION_KINDS Operation",
}
"""Module of this package -> the names that it has."""
_LAZY = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
