"""Measures how costs grow with what a user can grow: tensors, bytes, files, ranks, steps, tests.

    python tests/benchmarks/bench_growth.py [--rounds N] [--only NAME]... [--quick] [--folder DIR]
        [--out DIR] [--guide PAGE]

Each size is twice the one before. `exponent` is k of the best fit of a * size^k to the times of the
three largest sizes: about 0 for a cost that does not grow, 1 for one that doubles with the size, 2
for a quadratic one. n log n has 1.05 to 1.1 at these sizes, and a fit of noisy times is off by some
hundredths; so more than 1.15 misses the promise. Times are processor time of this process and of
its children, the least of the rounds: a busy machine changes them little.

Needs the extra `test`.
"""

import fnmatch
import math
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_opened
import bench_worlds
import methods
import processes
import reports
import suites
import table
import torch
from rich.console import Console
from torch.distributed.tensor import Shard

import pytest_dcp
import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.lazy_reading.comparison import compare_checkpoints
from pytest_dcp.checkpoint import CheckpointManager, convert
from pytest_dcp.checkpoint.state_dict import get_state_dict, set_state_dict

ROUNDS = 3
FILE_NAME = "bench_growth.json"
MIB = 1 << 20
FITTED = 3
"""Sizes in a fit: smaller ones are mostly fixed cost."""
MOST = 1.15

Work = Callable[[], object]
Prepare = Callable[[Path, int], Work]
"""Makes what the work needs, in a new folder, for a size."""


@dataclass(frozen=True, slots=True)
class Growth:
    """A cost, and what it grows with."""

    name: str
    unit: str
    sizes: Sequence[int]
    prepare: Prepare
    rounds: int | None = None
    """None: as many as the command says."""


@dataclass(frozen=True, slots=True)
class Row:
    """One growth, measured."""

    cost: str
    grows_with: str
    sizes: str
    ms: str
    """At these sizes."""
    exponent: float
    met: bool


def doubled(first: int, count: int) -> list[int]:
    """So many sizes, each twice the one before."""
    return [first << n for n in range(count)]


def small_tensors(count: int) -> dict[str, Any]:
    """Tensors of 1 kB."""
    return {f"layers.{n}.weight": torch.full((256,), float(n)) for n in range(count)}


def zeros_like(state: dict[str, Any]) -> dict[str, Any]:
    """A state to load into."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def save_tensors(folder: Path, count: int) -> Work:
    state = small_tensors(count)
    return lambda: dcp.save(state, dcp_writer(folder))


def dcp_writer(folder: Path) -> dcp.FileSystemWriter:
    """A writer that does not wait for the disk, whose time is not ours."""
    return dcp.FileSystemWriter(folder, sync_files=False)


def load_tensors(folder: Path, count: int) -> Work:
    state = small_tensors(count)
    dcp.save(state, dcp_writer(folder))
    target = zeros_like(state)
    return lambda: dcp.load(target, checkpoint_id=folder)


def save_values(folder: Path, count: int) -> Work:
    state = {f"group.{n}": {"step": n, "betas": (0.9, 0.99)} for n in range(count)}
    return lambda: dcp.save(state, dcp_writer(folder))


def save_bytes(folder: Path, mib: int) -> Work:
    state = {"weight": torch.ones(mib * MIB // 4)}
    return lambda: dcp.save(state, dcp_writer(folder))


def load_bytes(folder: Path, mib: int) -> Work:
    state = {"weight": torch.ones(mib * MIB // 4)}
    dcp.save(state, dcp_writer(folder))
    target = zeros_like(state)
    return lambda: dcp.load(target, checkpoint_id=folder)


def stage_bytes(folder: Path, mib: int) -> Work:
    state = {"weight": torch.ones(mib * MIB // 4)}

    def work() -> None:
        dcp.async_save(state, storage_writer=dcp_writer(folder)).result()  # type: ignore[union-attr]

    return work


def open_index(folder: Path, chunks: int) -> Work:
    bench_opened.write_large_index(folder / "large", chunks)

    def work() -> object:
        with dcp.open(folder / "large") as opened:
            lazy: Any = opened["layers.0.weight"]
            return lazy[3:5]

    return work


def compare_indexes(folder: Path, chunks: int) -> Work:
    for name in "ab":
        bench_opened.write_large_index(folder / name, chunks)

    def work() -> object:
        with dcp.open(folder / "a") as one, dcp.open(folder / "b") as other:
            return compare_checkpoints(one, other)

    return work


def load_chunks(folder: Path, chunks: int) -> Work:
    bench_opened.write_large_index(folder / "large", chunks)
    target = {f"layers.{n}.weight": torch.empty(1000, 16) for n in range(chunks // 1000)}
    return lambda: dcp.load(target, checkpoint_id=folder / "large")


def load_from_files(folder: Path, files: int) -> Work:
    state = small_tensors(files)
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False, sync_files=False)
    dcp.save(state, writer)
    target = zeros_like(state)
    return lambda: dcp.load(target, checkpoint_id=folder)


def save_to_files(folder: Path, files: int) -> Work:
    state = small_tensors(files)
    return lambda: dcp.save(
        state, dcp.FileSystemWriter(folder, single_file_per_rank=False, sync_files=False)
    )


def convert_tensors(folder: Path, count: int) -> Work:
    dcp.save(small_tensors(count), dcp_writer(folder / "source"))
    return lambda: convert.to_safetensors(folder / "source", folder / "target.safetensors")


def build_model(layers: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Layers of 8 x 8, with the states of AdamW.

    No module has more than 10 children: `Module.load_state_dict` of torch looks at every name once
    for each child.
    """
    children: list[torch.nn.Module] = [torch.nn.Linear(8, 8) for _ in range(layers)]
    while len(children) > 1:
        parts = [children[at : at + 10] for at in range(0, len(children), 10)]
        children = [torch.nn.Sequential(*part) for part in parts]
    (model,) = children
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


def get_states(folder: Path, layers: int) -> Work:
    model, optimizer = build_model(layers)
    return lambda: get_state_dict(model, optimizer)


def set_states(folder: Path, layers: int) -> Work:
    model, optimizer = build_model(layers)
    own, of_optimizer = get_state_dict(model, optimizer)
    return lambda: set_state_dict(
        model, optimizer, model_state_dict=own, optim_state_dict=of_optimizer
    )


def simulate_ranks(folder: Path, ranks: int) -> Work:
    state = {f"layers.{n}.weight": torch.empty(16384, 64, device="meta") for n in range(100)}
    return lambda: pytest_dcp.simulate(ranks, {"layers.*": [Shard(0)]}, state)


def write_run(folder: Path, steps: int) -> None:
    """A run of steps with one tensor each."""
    with CheckpointManager(folder, no_dist=True) as manager:
        for step in range(steps):
            manager.save(step, {"w": torch.ones(8)})


def find_latest(folder: Path, steps: int) -> Work:
    write_run(folder, steps)

    def work() -> object:
        with CheckpointManager(folder, no_dist=True) as manager:
            return manager.latest()

    return work


def list_steps(folder: Path, steps: int) -> Work:
    write_run(folder, steps)

    def work() -> object:
        with CheckpointManager(folder, no_dist=True) as manager:
            return manager.steps()

    return work


def run_session(write: Callable[[int], str]) -> Prepare:
    """A session of pytest with a suite of this size."""

    def prepare(folder: Path, size: int) -> Work:
        suites.write(folder, write(size))
        argv = [sys.executable, "-m", "pytest", "-p", "pytest_dcp", "-p", "no:cacheprovider", "-q"]
        return lambda: processes.run(argv, folder)

    return prepare


GROWTHS = (
    Growth("save", "tensors of 1 kB", doubled(1000, 6), save_tensors),
    Growth("load", "tensors of 1 kB", doubled(1000, 6), load_tensors),
    Growth("save", "Python values", doubled(500, 5), save_values),
    Growth("save", "MiB of a tensor", doubled(16, 6), save_bytes),
    Growth("load", "MiB of a tensor", doubled(16, 6), load_bytes),
    Growth("async_save and its save", "MiB of a tensor", doubled(16, 6), stage_bytes),
    Growth("save", "files", doubled(250, 5), save_to_files),
    Growth("load", "files", doubled(250, 5), load_from_files),
    Growth("load", "chunks", doubled(8000, 6), load_chunks),
    Growth("open, two rows", "chunks", doubled(16_000, 6), open_index),
    Growth("compare two checkpoints", "chunks", doubled(16_000, 5), compare_indexes),
    Growth("convert to safetensors", "tensors of 1 kB", doubled(500, 6), convert_tensors),
    Growth("get_state_dict", "layers, AdamW", doubled(100, 6), get_states),
    Growth("set_state_dict", "layers, AdamW", doubled(100, 6), set_states),
    Growth("simulated save of 100 tensors", "ranks", doubled(128, 8), simulate_ranks),
    Growth("CheckpointManager.latest", "steps of a run", doubled(64, 4), find_latest),
    Growth("CheckpointManager.steps", "steps of a run", doubled(64, 4), list_steps),
    Growth(
        "session of pytest",
        "tests without a world",
        doubled(1000, 4),
        run_session(suites.plain_suite),
        rounds=1,
    ),
    Growth(
        "session of pytest",
        "tests in fresh worlds of 2",
        doubled(16, 4),
        run_session(lambda tests: suites.world_suite("all_reduce", 2, "test", tests)),
        rounds=1,
    ),
    Growth(
        "session of pytest",
        "tests in a warm world of 2",
        doubled(50, 4),
        run_session(lambda tests: suites.world_suite("all_reduce", 2, "module", tests)),
        rounds=1,
    ),
    Growth(
        "session of pytest",
        "examples in a world of 2",
        doubled(200, 4),
        run_session(lambda examples: suites.example_suite(2, methods.EXAMPLE_TESTS, examples)),
        rounds=1,
    ),
)


def processor_s() -> float:
    """Processor time of this process and of its children that have ended, in seconds."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(one.ru_utime + one.ru_stime for one in map(resource.getrusage, kinds))


def fit(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The exponent of the best power law through the largest sizes: least squares of logarithms.

    >>> fit([1, 2, 4, 8], [9.0, 2.0, 8.0, 32.0])
    2.0
    """
    across = [math.log(size) for size in sizes[-FITTED:]]
    up = [math.log(time) for time in times[-FITTED:]]
    middle_across, middle_up = sum(across) / len(across), sum(up) / len(up)
    covariance = sum((x - middle_across) * (y - middle_up) for x, y in zip(across, up, strict=True))
    return covariance / sum((x - middle_across) ** 2 for x in across)


def measure(growth: Growth, work_folder: Path, rounds: int, *, quick: bool) -> Row:
    """The times of one growth; a size's folder is removed when it is measured."""
    sizes = growth.sizes[:FITTED] if quick else growth.sizes
    rounds = growth.rounds or rounds
    times = []
    for size in sizes:
        folder = Path(tempfile.mkdtemp(dir=work_folder))
        work = growth.prepare(folder, size)
        # The first run of the smallest size pays for imports.
        spent = [spend(work) for _ in range(rounds + (size == sizes[0]))]
        times.append(min(spent))
        del work
        shutil.rmtree(folder)
    exponent = fit(sizes, times)
    return Row(
        growth.name,
        growth.unit,
        ", ".join(f"{size:,}" for size in sizes),
        ", ".join(f"{1000 * time:,.0f}" if time >= 0.1 else f"{1000 * time:.3g}" for time in times),
        exponent,
        exponent <= MOST,
    )


def spend(work: Work) -> float:
    """Seconds of processor time."""
    start = processor_s()
    work()
    return processor_s() - start


def chosen(patterns: Sequence[str] | None) -> Iterator[Growth]:
    """The growths whose names match."""
    for growth in GROWTHS:
        name = f"{growth.name}, {growth.unit}"
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns or ["*"]):
            yield growth


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = reports.make_parser(__doc__, FILE_NAME)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--only", action="append", metavar="NAME", help="a pattern of costs")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # saves of one process, and overwriting, are intended here
    processes.become_subreaper()
    work = Path(tempfile.mkdtemp(prefix="bench-growth-", dir=options.folder))
    rows = []
    try:
        for growth in chosen(options.only):
            rounds = 1 if options.quick else options.rounds
            rows.append(measure(growth, work, rounds, quick=options.quick))
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(work)
    report = {
        "environment": bench_worlds.environment(),
        "quick": options.quick,
        "growth": [asdict(row) for row in rows],
    }
    columns = ("cost", "grows with", "sizes", "ms of processor time", "exponent", "linear")
    cells = [
        [
            row.cost,
            row.grows_with,
            row.sizes,
            row.ms,
            f"{row.exponent:.2f}",
            "yes" if row.met else "NO",
        ]
        for row in rows
    ]
    table.show(Console(width=160), "growth", columns, cells)
    reports.save(report, options, FILE_NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
