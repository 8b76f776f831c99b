"""torch's `MultiProcessTestCase` and its like: every rank of a test counts.

torch compares the exit code of rank 0 alone. Here a test passes only if every rank does, unless its
class says what it expects (`special_return_code_checks`, `skip_return_code_checks`, or a
`_check_return_codes` of its own).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pytest_dcp._harness.adoption.process_hooks import CurrentTest
from pytest_dcp._harness.adoption.process_set import ProcessSet
from pytest_dcp._harness.adoption.rank_pipe import ParentEnd, RankPipe
from pytest_dcp._harness.world.outcome import Outcome, combine
from pytest_dcp._torch_internals import foreign_tests
from pytest_dcp.errors import RankFailure


def start_hook(original: Callable[..., Any], current: CurrentTest) -> Callable[..., Any]:
    """`_start_processes`: the ranks of one world, with pipes that need no descriptor."""

    def start_processes(case: Any, proc: Any) -> None:
        test = current()
        if test is None:
            original(case, proc)
            return
        module: Any = sys.modules["torch.multiprocessing"]
        pipe = module.Pipe
        with test.gather(int(case.world_size)) as processes:
            processes.skips = foreign_tests.skip_reasons()
            processes.error_code = foreign_tests.ERROR_CODE
            module.Pipe = lambda duplex=True: (ParentEnd(), RankPipe())
            try:
                original(case, proc)
            finally:
                module.Pipe = pipe
        case.dcp_processes = processes

    return start_processes


def join_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """`_join_processes`: wait for all ranks, and raise the first cause with all of them."""

    def join_processes(case: Any, function: Callable[..., Any]) -> None:
        __tracebackhide__ = True
        processes: ProcessSet | None = vars(case).get("dcp_processes")
        if processes is None or processes.popens != [one._popen for one in case.processes]:
            original(case, function)
            return
        processes.is_judged = True
        expected = foreign_tests.expected_exit_code(case, function)
        judges_itself = foreign_tests.checks_own_exit_codes(case)
        if judges_itself or expected != 0:
            processes.world.await_survivors()
        began_s = time.time()
        processes.restart_clock()
        processes.test.drive(lambda: processes.outcome is not None)
        outcome = processes.outcome
        if outcome is None:
            return
        if outcome.kind != "skipped" and judges_itself:
            try:
                foreign_tests.check_exit_codes(case, function, time.time() - began_s)
            except Exception as judged:
                processes.test.failures.remember(judged, outcome)
                raise
            return
        excused = excuse(outcome, processes, expected)
        if excused.kind != "passed":
            raise processes.test.failures.error_for(excused)

    return join_processes


def excuse(outcome: Outcome, processes: ProcessSet, expected: int | None) -> Outcome:
    """The outcome without the ends that the test expects.

    expected: of rank 0, whose peers may end in the same way or pass; None: any exit code will do.
    """
    if expected == 0 or outcome.kind == "skipped":
        return outcome
    codes = {popen.rank: popen.returncode for popen in processes.popens}
    failed = {
        failure.rank: replace(failure, kind="failed")
        for failure in outcome.failures
        if not _is_expected(failure.kind, codes[failure.rank], expected)
    }
    if expected is not None and codes[0] != expected and 0 not in failed:
        text = f"ended with exit code {codes[0]}, and the test expects {expected}"
        return combine(0, {}, [_failure(outcome, 0, text)])
    if len(failed) == len({failure.rank for failure in outcome.failures}):
        return outcome
    unexpected = [failure for failure in outcome.failures if failure.rank in failed]
    return combine(0, {}, unexpected)


def _is_expected(kind: str, code: int | None, expected: int | None) -> bool:
    if kind in ("timeout", "blocked") or code == foreign_tests.ERROR_CODE:
        return False
    return expected is None or code == expected


def _failure(outcome: Outcome, rank: int, text: str) -> RankFailure:
    at_s = max((one.at_s for one in outcome.results.values()), default=0.0)
    return RankFailure(rank, "crashed", "call", at_s, text)
