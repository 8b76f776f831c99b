"""Times loads whose ranks want the same bytes: read by each, read once, and torch's; in one run.

    python tests/benchmarks/bench_shared_reads.py [--rounds N] [--ranks N] [--mib N] [--folder DIR]
        [--out DIR] [--guide PAGE]

A world of gloo ranks is forked for each case, with one thread each. The store is a file system of
fsspec that lets each rank read RATE_MB megabytes a second, whatever its number of threads, as an
object store or a network file system does with each of its clients; its files are in the page
cache. A time is that of the slowest rank between two barriers. Medians; only ratios within one run
mean anything. Ranks share the machine's cores, and a bucket is received, checked and copied there.

Needs the extra `test`.
"""

import argparse
import importlib
import io
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_worlds
import fsspec
import reports
import table
import torch
from engine_ranks import World, run_world
from fsspec.implementations.local import LocalFileSystem
from rich.console import Console
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint._fsspec_filesystem import FsspecReader

torch_dcp: Any = importlib.import_module("torch.distributed.checkpoint")
torch_fsspec: Any = importlib.import_module("torch.distributed.checkpoint._fsspec_filesystem")

ROUNDS = 3
FILE_NAME = "bench_shared_reads.json"
PROTOCOL = "throttled"
RATE_MB = 50
"""Of each rank, in 10^6 bytes a second."""
TENSORS = 32
STORE, DISK = "store", "disk"
LAYOUTS: dict[str, tuple[Placement, ...]] = {
    "replicated": (Replicate(),),
    "hybrid sharded": (Replicate(), Shard(0)),
    "sharded": (Shard(0),),
}


class Throttle:
    """Lets bytes through at a rate, for all threads of a process together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_s = 0.0
        """When the bytes so far are through."""

    def wait(self, nbytes: int) -> None:
        """Return when these bytes are through."""
        with self._lock:
            now = time.monotonic()
            self._free_s = max(self._free_s, now) + nbytes / (RATE_MB * 1e6)
            pause_s = self._free_s - now
        time.sleep(pause_s)


THROTTLE = Throttle()


class SlowFile(io.FileIO):
    """A file that is read at the rate."""

    def read(self, size: int | None = -1) -> Any:
        data: Any = super().read(-1 if size is None else size)
        THROTTLE.wait(len(data))
        return data

    def readinto(self, buffer: Any) -> Any:
        count: Any = super().readinto(buffer)
        THROTTLE.wait(count)
        return count


class SlowFileSystem(LocalFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """Local files, read at the rate."""

    protocol = PROTOCOL

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix(f"{PROTOCOL}://")

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        data: bytes = LocalFileSystem().cat_file(self._strip_protocol(path), start, end)
        THROTTLE.wait(len(data))
        return data

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return SlowFile(self._strip_protocol(path), mode)


fsspec.register_implementation(PROTOCOL, SlowFileSystem, clobber=True)

Method = Callable[[dict[str, Any], Path], object]


def _ours(read: Any, place: str) -> Method:
    def load(state: dict[str, Any], folder: Path) -> object:
        if place == STORE:
            reader = FsspecReader(f"{PROTOCOL}://{folder}")
            return dcp.load(state, storage_reader=reader, read=read)
        return dcp.load(state, checkpoint_id=folder, read=read)

    return load


def _torchs(place: str) -> Method:
    def load(state: dict[str, Any], folder: Path) -> object:
        if place == STORE:
            reader = torch_fsspec.FsspecReader(f"{PROTOCOL}://{folder}")
            return torch_dcp.load(state, storage_reader=reader)
        return torch_dcp.load(state, checkpoint_id=folder)

    return load


def methods_of(place: str) -> dict[str, Method]:
    """The loads that are compared."""
    ours = {f"ours, read={read!r}": _ours(read, place) for read in ("local", "shared", "auto")}
    return {**ours, "torch": _torchs(place)}


@dataclass(frozen=True, slots=True)
class Timed:
    """One method of a case."""

    case: str
    method: str
    ms: float
    low_ms: float
    high_ms: float
    read_ratio: float | None
    """Bytes that all ranks read, over the bytes of the state; None where it is not counted."""


def state_of(layout: str, ranks: int, mib: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state of `mib` MiB in a layout, and an empty one."""
    placements = LAYOUTS[layout]
    sizes = (2, ranks // 2) if len(placements) == 2 else (ranks,)
    mesh = init_device_mesh("cpu", sizes)
    rows = mib * (1 << 20) // (TENSORS * 1024 * 4)
    torch.manual_seed(0)
    states: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for n in range(TENSORS):
        full = torch.randn(rows, 1024)
        for state, tensor in zip(states, (full, torch.zeros_like(full)), strict=True):
            state[f"w{n}"] = spread(tensor, mesh, placements)
    return states


def spread(full: torch.Tensor, mesh: Any, placements: Sequence[Placement]) -> DTensor:
    """The full tensor in a layout; each rank takes its part, nothing is sent."""
    part = full
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            part = part.chunk(mesh.size(dim), placement.dim)[mesh.get_local_rank(dim)]
    return DTensor.from_local(part.clone(), mesh, placements)


def time_case(
    world: World, case: str, layout: str, place: str, mib: int, rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """Each method's times, in turn; the loaded bits are compared once."""
    saved, target = state_of(layout, world.size, mib)
    dcp.save(saved, checkpoint_id=folder)
    methods, ratios = methods_of(place), {}
    for name, method in methods.items():
        for tensor in target.values():
            tensor.to_local().zero_()
        report: Any = method(target, folder)
        for key, tensor in target.items():
            if not torch.equal(tensor.to_local(), saved[key].to_local()):
                raise AssertionError(f"{name} loaded other bits into {key}")
        read_bytes = world.total(float(getattr(report, "bytes_read", 0)))
        ratios[name] = read_bytes / (mib << 20) or None
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            times[name].append(world.timed(partial(method, target, folder)))
    return [
        asdict(Timed(case, name, statistics.median(some), min(some), max(some), ratios[name]))
        for name, some in times.items()
    ]


def run(options: argparse.Namespace) -> list[Timed]:
    """Every case in a world of its own."""
    timings = []
    with tempfile.TemporaryDirectory(prefix="bench-shared-", dir=options.folder) as name:
        for place in (STORE, DISK):
            for layout in LAYOUTS:
                if place == STORE and layout == "sharded":
                    continue  # no rank wants another's bytes
                where = f"{RATE_MB} MB/s a rank" if place == STORE else "local disk"
                case = f"{layout}, {where}"
                folder = Path(name) / case.replace("/", " ")
                job = partial(
                    time_case, case=case, layout=layout, place=place, mib=options.mib,
                    rounds=options.rounds, folder=folder,
                )  # fmt: skip
                timings += [Timed(**one) for one in run_world(job, options.ranks)]
    return timings


COLUMNS = ("load", "method", "ms", "range", "against read='local'", "bytes read / state")


def rows_of(timings: Sequence[Timed]) -> list[list[str]]:
    """One row for each method of each case."""
    base = {one.case: one.ms for one in timings if "local" in one.method}
    return [
        [
            one.case,
            one.method,
            f"{one.ms:,.0f}",
            f"{one.low_ms:,.0f}-{one.high_ms:,.0f}",
            f"{base[one.case] / one.ms:.2f}x",
            "-" if one.read_ratio is None else f"{one.read_ratio:.2f}",
        ]
        for one in timings
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, write the JSON."""
    parser = reports.make_parser(__doc__, FILE_NAME)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--ranks", type=int, default=4, help="default: 4")
    parser.add_argument("--mib", type=int, default=128, help="size of the state; default: 128")
    options = parser.parse_args(argv)
    timings = run(options)
    report = {
        "environment": bench_worlds.environment(),
        "rounds": options.rounds,
        "ranks": options.ranks,
        "shared_reads": [asdict(one) for one in timings],
    }
    title = f"{options.mib} MiB on {options.ranks} ranks; medians of {options.rounds} rounds"
    table.show(Console(width=140), title, COLUMNS, rows_of(timings))
    reports.save(report, options, FILE_NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
