"""Readers beside a writer that replaces their checkpoint again and again: every load is one save.

A process overwrites a folder back to back; the ranks of a world load it meanwhile, in a loop. A
load that raises is a failure, and one whose values are of several saves, or whose ranks have
different ones, is mixed; both must never be.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine_ranks import World, run_world

import pytest_dcp.checkpoint as dcp

OVERWRITES = 1_000
QUICK_PART = 20
DEADLINE_S = 600.0
TENSORS = 8
ELEMENTS = 4_096
FINISHED = "finished"
"""A file beside the checkpoint, once the writer has written its last."""


@dataclass(frozen=True, slots=True)
class Beside:
    """How the loads beside the overwrites went."""

    case: str
    ranks: int
    overwrites: int
    loads: int
    failures: int
    mixed: int
    slowest_ms: float
    """The longest load."""
    first_failure: str
    met: bool


FORMATS = {
    "a folder": (dcp.FileSystemWriter, dcp.FileSystemReader),
    "a folder, unsynced": (partial(dcp.FileSystemWriter, sync_files=False), dcp.FileSystemReader),
    "a Hugging Face folder": (dcp.HuggingFaceStorageWriter, dcp.HuggingFaceStorageReader),
}


def state_of(fill: float) -> dict[str, torch.Tensor]:
    """The state whose values are all `fill`."""
    return {f"t{n}": torch.full((ELEMENTS,), fill) for n in range(TENSORS)}


def measure(*, quick: bool = False) -> list[Beside]:
    """How readers of one and of two ranks fare, in each format."""
    count = OVERWRITES // QUICK_PART if quick else OVERWRITES
    return [_measure(name, ranks, count) for name in FORMATS for ranks in (1, 2)]


def _measure(name: str, ranks: int, overwrites: int) -> Beside:
    program = [sys.executable, str(Path(__file__).resolve())]
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-overwrites-")))
        folder = root / "checkpoint"
        save(name, folder, 0)
        writer = stack.enter_context(
            subprocess.Popen([*program, name, str(folder), str(overwrites)])
        )
        stack.callback(writer.kill)
        found = run_world(partial(read, name, folder), ranks)
        if writer.wait(DEADLINE_S):
            raise RuntimeError(f"the writer exited with {writer.returncode}")
    clean = not found["failures"] and not found["mixed"] and found["loads"] > 0
    return Beside(case=name, ranks=ranks, overwrites=overwrites, **found, met=clean)


def save(name: str, folder: Path, fill: int) -> None:
    """Overwrite the checkpoint."""
    make: Any = FORMATS[name][0]
    dcp.save(state_of(float(fill)), storage_writer=make(str(folder)), no_dist=True)


def read(name: str, folder: Path, world: World) -> dict[str, object]:
    """Load until the writer has finished, and once more; returns the outcomes. Collective."""
    make: Any = FORMATS[name][1]
    loads = failures = mixed = 0
    slowest_ms, first = 0.0, ""
    more = True
    while more:
        more = world.most(not (folder.parent / FINISHED).exists()) > 0
        target = state_of(-1.0)
        began_s = time.perf_counter()
        try:
            dcp.load(target, storage_reader=make(str(folder)))
        except dcp.CheckpointException as error:
            failures, first = failures + 1, first or str(error)[:300]
            continue
        finally:
            slowest_ms = max(slowest_ms, (time.perf_counter() - began_s) * 1e3)
        loads += 1
        fills = torch.cat(list(target.values()))
        low, high = -world.most(-fills.min().item()), world.most(fills.max().item())
        mixed += low != high
    return {
        "loads": loads,
        "failures": failures,
        "mixed": mixed,
        "slowest_ms": world.most(slowest_ms),
        "first_failure": first,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Overwrite a folder `count` times, in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=tuple(FORMATS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        for fill in range(1, options.count + 1):
            save(options.name, options.folder, fill)
    finally:
        (options.folder.parent / FINISHED).touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
