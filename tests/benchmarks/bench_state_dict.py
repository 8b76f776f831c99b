"""Times the state-dict functions: ours and torch's, alternating in one run.

    python tests/benchmarks/bench_state_dict.py [--rounds N] [--only NAME]... [--quick] [--out DIR]
        [--guide PAGE]

Each case forks a world of gloo ranks on the CPU, makes a model of 2,000 parameters and a stepped
AdamW, runs every method once, and then each method once a round, in turn. A time is that of the
slowest rank between two barriers; figures are medians, and only ratios within one run mean
anything. The peak memory of `broadcast_from_rank0` is that of the rank that needs most, above its
memory before the call; each measurement has its own world. `--quick` takes a tenth of the
parameters and one round. A target that is missed is reported and is no failure.

Needs the extra `bench`.
"""

import argparse
import copy
import fnmatch
import importlib
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bench_worlds
import figures
import table
import torch
import torch.distributed as dist
from engine_ranks import World, alternate, run_world
from rich.console import Console
from torch.distributed.fsdp import fully_shard

PARAMETERS = 2_000
LAYER = 64
"""Rows and columns of a parameter: small, so that the overhead per parameter dominates."""
ROUNDS = 5
RANKS = 2
FILE_NAME = "bench_state_dict.json"
TARGET = 1.0
"""At least as fast as torch."""
MODULES = {
    "ours": "pytest_dcp.checkpoint.state_dict",
    "torch": "torch.distributed.checkpoint.state_dict",
}
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """A timed combination of model and call."""

    name: str
    wrapping: str
    """plain, ddp or fsdp2."""
    verb: str
    """get or set."""
    options: dict[str, bool]
    """Of StateDictOptions."""


FULL = {"full_state_dict": True}
RANK0 = {"full_state_dict": True, "cpu_offload": True}
FLAT = {"flatten_optimizer_state_dict": True}
BROADCAST = {"full_state_dict": True, "broadcast_from_rank0": True}
CASES = (
    Case("get, plain", "plain", "get", {}),
    Case("set, plain", "plain", "set", {}),
    Case("get, DDP", "ddp", "get", {}),
    Case("set, DDP", "ddp", "set", {}),
    Case("get, FSDP2, sharded", "fsdp2", "get", {}),
    Case("set, FSDP2, sharded", "fsdp2", "set", {}),
    Case("get, FSDP2, flattened", "fsdp2", "get", FLAT),
    Case("set, FSDP2, flattened", "fsdp2", "set", FLAT),
    Case("get, FSDP2, full", "fsdp2", "get", FULL),
    Case("set, FSDP2, full", "fsdp2", "set", FULL),
    Case("get, FSDP2, full on rank 0", "fsdp2", "get", RANK0),
    Case("set, FSDP2, from rank 0", "fsdp2", "set", BROADCAST),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Medians of one case, in ms."""

    case: str
    torch_ms: float
    ours_ms: float
    ratio: float
    """How many times faster ours was."""
    met: bool


def model_of(wrapping: str, parameters: int, device: str = "cpu") -> torch.nn.Module:
    """Layers of LAYER x LAYER without biases, ten to a block."""
    with torch.device(device):
        blocks = [
            torch.nn.Sequential(*(torch.nn.Linear(LAYER, LAYER, bias=False) for _ in range(10)))
            for _ in range(parameters // 10)
        ]
    model = torch.nn.Sequential(*blocks)
    if wrapping == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    if wrapping == "fsdp2":
        for block in blocks:
            fully_shard(block)
        return fully_shard(model)
    return model


def timed_case(case: Case, parameters: int, rounds: int, world: World) -> dict[str, list[float]]:
    """The times of both, of one rank's view. Collective."""
    model = model_of(case.wrapping, parameters)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    methods = {
        name: partial(_method, importlib.import_module(path), case, model, optimizer)()
        for name, path in MODULES.items()
    }
    for method in methods.values():
        method()
    return alternate(world, methods, rounds)


def _method(
    module: Any, case: Case, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[], object]:
    options = module.StateDictOptions(**case.options)
    if case.verb == "get":
        return partial(module.get_state_dict, model, optimizer, options=options)
    get_options = dict(case.options)
    # Every rank has it, though only rank 0's is looked at: torch 2.13 hangs here if others have {}.
    get_options.pop("broadcast_from_rank0", None)
    state_pair = module.get_state_dict(
        model, optimizer, options=module.StateDictOptions(**get_options)
    )
    states = copy.deepcopy(state_pair)

    def load() -> object:
        return module.set_state_dict(
            model,
            optimizer,
            model_state_dict=dict(states[0]),  # Torch's renames the keys of what it is given.
            optim_state_dict=states[1],
            options=options,
        )

    return load


def peak_case(name: str, device: str, scale: int, world: World) -> dict[str, float]:
    """MiB that `broadcast_from_rank0` into an FSDP2 model takes at most. Collective."""
    module = importlib.import_module(MODULES[name])
    sizes = [1024] * scale + [8192]
    with torch.device(device):
        layers = [torch.nn.Linear(1024, size, bias=False) for size in sizes]
    model = torch.nn.Sequential(*layers)
    state = {}
    if world.rank == 0:
        state = {f"{at}.weight": torch.zeros(size, 1024) for at, size in enumerate(sizes)}
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    options = module.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    small = torch.nn.Linear(2, 2)
    module.set_model_state_dict(small, small.state_dict(), options=options)  # Buffers of gloo.
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Begins the peak anew.
    module.set_model_state_dict(model, state, options=options)
    peak = _resident("VmHWM") - before
    total = sum(sizes) * 1024 * 4 / MIB
    return {
        "peak_mib": world.most(peak),
        "largest_mib": max(sizes) * 1024 * 4 / MIB,
        "shards_mib": total / dist.get_world_size(),
    }


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def judged(case: Case, times: dict[str, list[float]]) -> Result:
    """The medians of a case, and whether the target was met. Pure (no I/O)."""
    ours, theirs = statistics.median(times["ours"]), statistics.median(times["torch"])
    ratio = theirs / ours
    return Result(case.name, round(theirs, 2), round(ours, 2), round(ratio, 2), ratio >= TARGET)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--only", action="append", metavar="NAME", help="a pattern of names")
    parser.add_argument("--quick", action="store_true", help="fewer parameters, one round")
    parser.add_argument("--out", type=Path, help=f"folder for {FILE_NAME}; default: a new one")
    figures.add_option(parser)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds!r}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the tables, write the JSON."""
    options = parse(argv)
    where = bench_worlds.environment()
    parameters, rounds = (PARAMETERS // 10, 1) if options.quick else (PARAMETERS, options.rounds)
    patterns = options.only or ["*"]
    console = Console(width=120)
    results = []
    for case in CASES:
        if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns):
            times = run_world(partial(timed_case, case, parameters, rounds), RANKS)
            results.append(judged(case, times))
            console.print(f"{results[-1]}")
    scale = 4 if options.quick else 64
    peaks = {
        f"{name}, {device}": run_world(partial(peak_case, name, device, scale), RANKS)
        for name in MODULES
        for device in ("meta", "cpu")
        if any(fnmatch.fnmatch("peak", pattern) for pattern in patterns)
    }
    title = f"{parameters} parameters, {RANKS} ranks, medians of {rounds} rounds"
    columns = ("case", "torch ms", "ours ms", "ratio", "met")
    table.show(console, title, columns, [list(map(str, asdict(r).values())) for r in results])
    columns = ("broadcast into", "peak MiB", "largest tensor MiB", "shards MiB")
    rows = [[name, *(f"{value:.1f}" for value in of.values())] for name, of in peaks.items()]
    table.show(console, "peak memory of broadcast_from_rank0, FSDP2", columns, rows)
    folder = options.out or Path(tempfile.mkdtemp(prefix="bench-state-dict-"))
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "environment": where,
        "quick": options.quick,
        "parameters": parameters,
        "cases": [asdict(r) for r in results],
        "peaks": peaks,
    }
    (folder / FILE_NAME).write_text(json.dumps(report, indent=2))
    console.print(f"{folder / FILE_NAME}")
    if options.guide:
        figures.update(options.guide, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
