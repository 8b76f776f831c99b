"""What a save in the background costs the training beside it; ours, torch's, and a plain copy.

    python tests/benchmarks/bench_async.py [--rounds N] [--mib N] [--saves N] [--folder DIR]
        [--out DIR] [--guide PAGE]

One rank with a gloo group and one thread for torch, on two cores: training takes one, the other is
free for the save. Training is a small network on the CPU. `blocked` is the call of `async_save`,
`memcpy` a copy of the same tensors into memory that has been touched. `lost` is how many steps of
training fewer fit into a second while saves run without a pause, beside seconds without a save just
before; time in the calls is not counted, as `blocked` has it. `unwritten` is the most that waited
in the system's memory for the disk, and `grown` what the process's memory grew from the first save
to the last. Saves are synced. Methods alternate; medians. Only ratios within one run mean anything.

Needs the extra `test`.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_worlds
import reports
import table
import torch
import torch.distributed as dist
from engine_ranks import World, run_world
from rich.console import Console
from torch.distributed.checkpoint import filesystem, staging, state_dict_saver

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

ROUNDS, SAVES = 5, 20
FILE_NAME = "bench_async.json"
TENSORS = 64
SLICE_S = 3.0
"""Of training, without saves and with them."""
DEADLINE_S = 600.0
MEMCPY = "memcpy"

State = dict[str, torch.Tensor]
Begin = Callable[[State, Path], Future[Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """One way to save. The names are the table's."""

    method: str
    blocked_ms: float
    over_memcpy: float
    save_ms: float
    """From the call until the save is done."""
    lost_percent: float | None
    unwritten_mib: float | None
    grown_mib: float | None


def _ours(where: AsyncCheckpointerType) -> Begin:
    def begin(state: State, folder: Path) -> Future[Any]:
        started = dcp.async_save(dict(state), checkpoint_id=folder, async_checkpointer_type=where)
        if isinstance(started, AsyncSaveResponse):
            raise TypeError("a copy of our own is made when the call returns")
        return started

    return begin


def _torchs(where: AsyncCheckpointerType) -> Begin:
    stager = staging.DefaultStager(staging.StagingOptions(False, False, False, False))

    def begin(state: State, folder: Path) -> Future[Any]:
        started: Any = state_dict_saver.async_save(
            dict(state),
            storage_writer=filesystem.FileSystemWriter(folder),
            async_stager=stager,
            async_checkpointer_type=where,
        )
        return started.upload_completion if hasattr(started, "upload_completion") else started

    return begin


def methods_of() -> dict[str, Begin]:
    """The ways that are compared."""
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    return {
        "ours, in a thread": _ours(thread),
        "ours, in a process": _ours(process),
        "torch, in a thread": _torchs(thread),
        "torch, in a process": _torchs(process),
    }


class Training:
    """Steps of a small network: many short calls of Python, as in real training on a GPU."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            *(m for _ in range(8) for m in (torch.nn.Linear(256, 256), torch.nn.GELU()))
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randn(64, 256)

    def step(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()

    def rate(self, between: Callable[[], float] = lambda: 0.0) -> float:
        """Steps in a second, for a while.

        between: called after each step; returns the seconds that are not to be counted.
        """
        steps, apart_s, started_s = 0, 0.0, time.perf_counter()
        while time.perf_counter() - started_s < SLICE_S:
            self.step()
            steps += 1
            apart_s += between()
        return steps / (time.perf_counter() - started_s - apart_s)


class Saves:
    """Saves of one method, one after the other."""

    def __init__(self, begin: Begin, state: State, folder: Path) -> None:
        self.begin, self.state, self.folder = begin, state, folder
        self.running: Future[Any] | None = None
        self.count = 0

    def keep_one_running(self) -> float:
        """Begin the next save if the last one is done; the seconds that this took."""
        if self.running is not None and not self.running.done():
            return 0.0
        started_s = time.perf_counter()
        self.finish()
        self.start()
        return time.perf_counter() - started_s

    def start(self) -> None:
        """Begin a save. Two folders in turn: the last checkpoint stays until the next is whole."""
        self.running = self.begin(self.state, self.folder / str(self.count % 2))
        self.count += 1

    def finish(self) -> None:
        """Wait for the running save; raises its failure."""
        if self.running is not None:
            self.running.result(DEADLINE_S)
            self.running = None


def memory_mib(*names: str) -> float:
    """The sum of these fields of /proc/meminfo."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in names) / 1024


def resident_mib() -> float:
    """This process's memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@contextmanager
def peak_unwritten() -> Iterator[Callable[[], float]]:
    """A function that gives the most that waited for the disk inside, over the begin."""
    os.sync()
    before = peak = memory_mib("Dirty", "Writeback")
    stopped = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stopped.wait(0.02):
            peak = max(peak, memory_mib("Dirty", "Writeback"))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak - before
    finally:
        stopped.set()
        thread.join()


def time_calls(saves: dict[str, Saves], state: State, rounds: int) -> dict[str, dict[str, float]]:
    """What the caller waits, and how long the save takes, in ms."""
    copies = [tensor.clone() for tensor in state.values()]
    blocked: dict[str, list[float]] = {name: [] for name in (MEMCPY, *saves)}
    whole: dict[str, list[float]] = {name: [] for name in (MEMCPY, *saves)}
    for number in range(rounds + 1):
        for name in blocked:
            started_s = time.perf_counter()
            if name == MEMCPY:
                for copy, tensor in zip(copies, state.values(), strict=True):
                    copy.copy_(tensor)
            else:
                saves[name].start()
            blocked_s = time.perf_counter() - started_s
            if name != MEMCPY:
                saves[name].finish()
            if number:  # the first one touches memory, and starts processes
                blocked[name].append(blocked_s * 1e3)
                whole[name].append((time.perf_counter() - started_s) * 1e3)
    return {
        name: {"blocked": statistics.median(blocked[name]), "save": statistics.median(whole[name])}
        for name in blocked
    }


def lost_training(saves: dict[str, Saves], rounds: int) -> dict[str, float]:
    """Steps lost while saves run, in percent."""
    training = Training()
    training.rate()
    lost: dict[str, list[float]] = {name: [] for name in saves}
    for _ in range(rounds):
        for name, some in saves.items():
            alone = training.rate()
            beside = training.rate(some.keep_one_running)
            some.finish()
            lost[name].append(100 * (1 - beside / alone))
    return {name: statistics.median(values) for name, values in lost.items()}


def memory_of_saves(some: Saves, count: int) -> tuple[float, float]:
    """The peak of what waits for the disk, and the growth of memory, over `count` saves."""
    with peak_unwritten() as peak:
        some.start()
        some.finish()
        first = resident_mib()
        for _ in range(count - 1):
            some.start()
            some.finish()
        return peak(), resident_mib() - first


def run_rank(
    world: World, folder: Path, mib: int, rounds: int, saves: int
) -> list[dict[str, object]]:
    """All methods, in this rank."""
    store = dist.FileStore(str(folder / "store"), 1)  # type: ignore[attr-defined]  # not in __all__
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    elements = mib * (1 << 20) // TENSORS // 4
    state = {f"w{n}": torch.randn(elements) for n in range(TENSORS)}
    methods = {
        name: Saves(begin, state, folder / name.replace(" ", "-"))
        for name, begin in methods_of().items()
    }
    times = time_calls(methods, state, rounds)
    floor = times[MEMCPY]["blocked"]
    lost = lost_training(methods, rounds)
    rows = [Row(MEMCPY, floor, 1.0, floor, None, None, None)]
    for name, some in methods.items():
        unwritten, grown = memory_of_saves(some, saves)
        blocked, whole = times[name]["blocked"], times[name]["save"]
        rows.append(Row(name, blocked, blocked / floor, whole, lost[name], unwritten, grown))
    return [asdict(row) for row in rows]


COLUMNS = ("method", "blocked ms", "over memcpy", "save ms", "lost %", "unwritten MiB", "grown MiB")


def rows_of(rows: Sequence[Row]) -> list[list[str]]:
    """One row for each method."""

    def cell(value: float | None) -> str:
        return table.ABSENT if value is None else f"{value:,.1f}"

    return [
        [
            row.method, cell(row.blocked_ms), f"{row.over_memcpy:.2f}x", cell(row.save_ms),
            cell(row.lost_percent), cell(row.unwritten_mib), cell(row.grown_mib),
        ]
        for row in rows
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the methods, print the table, write the JSON."""
    parser = reports.make_parser(__doc__, FILE_NAME)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--mib", type=int, default=1024, help="size of the state; default: 1024")
    parser.add_argument(
        "--saves", type=int, default=SAVES, help=f"in a row, for memory; default: {SAVES}"
    )
    options: argparse.Namespace = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-async-", dir=options.folder) as name:
        job = partial(
            run_rank, folder=Path(name), mib=options.mib, rounds=options.rounds, saves=options.saves
        )
        rows = [Row(**one) for one in run_world(job, 1)]
    report = {
        "environment": bench_worlds.environment(),
        "rounds": options.rounds,
        "mib": options.mib,
        "saves": options.saves,
        "async": [asdict(row) for row in rows],
    }
    table.show(
        Console(width=120), f"{options.mib} MiB; {options.rounds} rounds", COLUMNS, rows_of(rows)
    )
    reports.save(report, options, FILE_NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
