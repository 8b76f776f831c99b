"""torch's own test classes that start a process for each rank, and `mp.spawn`.

Unmodified suites inherit from the classes (`pytest --dcp-adopt`). None of the names can go before
torch has a public way to start the processes of its test classes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessContext
from torch.testing._internal import common_distributed

from pytest_dcp._torch_internals.supported_versions import TORCH

TORCH.require_attributes(
    common_distributed, "MultiProcessTestCase", "MultiProcContinuousTest", "TEST_SKIPS"
)
MultiProcessTestCase: Any = common_distributed.MultiProcessTestCase
MultiProcContinuousTest: Any = common_distributed.MultiProcContinuousTest
TORCH.require_attributes(
    MultiProcessTestCase,
    "_start_processes",
    "_join_processes",
    "_check_return_codes",
    "TEST_ERROR_EXIT_CODE",
)
TORCH.require_attributes(
    MultiProcContinuousTest, "_spawn_processes", "_worker_loop", "_init_pg", "_run_test_given_id"
)

Point = tuple[Any, str]
"""The owner of a function, and its name there."""
START_CASE: Point = (MultiProcessTestCase, "_start_processes")
JOIN_CASE: Point = (MultiProcessTestCase, "_join_processes")
START_CONTINUOUS: Point = (MultiProcContinuousTest, "_spawn_processes")
SPAWN: Point = (sys.modules["torch.multiprocessing.spawn"], "start_processes")
SPAWN_TOO: Point = (torch.multiprocessing, "start_processes")
JOIN_SPAWNED: Point = (ProcessContext, "join")
ERROR_CODE: int = MultiProcessTestCase.TEST_ERROR_EXIT_CODE
"""The exit code of a rank that has caught an exception of its test."""


def skip_reasons() -> dict[int, str]:
    """The exit codes by which a rank says that it skips, with the reasons."""
    return {one.exit_code: one.message for one in common_distributed.TEST_SKIPS.values()}


def checks_own_exit_codes(case: object) -> bool:
    """Whether a test's class judges the exit codes of its ranks itself."""
    own: object = type(case)._check_return_codes  # type: ignore[attr-defined]  # of `MultiProcessTestCase`
    return own is not MultiProcessTestCase._check_return_codes


def check_exit_codes(case: Any, function: Callable[..., Any], elapsed_s: float) -> None:
    """Let a test's class judge the exit codes of its ranks."""
    case._check_return_codes(function, elapsed_s)


def has_own_loop(cls: type) -> bool:
    """Whether a continuous test's class replaces the loop in which its ranks run tests."""
    own: Any = cls._worker_loop  # type: ignore[attr-defined]  # of `MultiProcContinuousTest`
    return own.__func__ is not MultiProcContinuousTest._worker_loop.__func__


def join_continuous_group(cls: Any, rank: int, size: int, file: str) -> None:
    """In a rank: join the group, as the loop of a continuous test's class does before its tests."""
    cls.rank, cls.world_size = rank, size
    cls._init_pg(rank, size, file)


def run_continuous_test(cls: Any, test_id: str) -> None:
    """In a rank: one test of a continuous test's class."""
    cls._run_test_given_id(test_id)


def leave_continuous_group(cls: Any) -> None:
    """In a rank: leave the group, as the loop does after the last test."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def expected_exit_code(case: Any, function: Callable[..., Any]) -> int | None:
    """The exit code that a test of `MultiProcessTestCase` expects of rank 0; None for any code."""
    if function in getattr(case, "skip_return_code_checks", ()):
        return None
    special: Mapping[Any, int] = getattr(case, "special_return_code_checks", None) or {}
    return int(special.get(function, 0))
