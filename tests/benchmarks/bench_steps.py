"""Times and weighs the steps of a run: each in full, and incremental with either hash.

    python tests/benchmarks/bench_steps.py [--steps N] [--mib N] [--folder DIR] [--out DIR]
        [--guide PAGE]

One process. Each method saves the same steps into a folder of its own, in turn; a time is that of
`CheckpointManager.save`, synced, and the median of all steps but the first. Bytes count each file
once, however many names it has. Only ratios within one run mean anything.

Needs the extra `test`, and `blake3` for its rows.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_worlds
import reports
import table
import torch
from rich.console import Console

from pytest_dcp._engine.steps import increments
from pytest_dcp._engine.steps.block_hash import HASH_MAKERS
from pytest_dcp.checkpoint import CheckpointManager

STEPS = 10
FILE_NAME = "bench_steps.json"
FULL = "full"
LAYERS = 24

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One method of a case. The names are the table's."""

    run: str
    steps: str
    first_ms: float
    later_ms: float
    """Median of the steps after the first."""
    MB_of_one: float
    MB_of_all: float
    all_over_one: float


def adapters(mib: int) -> Iterator[State]:
    """A frozen model, adapters of low rank, and their AdamW."""
    side = int((mib * (1 << 20) / 4 / LAYERS) ** 0.5)
    frozen = {f"layers.{n}.weight": torch.randn(side, side) for n in range(LAYERS)}
    while True:
        names = [f"layers.{n}.{part}" for n in range(0, LAYERS, 2) for part in ("down", "up")]
        moving = {name: torch.randn(side, 2) for name in names}
        yield {"model": frozen | moving, "optimizer": moments_of(moving)}


def half_frozen(mib: int) -> Iterator[State]:
    """Half of a model frozen, the other half with its AdamW: a quarter of the bytes is frozen."""
    side = int((mib * (1 << 20) / 4 / LAYERS / 2) ** 0.5)
    frozen = {f"layers.{n}.weight": torch.randn(side, side) for n in range(LAYERS // 2)}
    while True:
        moving = {f"top.{n}.weight": torch.randn(side, side) for n in range(LAYERS // 2)}
        yield {"model": frozen | moving, "optimizer": moments_of(moving)}


def trained(mib: int) -> Iterator[State]:
    """A model without frozen parameters, and its AdamW: everything changes."""
    side = int((mib * (1 << 20) / 4 / LAYERS / 3) ** 0.5)
    while True:
        moving = {f"layers.{n}.weight": torch.randn(side, side) for n in range(LAYERS)}
        yield {"model": moving, "optimizer": moments_of(moving)}


def moments_of(moving: dict[str, torch.Tensor]) -> State:
    """The state of AdamW, with random numbers in it."""
    return {
        name: {"exp_avg": torch.randn_like(w), "exp_avg_sq": torch.rand_like(w), "step": 1.0}
        for name, w in moving.items()
    }


CASES: dict[str, Callable[[int], Iterator[State]]] = {
    "adapters on a frozen model": adapters,
    "half of the model frozen": half_frozen,
    "AdamW, nothing frozen": trained,
}


def bytes_on_disk(folder: Path) -> int:
    """Of all files, each once."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({one.st_ino: one.st_size for one in found}.values())


def save(manager: CheckpointManager, method: str, step: int, state: State) -> float:
    """Milliseconds of one save."""
    if method in HASH_MAKERS:
        increments.BEST_HASH = method
    start = time.perf_counter()
    manager.save(step, state)
    return (time.perf_counter() - start) * 1e3


def run_case(case: str, mib: int, steps: int, folder: Path) -> list[Row]:
    """Every method, step by step in turn."""
    methods = [FULL, *sorted(HASH_MAKERS)]
    managers = {
        method: CheckpointManager(folder / method, no_dist=True, incremental=method != FULL)
        for method in methods
    }
    times: dict[str, list[float]] = {method: [] for method in methods}
    torch.manual_seed(0)
    states = CASES[case](mib)
    for step in range(steps):
        state = next(states)
        for method in methods:
            times[method].append(save(managers[method], method, step, state))
    rows = []
    for method in methods:
        managers[method].close()
        one = bytes_on_disk(folder / method / "step-00000000") / 1e6
        every = bytes_on_disk(folder / method) / 1e6
        name = method if method == FULL else f"incremental, {method}"
        first, *later = times[method]
        rows.append(Row(case, name, first, statistics.median(later), one, every, every / one))
    return rows


def run(options: argparse.Namespace) -> list[Row]:
    """All cases; the folder of each is removed before the next."""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES:
            with tempfile.TemporaryDirectory(prefix="bench-steps-", dir=options.folder) as name:
                rows += run_case(case, options.mib, options.steps, Path(name))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, write the JSON."""
    parser = reports.make_parser(__doc__, FILE_NAME)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default: {STEPS}")
    parser.add_argument("--mib", type=int, default=64, help="of one step; default: 64")
    options = parser.parse_args(argv)
    rows = [asdict(row) for row in run(options)]
    report = {
        "environment": bench_worlds.environment(),
        "mib": options.mib,
        "count": options.steps,
        "steps": rows,
    }
    columns = [name.replace("_", " ") for name in rows[0]]
    cells = [
        [f"{value:,.2f}" if isinstance(value, float) else value for value in row.values()]
        for row in rows
    ]
    table.show(Console(width=140), f"{options.steps} steps of {options.mib} MiB", columns, cells)
    reports.save(report, options, FILE_NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
