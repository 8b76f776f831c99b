"""A rank's failure, with the traceback or the stacks that the rank wrote. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pytest_dcp._harness.protocol.messages import Done
from pytest_dcp._harness.world import stacks
from pytest_dcp.errors import RankFailure

NO_STACK = "and wrote no stack: stopped, or deep in C code"


def explain_failure(
    failure: RankFailure,
    result: Done | None,
    read_trace: Callable[[], str],
    *,
    limit_s: float,
    root: str,
) -> RankFailure:
    """The failure with its details: `result` is the rank's own, `read_trace` returns its stacks.

    For a rank that was killed at the time limit of `limit_s`, the text says where its stacks show
    it; files are named from the folder `root`.
    """
    if failure.kind == "failed" and result is not None:
        return replace(failure, detail=str((result.report or {}).get("text", "")))
    if failure.detail:  # the rank had said it
        return failure
    trace = read_trace()
    if failure.kind in ("timeout", "blocked"):
        limit = f" at the time limit of {limit_s:g} s" if failure.kind == "timeout" else ""
        where = stacks.describe_activity(trace, root) if trace else NO_STACK
        summary = f"{failure.summary}{limit}, {where}"
        return replace(failure, summary=summary, detail=stacks.trim_runner(trace))
    return replace(failure, detail=stacks.trim_runner(trace))
