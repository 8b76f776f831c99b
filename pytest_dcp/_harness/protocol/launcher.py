"""The contract between a world and the launcher of its ranks.

A launcher starts processes, reports how they end, and kills them with everything they started. It
knows nothing about tests: a rank's instructions travel over the rank's own socket, which the
launcher only passes to it.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from pytest_dcp._harness.protocol import linux
from pytest_dcp.errors import WorldError

RANK_VARIABLE = "PYTEST_DCP_RANK"
"""Holds `RankLaunch.token` in the environment of each rank and of the programs that it starts."""
STACKS_SIGNAL = signal.SIGRTMAX - 2
"""Asks a rank for its stacks; a real-time signal, since tests use SIGUSR1 and SIGUSR2
themselves."""
INTERRUPT_SIGNAL = signal.SIGRTMAX - 3
"""Raises KeyboardInterrupt in the rank's current phase; see `rank_interrupts`."""
OWN_SIGNALS = frozenset((STACKS_SIGNAL, INTERRUPT_SIGNAL))
"""Signals for which a rank has handlers, but programs that it started have not."""


HELPERS = (
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "pytest_dcp._engine.background.worker",
    "dcp-async-save",
)
"""Occur in command lines of processes that end by themselves shortly after their rank."""


LIBRARIES = ("/site-packages/", "/dist-packages/")


def is_worth_preloading(module: str) -> bool:
    """Whether a launcher may import a module for later ranks: never a module of the user."""
    return module.partition(".")[0] in ("torch", "numpy")


def is_of_suite(file: str, root: str) -> bool:
    """Whether a module's file is below the folder `root/`, and of no library. Pure (no I/O)."""
    return bool(root) and file.startswith(root) and not any(part in file for part in LIBRARIES)


@dataclass(frozen=True, slots=True)
class OuterPlace:
    """Where a rank is among several machines, or several processes of an outer launcher."""

    local_rank: int
    """Among the world's ranks on its node."""
    local_size: int
    """How many of the world's ranks are on its node."""
    node: int
    """The node's number, from 0."""
    master_addr: str
    """Where the other ranks reach rank 0."""
    interface: str = ""
    """The network interface that leads to rank 0; empty if unknown."""
    clock_ahead_s: float = 0.0
    """By how much CLOCK_MONOTONIC here is ahead of the controller's."""
    shares_folder: bool = True
    """Whether all ranks of the world see the controller's temporary folder."""


@dataclass(frozen=True, slots=True)
class RankLaunch:
    """All that a rank needs to know to come up."""

    session: str
    """Unique among all sessions on the machine."""
    world: int
    """Unique within the session."""
    rank: int
    size: int
    backend: str
    device: str
    """cpu, or cuda:<index into the outer CUDA_VISIBLE_DEVICES>."""
    mesh: tuple[int, ...]
    mesh_dim_names: tuple[str, ...] | None
    store: str
    """Path of the file store at which the ranks meet, or `tcp://host:port/prefix`."""
    master_port: int
    """A port reserved for this world, for code that sets up its own env:// rendezvous."""
    seed: int
    isolation: str
    """module: the rank runs several tests, and is reset between them."""
    basetemp: str
    """The rank's own base for tmp_path; not created yet."""
    place: OuterPlace | None = None
    """None: all ranks are on this machine, started by its controller."""
    fake_view: tuple[int, int] | None = None
    """In a fake world: the rank whose view this process runs, and the number of ranks."""
    threads: int = 0
    """In a world of threads: the number of ranks, all in this process."""

    @property
    def local_rank(self) -> int:
        """The rank's number among the world's ranks on its node."""
        if self.place is None or self.is_simulated:
            return self.view[0]
        return self.place.local_rank

    @property
    def is_simulated(self) -> bool:
        """Whether the world's ranks are not processes."""
        return self.fake_view is not None or self.threads > 0

    @property
    def view(self) -> tuple[int, int]:
        """Rank and world size as the test sees them."""
        return self.fake_view or (self.rank, self.threads or self.size)

    @property
    def token(self) -> str:
        """Identifies this rank among all processes of the machine."""
        return f"{self.session}:{self.world}:{self.rank}"

    def to_json(self) -> str:
        """As text for the wire; `from_json` reads it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RankLaunch:
        """Inverse of `to_json`."""
        raw = json.loads(text)
        raw["mesh"] = tuple(raw["mesh"])
        if raw["mesh_dim_names"] is not None:
            raw["mesh_dim_names"] = tuple(raw["mesh_dim_names"])
        if raw["fake_view"] is not None:
            raw["fake_view"] = tuple(raw["fake_view"])
        if raw["place"] is not None:
            raw["place"] = OuterPlace(**raw["place"])
        return RankLaunch(**raw)


@dataclass(frozen=True, slots=True)
class RankFds:
    """A rank's inherited descriptors, in the order in which they are passed.

    All but the socket are memfds that the controller keeps, so that a killed rank's output
    survives.
    """

    socket: int
    out: int
    err: int
    trace: int
    """Stacks, on request and on a fatal signal."""
    draws: int
    """The rank's draws for a property's example."""

    def all(self) -> list[int]:
        """In the order of the fields."""
        return [self.socket, self.out, self.err, self.trace, self.draws]


@dataclass(frozen=True, slots=True)
class ProcessExit:
    """How a rank's process ended."""

    rank: int
    status: int
    """The exit code, or minus the signal."""
    leaked_processes: tuple[str, ...] = ()
    """The processes that it left running, as `pid (command)`; they were killed."""
    how: str = ""
    """How it ended, in words, if `status` cannot be known."""


@dataclass(frozen=True, slots=True)
class StopChange:
    """A rank's process was stopped (by SIGSTOP, for example), or continued after a stop."""

    rank: int
    stopped: bool


class LauncherLostError(WorldError):
    """The process that starts, signals and reaps ranks has itself ended."""


class Launcher(Protocol):
    """Starts, signals and reaps the processes of ranks."""

    name: str
    """fork or spawn."""
    lost: str
    """How the launcher ended; empty while it lives."""
    first_place: str
    """The rank's first step, before it can report its place; empty if that takes no time."""

    def await_ready(self) -> None:
        """Wait until ranks can be started at once, for `places.PREPARE_S` at most.

        Raises `LauncherLostError` when the launcher is gone, or not ready by then.
        """

    def check_running(self) -> None:
        """Raise `LauncherLostError` if a test has stopped the launcher's process. Cheap."""

    def launch(self, orders: Sequence[RankLaunch], fds: Sequence[RankFds]) -> None:
        """Start one process per order. Raises `WorldError` when that is impossible."""

    def fileno(self) -> int:
        """A descriptor that is readable when `news` has something to return."""

    def has_news(self, world: int) -> bool:
        """Whether news of this world were already read for another world. Cheap."""

    def news(self, world: int) -> list[ProcessExit | StopChange]:
        """The ends and stops of this world's processes since the last call. Does not wait."""

    def stacks(self, world: int, rank: int) -> None:
        """Have the rank write the stacks of all its threads to its trace descriptor."""

    def interrupt(self, world: int, rank: int) -> None:
        """Raise KeyboardInterrupt in the rank if it is working in a phase."""

    def kill(self, world: int, rank: int) -> None:
        """SIGKILL the rank and its process group."""

    def pause(self, world: int, rank: int) -> None:
        """SIGSTOP the rank and its process group."""

    def resume(self, world: int, rank: int) -> None:
        """SIGCONT the rank and its process group."""

    def at_work(self, world: int, rank: int, pid: int) -> bool:
        """Whether a thread of the rank's process `pid` runs, or waits for a processor or a disk."""

    def main_thread_cpu_s(self, world: int, rank: int, pid: int) -> float:
        """Processor time of the rank's main thread, in seconds."""

    def preload(self, modules: Sequence[str]) -> None:
        """Hint: later ranks are likely to import these modules."""

    def forget(self, world: int) -> None:
        """The world is gone: drop the state of its processes, such as their files."""

    def close(self) -> None:
        """End everything that was started, in bounded time."""


class Signals:
    """Signals that a launcher sends to ranks, and its looks at their processes on this machine."""

    def at_work(self, world: int, rank: int, pid: int) -> bool:
        """Whether the rank does something, polls, or would if it had a processor."""
        return linux.at_work(pid)

    def main_thread_cpu_s(self, world: int, rank: int, pid: int) -> float:
        """Processor time of the rank's main thread, in seconds."""
        return linux.main_thread_cpu_s(pid)

    def stacks(self, world: int, rank: int) -> None:
        """Have the rank write its stacks."""
        self._signal(world, rank, STACKS_SIGNAL)

    def interrupt(self, world: int, rank: int) -> None:
        """Raise KeyboardInterrupt in the rank."""
        self._signal(world, rank, INTERRUPT_SIGNAL)

    def kill(self, world: int, rank: int) -> None:
        """SIGKILL the rank and its process group."""
        self._signal(world, rank, signal.SIGKILL)

    def pause(self, world: int, rank: int) -> None:
        """SIGSTOP the rank and its process group."""
        self._signal(world, rank, signal.SIGSTOP)

    def resume(self, world: int, rank: int) -> None:
        """SIGCONT the rank and its process group."""
        self._signal(world, rank, signal.SIGCONT)

    def _signal(self, world: int, rank: int, signum: int) -> None:
        """Signal the rank and, unless the signal is in `OWN_SIGNALS`, the programs that it started.

        Does nothing if the rank has ended.
        """
        raise NotImplementedError
