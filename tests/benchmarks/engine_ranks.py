"""Worlds of forked ranks for the engine's benchmark, and how a step is timed in them.

`run_world` forks the ranks from this process, which has torch imported and one thread; each joins
a gloo group over a file store, runs the job and exits; rank 0's answer comes back as JSON. A rank
that fails ends the world: the others are killed, and `WorldFailed` is raised.
"""

import gc
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DEADLINE_S = 1_800
"""For a whole case: torch plans for 1,024 ranks for minutes in each round."""


class WorldFailed(Exception):
    """A rank did not end as it should, so there is nothing to report."""


@dataclass(frozen=True, slots=True)
class World:
    """A rank's view of its world."""

    rank: int
    size: int
    mesh: DeviceMesh | None
    """None where the rank is alone and has no group."""

    def barrier(self) -> None:
        """Return when every rank has come here. Collective."""
        if self.mesh is not None:
            dist.barrier()

    def most(self, value: float) -> float:
        """The largest of the ranks' values. Collective."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def total(self, value: float) -> float:
        """The sum of the ranks' values. Collective."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def _reduced(self, value: float, how: Any) -> float:
        if self.mesh is None:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, how)
        return float(tensor.item())

    def timed(self, step: Callable[[], object]) -> float:
        """How long the slowest rank took for the step, in ms. Collective.

        All start after a barrier, and go on after the last has ended.
        """
        gc.collect()
        self.barrier()
        started_s = time.perf_counter()
        step()
        return self.most((time.perf_counter() - started_s) * 1e3)


Job = Callable[[World], Any]


def run_world(job: Job, size: int) -> Any:
    """Run `job` in a world; returns its result on rank 0, by way of JSON.

    One rank has no process group.

    Raises WorldFailed when a rank failed (its traceback is on stderr) or passed the deadline.
    """
    with tempfile.TemporaryDirectory(prefix="bench-world-") as name:
        folder = Path(name)
        alive: set[int] = set()
        signal.signal(signal.SIGALRM, _too_late)
        signal.alarm(DEADLINE_S)
        try:
            alive.update(_fork(job, rank, size, folder) for rank in range(size))
            while alive:
                pid, status = os.wait()
                alive.discard(pid)
                if status:
                    code = os.waitstatus_to_exitcode(status)
                    raise WorldFailed(f"a rank exited with {code}, expected 0")
        finally:
            signal.alarm(0)
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return json.loads((folder / "answer.json").read_text())


def _too_late(_number: int, _frame: FrameType | None) -> NoReturn:
    raise WorldFailed(f"the ranks did not end within {DEADLINE_S} s")


def _fork(job: Job, rank: int, size: int, folder: Path) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        answer = job(_join(rank, size, folder))
        if rank == 0:
            (folder / "answer.json").write_text(json.dumps(answer))
        if size > 1:
            dist.barrier()  # no rank hangs up while another still waits for it
    except BaseException:  # noqa: BLE001 # a forked rank must never return into its parent's code
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _join(rank: int, size: int, folder: Path) -> World:
    torch.set_num_threads(1)
    # Overwriting and saves of one rank are intended here, but each engine warns about them.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # As torchrun sets them.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size)
    )
    if size == 1:
        return World(rank, size, None)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(  # type: ignore[attr-defined] # torch re-exports it without __all__
        str(folder / "store"), size
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return World(rank, size, init_device_mesh("cpu", (size,)))


def alternate(
    world: World,
    methods: dict[str, Callable[[], object]],
    rounds: int,
    after: Callable[[str], None] = lambda _: None,
    at_most: dict[str, int] | None = None,
) -> dict[str, list[float]]:
    """The ms of every method in every round; each round runs each once, in order. Collective.

    after: called with the method's name, outside of the timing. at_most: rounds of slow methods.
    """
    found: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds):
        for name, step in methods.items():
            if number < (at_most or {}).get(name, rounds):
                found[name].append(world.timed(step))
                after(name)
    return found
