"""A process of an unmodified test: how its exit is judged, and where it begins."""

from __future__ import annotations

import os
import sys
import unittest
from collections.abc import Callable

import pytest

from pytest_dcp._harness.protocol.process_call import ProcessCall
from pytest_dcp._harness.rank import foreign_process
from pytest_dcp._harness.rank.foreign_process import ForeignProcess, replace_environment

SKIPS = {77: "Need at least 2 CUDA devices", 86: "see the log"}
CAUGHT = 10
"""The exit code after an exception that the process has caught."""


def run(monkeypatch: pytest.MonkeyPatch, target: Callable[[], None]) -> tuple[int, str]:
    """The exit code of a process that runs the target, and its error."""
    monkeypatch.setattr(foreign_process, "enter_surroundings", lambda call, order: None)
    monkeypatch.setattr(foreign_process.pickle, "loads", lambda data: data)
    call = ProcessCall((target, (), {}), "process", {}, "/", SKIPS, CAUGHT)  # type: ignore[arg-type]  # not pickled
    process = ForeignProcess(call, None)  # type: ignore[arg-type]  # not pickled, no order
    monkeypatch.setattr(ProcessCall, "load", staticmethod(lambda data: data))
    try:
        process.run()
    except BaseException as error:  # noqa: BLE001 - the subject of these tests
        return process.exit_code, f"{type(error).__name__}: {error}"
    return process.exit_code, ""


def fail() -> None:
    raise ValueError("of the test")


def catch_and_exit(code: int, error: Exception) -> None:
    try:
        raise error  # noqa: TRY301 - caught as torch's runner does
    except Exception:  # noqa: BLE001
        sys.exit(code)


@pytest.mark.parametrize(
    ("target", "code", "error"),
    [
        (lambda: None, 0, ""),
        (lambda: sys.exit(), 0, ""),
        (lambda: sys.exit(0), 0, ""),
        (fail, 1, "ValueError: of the test"),
        (lambda: sys.exit(3), 3, "ProcessExitError: the process ended itself by sys.exit(3)"),
        (lambda: sys.exit(-1), 255, "ProcessExitError: the process ended itself by sys.exit(-1)"),
        (lambda: sys.exit("no"), 1, "ProcessExitError: the process ended itself by sys.exit('no')"),
        (lambda: sys.exit(77), 77, "SkipTest: Need at least 2 CUDA devices"),
        (lambda: catch_and_exit(CAUGHT, ValueError("a")), CAUGHT, "ValueError: a"),
        (lambda: catch_and_exit(1, ValueError("b")), 1, "ValueError: b"),
        (lambda: catch_and_exit(86, unittest.SkipTest("why")), 86, "SkipTest: why"),
        (
            lambda: catch_and_exit(5, ValueError("c")),
            5,
            "ProcessExitError: the process ended itself by sys.exit(5)",
        ),
    ],
)
def test_an_exit_is_success_a_skip_or_the_error_behind_it(
    monkeypatch: pytest.MonkeyPatch, target: Callable[[], None], code: int, error: str
) -> None:
    assert run(monkeypatch, target) == (code, error)


def test_the_environment_is_that_of_the_starting_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": "1", "HOME": "/old"})
    replace_environment({"HOME": "/new", "NEW": "1"})
    assert os.environ == {"HOME": "/new", "NEW": "1", "GLOO_SOCKET_IFNAME": "lo"}
