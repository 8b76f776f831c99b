"""A world of threads: one process calls the test once for each rank, at the same time.

Fixtures are set up once, in the main thread. Each thread then calls the test with its own `rank`,
`local_rank` and `device_mesh`, as a rank of torch's threaded process group, which exists only
during the call. When a rank fails, the ranks that wait in a collective of the group are ended; one
that waits elsewhere, in a save for example, is given `GRACE_S` and left behind: the process ends
next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from pytest_dcp._harness.protocol.launcher import RankLaunch
from pytest_dcp._torch_internals.threaded_groups import (
    end_collectives,
    groups_of_threads,
    join_threads_group,
)
from pytest_dcp.errors import WorldError
from pytest_dcp.rank_names import ranks_text

GRACE_S = 2.0
"""For the other ranks to end by themselves, after one has failed."""
LOOK_S = 0.02


@dataclass(slots=True)
class ThreadRank:
    """How one rank's call ends."""

    rank: int
    thread: threading.Thread | None = None
    error: BaseException | None = None
    at_s: float = 0.0


def call_in_threads(
    order: RankLaunch, function: Callable[..., Any], arguments: Mapping[str, Any]
) -> None:
    """Call the test as every rank. Raises the first failure, with the others as notes.

    Raises WorldError if only some ranks skip.
    """
    __tracebackhide__ = True
    ranks = [ThreadRank(rank) for rank in range(order.threads)]
    # After a fork the first operator renews torch's thread pool, which two threads must not do at
    # the same time.
    torch.set_num_threads(torch.get_num_threads())
    with groups_of_threads() as store:
        for one in ranks:
            one.thread = threading.Thread(
                target=_run_rank,
                args=(one, store, order, function, arguments),
                name=f"rank {one.rank}",
                daemon=True,
            )
            one.thread.start()
        _wait_for(ranks)
    _raise_for(ranks)


def _run_rank(
    one: ThreadRank,
    store: Any,
    order: RankLaunch,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
) -> None:
    try:
        join_threads_group(store, one.rank, order.threads)
        own = dict(arguments)
        own.update({name: one.rank for name in ("rank", "local_rank") if name in own})
        if "device_mesh" in own:
            names = order.mesh_dim_names
            own["device_mesh"] = init_device_mesh("cpu", order.mesh, mesh_dim_names=names)
        function(**own)
        dist.barrier()
    except BaseException as error:  # noqa: BLE001 - raised by the main thread
        one.error, one.at_s = error, time.monotonic()
        end_collectives(error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _wait_for(ranks: list[ThreadRank]) -> None:
    """Return once all threads have ended, or `GRACE_S` after one has failed."""
    until_s = float("inf")
    while any(one.thread is not None and one.thread.is_alive() for one in ranks):
        if until_s == float("inf") and any(one.error is not None for one in ranks):
            until_s = time.monotonic() + GRACE_S
        if time.monotonic() > until_s:
            return
        for one in ranks:
            if one.thread is not None and one.thread.is_alive():
                one.thread.join(LOOK_S)
                break


def _raise_for(ranks: list[ThreadRank]) -> None:
    __tracebackhide__ = True
    finished = [one for one in ranks if one.error is not None]
    # SystemExit is how torch ends ranks that wait for one that has failed.
    causes = [one for one in finished if not isinstance(one.error, SystemExit)] or finished
    if not causes:
        return
    skips = [one for one in causes if isinstance(one.error, pytest.skip.Exception)]
    failures = sorted((one for one in causes if one not in skips), key=lambda one: one.at_s)
    if skips and not failures and len(skips) < len(ranks):
        raise WorldError(
            f"{ranks_text([one.rank for one in skips])} skipped, and the others did not: a test is "
            "skipped only when every rank skips"
        )
    first, *rest = failures or skips
    if first.error is None:
        return
    first.error.add_note(f"in the thread of rank {first.rank} of {len(ranks)}")
    for one in rest if failures else ():
        first.error.add_note(
            f"rank {one.rank} also failed: {type(one.error).__name__}: {one.error}"
        )
    waiting = [one.rank for one in ranks if one.thread is not None and one.thread.is_alive()]
    if waiting:
        first.error.add_note(f"{ranks_text(waiting)} still waited {GRACE_S:g} s later")
    raise first.error
