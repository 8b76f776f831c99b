"""`multiprocessing`'s processes of an adopted test become ranks: where, and which.

Enters: `Process.start()`. Leaves: a `RankPopen`, or the process that the test would have started
without us. Only functions of the suite itself are adopted: workers of a DataLoader, a pool or a
manager are none. A function that a new interpreter could not import stays with the test.
"""

from __future__ import annotations

import multiprocessing
import os
import site
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable
from multiprocessing import context
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from pytest_dcp._harness.adoption.process_set import call_of
from pytest_dcp._harness.adoption.replacements import Replacements
from pytest_dcp._harness.adoption.running_test import RunningTest

CurrentTest = Callable[[], RunningTest | None]
"""The adopted test that runs now in this process; None for none."""
POINT = (context.SpawnProcess, "_Popen")
"""The first function that `install` replaces."""
KINDS = ("SpawnProcess", "ForkProcess", "ForkServerProcess")
INSTALLED = tuple(
    {*site.getsitepackages(), *(sysconfig.get_path(name) for name in ("purelib", "platlib"))}
)
SPAWN_WRAPPER = ("torch.multiprocessing.spawn", "_wrap")
"""The target of `mp.spawn`'s processes, whose first argument is the function of the suite."""


class NotAdoptedWarning(pytest.PytestWarning):
    """A process of an adopted test runs as its author wrote it."""


def install(replacements: Replacements, current: CurrentTest) -> None:
    """Have processes of the adopted test start as ranks."""
    for kind in KINDS:
        owner = getattr(context, kind)
        original: Any = vars(owner)["_Popen"].__func__
        replacements.replace(owner, "_Popen", staticmethod(_hook(original, current, kind)))
    reads: Any = vars(BaseProcess)["exitcode"].fget

    def exitcode(process: Any) -> int | None:
        code: int | None = reads(process)
        if code:
            process._popen.is_judged = True
        return code

    replacements.replace(BaseProcess, "exitcode", property(exitcode))


def _hook(original: Callable[[Any], Any], current: CurrentTest, kind: str) -> Callable[[Any], Any]:
    def start(process: Any) -> Any:
        test = current()
        if test is None or threading.current_thread() is not threading.main_thread():
            return original(process)
        target = target_of(process)
        daemon = bool(process.daemon)
        if test.gathering is not None and not test.gathering.is_full:
            return test.gathering.add(call_for(test, target, process.name), daemon=daemon)
        function = function_of(process)
        if function is None or not is_of_suite(function, test.item):
            return original(process)
        # A spawned process must be picklable anyway; a forked one may run anything.
        if kind == "ForkProcess" and not is_importable(function):
            _warn(test, function, "it is no function at the top level of a module")
            test.own_processes.append(process)
            return original(process)
        try:
            call = call_for(test, target, process.name)
        except Exception as error:
            if kind == "SpawnProcess":
                raise  # it fails without us, too
            _warn(test, function, f"its arguments cannot be sent: {error}")
            test.own_processes.append(process)
            return original(process)
        return test.start_alone(call, daemon=daemon)

    return start


def call_for(test: RunningTest, target: Any, name: str) -> Any:
    """The process as a rank gets it."""
    if test.gathering is not None:
        return test.gathering.call_of(target, name)
    return call_of(target, name, port=test.port)


def target_of(process: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The function that a process runs, with its arguments; for a class of its own its `run`."""
    if type(process).run is not BaseProcess.run:
        return type(process).run, (process,), {}
    return process._target, process._args, process._kwargs


def function_of(process: Any) -> Callable[..., Any] | None:
    """The function of the suite that a process runs; None for none."""
    if type(process).run is not BaseProcess.run:
        return type(process).run  # type: ignore[no-any-return]  # of a class of the suite
    target: Callable[..., Any] | None = process._target
    if (getattr(target, "__module__", ""), getattr(target, "__name__", "")) == SPAWN_WRAPPER:
        return process._args[0]  # type: ignore[no-any-return]  # as `mp.spawn` makes it
    return target


def is_of_suite(function: Callable[..., Any], item: pytest.Item) -> bool:
    """Whether a function belongs to the tests: neither to Python nor to an installed package.

    A test inside an installed package has the functions of that package.
    """
    name = str(getattr(function, "__module__", ""))
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return False
    own: Any = getattr(item, "module", None)
    if own is not None and own.__name__.partition(".")[0] == top and top != "torch":
        return True
    if name.startswith("torch.testing."):
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and not file.startswith(INSTALLED)


def is_importable(function: Callable[..., Any]) -> bool:
    """Whether another process finds the function by its module and name."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type):
        function = owner
    found: Any = sys.modules.get(str(getattr(function, "__module__", "")))
    for part in str(getattr(function, "__qualname__", "<")).split("."):
        found = getattr(found, part, None)
    return found is function


def _warn(test: RunningTest, function: Callable[..., Any], why: str) -> None:
    name = getattr(function, "__qualname__", repr(function))
    warnings.warn(
        NotAdoptedWarning(
            f"{test.item.nodeid}: the process of {name} runs as it is written, not as a rank: {why}"
        ),
        stacklevel=4,
    )


def spawn_hook(original: Callable[..., Any], current: CurrentTest) -> Callable[..., Any]:
    """`start_processes` of torch, whose processes are the ranks of one world."""

    def start_processes(
        fn: Any, args: Any = (), nprocs: int = 1, *rest: Any, **keywords: Any
    ) -> Any:
        __tracebackhide__ = True
        test = current()
        method = keywords.get("start_method", rest[2] if len(rest) > 2 else "spawn")
        is_sent = method != "fork" or is_importable(fn)
        is_ours = test is not None and is_sent and is_of_suite(fn, test.item)
        if test is None or not is_ours or nprocs < 1:
            return original(fn, args, nprocs, *rest, **keywords)
        join = keywords.pop("join", rest[0] if rest else True)
        with test.gather(nprocs):
            spawned = original(fn, args, nprocs, False, *rest[1:], **keywords)
        while join and not spawned.join():
            pass
        return None if join else spawned

    return start_processes


def join_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """`ProcessContext.join`, which raises the first cause, and remembers all ranks' failures."""

    def join(spawned: Any, timeout: float | None = None, *rest: Any, **keywords: Any) -> Any:
        __tracebackhide__ = True
        sets = {getattr(process._popen, "processes", None) for process in spawned.processes}
        (processes,) = sets if len(sets) == 1 else (None,)
        if processes is None or not spawned.sentinels:
            return original(spawned, timeout, *rest, **keywords)
        test = processes.test
        test.drive(lambda: processes.outcome is not None, timeout)
        outcome = processes.outcome
        if outcome is None:
            return False
        if outcome.kind == "passed":
            spawned.sentinels.clear()
            return True
        if outcome.first is None:
            processes.is_judged = True
            raise test.failures.error_for(outcome)
        cause = outcome.first.failure.rank
        spawned.sentinels = {spawned.processes[cause].sentinel: cause}
        try:
            original(spawned, timeout, *rest, **keywords)
        except Exception as error:
            processes.is_judged = True
            test.failures.remember(error, outcome)
            raise
        processes.is_judged = True  # its exit code was 0, and yet it has failed
        raise test.failures.error_for(outcome)

    return join


def end_sharing() -> None:
    """End the thread that serves descriptors, if a process was sent any."""
    sharer = sys.modules.get("multiprocessing.resource_sharer")
    if sharer is not None and multiprocessing.current_process().pid == os.getpid():
        sharer.stop(timeout=1)
