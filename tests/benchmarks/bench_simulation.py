"""Measures saves of simulated worlds: how each cost grows from 16 to 16,384 ranks.

    python tests/benchmarks/bench_simulation.py [--quick] [--out DIR] [--guide PAGE] [--svg FILE]

The state has the 1,000 largest tensors of a model of 405e9 parameters in bfloat16 (111 of its
layers, and the embedding), and FSDP divides it over all ranks. Each size is simulated in a process
of its own, whose peak of memory is measured. `--svg` draws the curves.

Needs the extra `test`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import bench_worlds
import figures

SIZES = (16, 64, 256, 1024, 4096, 16384)
QUICK_SIZES = (16, 64)
LIMIT_S, LIMIT_BYTES = 60.0, 4 << 30
"""The promise for any of these sizes."""
FILE_NAME = "bench_simulation.json"
HIDDEN, INNER, KEYS, WORDS, LAYERS = 16384, 53248, 1024, 128256, 111


@dataclass(frozen=True, slots=True)
class ScaleRow:
    """One simulated save."""

    ranks: int
    chunks: int
    simulate_s: float
    """Of the whole simulation."""
    cpu_s: float
    """Processor time of it."""
    peak_mb: float
    """Memory of the simulating process at its peak."""
    plan_s: float
    """The coordinator's part: to join, check and divide the plans of all ranks."""
    plan_message_kb: float
    """That each rank sends."""
    metadata_mb: float
    """The file `.metadata`."""
    answer_mb: float
    """The metadata that each rank is sent, compressed."""
    network_gb: float
    """Through the coordinator, all messages."""
    uncompressed_gb: float
    """The same if each rank were sent the whole manifest, as before it was compressed."""
    coordinator_gb: float
    """Memory that a real coordinator needs at least."""
    connections: int
    met: bool


def measure(ranks: int) -> ScaleRow:
    """Simulate one size in this process."""
    import torch
    from torch.distributed.tensor import Shard

    import pytest_dcp
    from pytest_dcp._engine.simulation import simulate as module

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta", dtype=torch.bfloat16)

    layer = {
        "q": (HIDDEN, HIDDEN), "k": (KEYS, HIDDEN), "v": (KEYS, HIDDEN), "o": (HIDDEN, HIDDEN),
        "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER),
        "norm1": (HIDDEN,), "norm2": (HIDDEN,),
    }  # fmt: skip
    state: dict[str, object] = {
        f"model.layers.{n}.{name}.weight": tensor(*shape)
        for n in range(LAYERS)
        for name, shape in layer.items()
    }
    state["model.embed.weight"] = tensor(WORDS, HIDDEN)
    state["step"] = 1000
    manifests: list[int] = []
    length = module.encoded_length
    module.encoded_length = lambda catalog: manifests.append(length(catalog)) or manifests[-1]
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    found = pytest_dcp.simulate(ranks, {"model.*": [Shard(0)]}, state)
    seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plan, write = found.steps
    sent = found.coordinator.network_bytes
    answers = int(write.from_coordinator.sum())
    return ScaleRow(
        ranks=ranks,
        chunks=found.chunks,
        simulate_s=seconds,
        cpu_s=cpu_s,
        peak_mb=peak / 1e6,
        plan_s=found.coordinator.plan_s,
        plan_message_kb=int(plan.to_coordinator.max()) / 1e3,
        metadata_mb=found.metadata_bytes / 1e6,
        answer_mb=int(write.from_coordinator.max()) / 1e6,
        network_gb=sent / 1e9,
        uncompressed_gb=(sent - answers + manifests[0] * (ranks - 1)) / 1e9,
        coordinator_gb=found.coordinator.memory_bytes / 1e9,
        connections=found.coordinator.connections,
        met=seconds < LIMIT_S and peak < LIMIT_BYTES,
    )


def measure_all(sizes: Sequence[int]) -> list[ScaleRow]:
    """Each size in a process of its own."""
    rows = []
    for ranks in sizes:
        command = [sys.executable, __file__, "--one", str(ranks)]
        done = subprocess.run(command, check=True, capture_output=True, timeout=900)
        rows.append(ScaleRow(**json.loads(done.stdout)))
        print(rows[-1], flush=True)
    return rows


# ---- the picture

WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 200, 64, 44, 96
LETTER_WIDTH = 5.3
COLOURS = ("#1f6feb", "#d1242f", "#6e7781")
Series = tuple[str, list[float]]


def draw(rows: Sequence[ScaleRow]) -> str:
    """The curves as an SVG: four panels, both axes logarithmic."""
    panels: list[tuple[str, list[Series]]] = [
        (
            "seconds",
            [
                ("plan of the coordinator", [row.plan_s for row in rows]),
                ("whole simulation", [row.simulate_s for row in rows]),
            ],
        ),
        (
            "MB",
            [
                ("answer to each rank", [row.answer_mb for row in rows]),
                (".metadata, the index", [row.metadata_mb for row in rows]),
                ("plan that each rank sends", [row.plan_message_kb / 1e3 for row in rows]),
            ],
        ),
        (
            "GB through the coordinator",
            [
                ("all messages", [row.network_gb for row in rows]),
                ("uncompressed", [row.uncompressed_gb for row in rows]),
            ],
        ),
        (
            "coordinator: GB of memory, thousands of sockets",
            [
                ("memory, at least", [row.coordinator_gb for row in rows]),
                ("sockets", [row.connections / 1e3 for row in rows]),
            ],
        ),
    ]
    ranks = [row.ranks for row in rows]
    whole_w, whole_h = 2 * (WIDTH + GAP) + 20, 2 * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole_w} {whole_h}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{whole_w}" height="{whole_h}" fill="white"/>',
    ]
    for number, (title, series) in enumerate(panels):
        x = LEFT + (number % 2) * (WIDTH + GAP)
        y = TOP + (number // 2) * (HEIGHT + GAP)
        parts += _panel(x, y, title, ranks, series)
    return "\n".join([*parts, "</svg>", ""])


def _panel(x: int, y: int, title: str, ranks: Sequence[int], series: Sequence[Series]) -> list[str]:
    import math

    values = [value for _, some in series for value in some]
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)

    def at(rank: float, value: float) -> tuple[float, float]:
        across = math.log(rank / ranks[0]) / math.log(ranks[-1] / ranks[0])
        up = (math.log10(value) - low) / (high - low)
        return x + across * WIDTH, y + HEIGHT - up * HEIGHT

    parts = [f'<text x="{x}" y="{y - 26}" font-weight="bold">{title}</text>']
    for power in range(low, high + 1):
        _, line = at(ranks[0], 10.0**power)
        parts.append(
            f'<path d="M{x} {line:.1f}h{WIDTH}" stroke="#d0d7de"/>'
            f'<text x="{x - 6}" y="{line + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        )
    for rank in ranks:
        across, _ = at(rank, 10.0**low)
        parts.append(
            f'<text x="{across:.1f}" y="{y + HEIGHT + 18}" text-anchor="middle">{rank:,}</text>'
        )
    named_at = x
    for n, (name, some) in enumerate(series):
        places = [at(*one) for one in zip(ranks, some, strict=True)]
        points = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        dots = "".join(
            f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.5"/>' for across, down in places
        )
        parts.append(
            f'<g stroke="{COLOURS[n]}" fill="{COLOURS[n]}">{dots}'
            f'<polyline points="{points}" fill="none" stroke-width="1.5"/></g>'
            f'<text x="{named_at:.0f}" y="{y - 9}" fill="{COLOURS[n]}" font-size="10">{name}</text>'
        )
        named_at += 12 + LETTER_WIDTH * len(name)
    parts.append(f'<text x="{x + WIDTH}" y="{y + HEIGHT + 34}" text-anchor="end">ranks</text>')
    return parts


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", type=int, metavar="RANKS", help="measure one size, print JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, help=f"folder for {FILE_NAME}; default: a new one")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the curves into this file")
    figures.add_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    options = parse(argv)
    if options.one is not None:
        print(json.dumps(asdict(measure(options.one))))
        return 0
    rows = measure_all(QUICK_SIZES if options.quick else SIZES)
    document = {
        "environment": bench_worlds.environment(),
        "quick": options.quick,
        "simulation": [asdict(row) for row in rows],
    }
    folder = options.out or Path(tempfile.mkdtemp(prefix="bench-simulation-"))
    (folder / FILE_NAME).write_text(json.dumps(document, indent=1))
    print(folder / FILE_NAME)
    if options.svg is not None:
        options.svg.write_text(draw(rows))
    if options.guide is not None:
        print(figures.update(options.guide, document))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sys.exit(main())
