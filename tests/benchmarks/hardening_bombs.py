"""Memory and time to open a hostile checkpoint, against the limit for its size.

Every folder is made and opened in a process of its own. The peak of resident memory is counted from
just before the folder is opened, after all imports. The limit is the manual's, for the stored
bytes. A hostile folder must be refused within it, an honest one opened.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import hardening_makers as makers
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT

MIB = 1 << 20
DEADLINE_S = 300.0
QUICK_SCALE = 1 / 8
MOST_BYTES = 6 << 30
"""Of memory that a process may take: a bomb that goes off must not take the machine along."""
BASE_BYTES = 16 * MIB
"""Overhead of any load: threads, staging memory, modules that the first load imports."""


@dataclass(frozen=True, slots=True)
class Bomb:
    """A folder to be opened."""

    make: makers.Maker
    open: Callable[[Path], object]
    hostile: bool = True


@dataclass(frozen=True, slots=True)
class Opened:
    """Cost and outcome of opening one folder."""

    case: str
    stored_kib: float
    """On the disk, holes left out."""
    took_mib: float
    """Peak of resident memory, above the process's memory before."""
    limit_mib: float
    """The limit for this number of stored bytes, plus the overhead of any load."""
    seconds: float
    outcome: str
    """opened, or the class of the error; killed: it took more than the process may."""
    met: bool
    """Within the limit, and refused if it is hostile, else opened."""


def load_tensor(folder: Path) -> None:
    """Load a tensor of a checkpoint of ours."""
    dcp.load({"w": torch.zeros(4)}, checkpoint_id=folder, no_dist=True)


def load_value(folder: Path) -> None:
    """Load a value of a checkpoint of ours."""
    dcp.load({"v": None}, checkpoint_id=folder, no_dist=True)


def load_safetensors(folder: Path) -> None:
    """Load a tensor of a folder of safetensors files."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load({"a": torch.zeros(4)}, storage_reader=reader, no_dist=True)


def read_metadata(folder: Path) -> None:
    """Open the index of a checkpoint."""
    dcp.FileSystemReader(folder).read_metadata()


def _chunks(make: Callable[[Path, float, int], None], chunks: int) -> Bomb:
    return Bomb(partial(make, chunks=chunks), read_metadata, hostile=False)


BOMBS = {
    "sparse .metadata of 1.9 GiB": Bomb(makers.make_sparse_metadata, load_tensor),
    "sparse manifest of 3 GiB": Bomb(makers.make_sparse_manifest, load_tensor),
    "manifest header of 15 MiB": Bomb(makers.make_manifest_header, load_tensor),
    "zstd value of 512 MiB": Bomb(partial(makers.make_compressed_value, mib=512), load_value),
    "safetensors header of lists": Bomb(makers.make_header_of_lists, load_safetensors),
    "safetensors header of strings": Bomb(makers.make_header_of_strings, load_safetensors),
    "HF index of 10^6 files": Bomb(makers.make_index_of_names, load_safetensors),
    "Counter of colliding keys": Bomb(makers.make_colliding_counter, load_value),
    "bytearray(2**31) in a pickle": Bomb(makers.make_bytearray, load_value),
    "zstd value of 32 MiB": Bomb(
        partial(makers.make_compressed_value, mib=32), load_value, hostile=False
    ),
    "256,000 chunks": _chunks(makers.make_chunks, 256_000),
    "1,000,000 chunks": _chunks(makers.make_chunks, 1_000_000),
    "256,000 chunks of torch": _chunks(makers.make_chunks_of_torch, 256_000),
}


def measure(*, quick: bool = False) -> list[Opened]:
    """Open each folder, in a process of its own.

    Raises CalledProcessError when one cannot be made.
    """
    scale = QUICK_SCALE if quick else 1.0
    return [_measure(name, scale) for name in BOMBS]


def _measure(name: str, scale: float) -> Opened:
    program = [sys.executable, str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory(prefix="bench-bomb-") as folder:
        subprocess.run([*program, "make", name, folder, str(scale)], check=True, timeout=DEADLINE_S)
        stored = sum(_stored_bytes(path) for path in Path(folder).iterdir())
        began_s = time.perf_counter()
        try:
            process = subprocess.run(
                [*program, "open", name, folder], stdout=subprocess.PIPE, timeout=DEADLINE_S
            )
            answer = json.loads(process.stdout) if not process.returncode else {}
        except subprocess.TimeoutExpired:
            answer = {}
        seconds = time.perf_counter() - began_s
    took = answer.get("took_bytes", MOST_BYTES)
    outcome = answer.get("outcome", "killed")
    limit = BASE_BYTES + DEFAULT_LIMIT.of(stored)
    expected = outcome not in ("opened", "killed", "MemoryError")
    if not BOMBS[name].hostile:
        expected = outcome == "opened"
    return Opened(
        name,
        stored / 1024,
        took / MIB,
        limit / MIB,
        answer.get("seconds", seconds),
        outcome,
        expected and took <= limit,
    )


def _stored_bytes(path: Path) -> int:
    return min(path.stat().st_size, path.stat().st_blocks * 512)


def make(name: str, folder: Path, scale: float) -> None:
    """Make the folder of this case."""
    BOMBS[name].make(folder, scale)
    (folder / "old trailer").unlink(missing_ok=True)
    for path in folder.iterdir():
        with path.open() as file:
            os.fsync(file.fileno())  # a file that is still in memory occupies no blocks


def open_here(name: str, folder: Path) -> dict[str, object]:
    """Open the folder in this process, after a small one of the same kind has been."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    with tempfile.TemporaryDirectory() as small:
        dcp.save({"w": torch.ones(4), "v": 1}, checkpoint_id=small, no_dist=True)
        load_tensor(Path(small))
        load_value(Path(small))
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    began_s, outcome = time.perf_counter(), "opened"
    try:
        BOMBS[name].open(folder)
    except dcp.CheckpointException as error:
        ((cause, _),) = error.failures.values()
        outcome = type(cause).__name__
    except Exception as error:  # noqa: BLE001 # reported
        outcome = type(error).__name__
    seconds = time.perf_counter() - began_s
    took = _resident_bytes("VmHWM") - before
    return {"seconds": seconds, "took_bytes": took, "outcome": outcome}


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """One step of one case, in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("make", "open"))
    parser.add_argument("name", choices=tuple(BOMBS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("scale", type=float, nargs="?", default=1.0)
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.step == "make":
        make(options.name, options.folder, options.scale)
    else:
        print(json.dumps(open_here(options.name, options.folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
