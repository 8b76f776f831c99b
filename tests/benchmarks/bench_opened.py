"""Times opening, comparing and converting checkpoints: ours, torch's and safetensors', in turn.

    python tests/benchmarks/bench_opened.py [--rounds N] [--only NAME]... [--quick] [--folder DIR]
        [--out DIR] [--guide PAGE]

One process. Every method of a case runs once, then once a round, in turn; times are medians, and
only ratios within one run mean anything. The peak is the resident memory above that before the
call, with mapped pages of files. Files are in the page cache. Conversions of ours sync their
target before they return, which torch's and safetensors' do not.

Needs the extra `test`.
"""

import ctypes
import fnmatch
import importlib
import shutil
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
import numpy as np
import reports
import table
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import StorageMeta, TensorProperties

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format import metadata_file
from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.entry import tensor_frame
from pytest_dcp._engine.lazy_reading.comparison import compare_checkpoints
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.checkpoint import convert

torch_dcp: Any = importlib.import_module("torch.distributed.checkpoint")
torch_formats: Any = importlib.import_module("torch.distributed.checkpoint.format_utils")

ROUNDS = 5
FILE_NAME = "bench_opened.json"
MIB = 1 << 20
NAME = "layers.7.weight"

Method = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One method of a case."""

    case: str
    method: str
    ms: float
    cpu_ms: float
    """Of all threads: what other processes do shows in `ms` alone."""
    peak_mib: float
    """Above the memory before the call."""


def open_cases(folder: Path, scale: int) -> Iterator[tuple[str, dict[str, Method]]]:
    """Opening, and one part of a tensor."""
    state = {f"layers.{n}.weight": torch.randn(256, 64) for n in range(1000 // scale)}
    dcp.save(state, checkpoint_id=folder / "ours")
    torch_dcp.save(state, checkpoint_id=folder / "torchs")
    save_file(state, folder / "one.safetensors")

    def ours(name: str) -> Method:
        def run() -> object:
            with dcp.open(folder / name) as opened:
                lazy: Any = opened[NAME]
                return lazy[10:20]

        return run

    def safetensors() -> object:
        with safe_open(folder / "one.safetensors", "pt") as opened:
            return opened.get_slice(NAME)[10:20]

    def torchs(name: str) -> Method:
        def run() -> object:
            target = {NAME: torch.empty(256, 64)}
            torch_dcp.load(target, checkpoint_id=folder / name, no_dist=True)
            return target[NAME][10:20]

        return run

    yield (
        f"open, ten rows of one of {len(state):,} tensors",
        {
            "ours, own checkpoint": ours("ours"),
            "ours, torch's checkpoint": ours("torchs"),
            "ours, safetensors": ours("one.safetensors"),
            "safetensors": safetensors,
            "torch, load of the tensor": torchs("torchs"),
        },
    )
    chunks = 1000 * (1000 // scale)
    write_large_index(folder / "large", chunks)

    yield (
        f"open, a tensor of 1,000 shards in an index of {chunks:,} chunks",
        {"ours, own checkpoint": lambda: read_one(folder / "large")},
    )
    yield (
        f"read_metadata of {chunks:,} chunks",
        {"ours": lambda: dcp.FileSystemReader(folder / "large").read_metadata()},
    )
    yield (
        f"read_metadata of {chunks:,} chunks, then all of its columns",
        {"ours": lambda: read_columns(folder / "large")},
    )


def read_one(folder: Path) -> object:
    """Open a checkpoint, and read one of its tensors."""
    with dcp.open(folder) as opened:
        lazy: Any = opened["layers.3.weight"]
        return lazy.tensor()


def read_columns(folder: Path) -> object:
    """What planning a load of all tensors needs of the index."""
    metadata: Any = dcp.FileSystemReader(folder).read_metadata()
    index, places = metadata.state_dict_metadata.source, metadata.storage_data.catalog.places
    return index.offset.sum() + places.sums.sum(dtype=np.int64)


def write_large_index(folder: Path, chunks: int) -> None:
    """A checkpoint of `chunks` rows of 16 elements, in tensors of 1,000 rows and in 16 files."""
    keys, files = chunks // 1000, 16
    data = np.arange(16, dtype=np.float32).tobytes()
    frame = tensor_frame(torch.float32, (1, 16))
    row = np.arange(chunks)
    offset = np.stack([row % 1000, np.zeros_like(row)], axis=1)
    index = Index(
        fqns=tuple(f"layers.{n}.weight" for n in range(keys)),
        property_of=np.zeros(keys, np.int32),
        properties=(TensorProperties(torch.float32),),
        ndim=np.full(keys, 2, np.int16),
        size=np.tile(np.array([[1000, 16]]), (keys, 1)),
        first=np.arange(keys + 1) * 1000,
        offset=offset,
        shape=np.tile(np.array([[1, 16]]), (chunks, 1)),
    )
    crc = metadata_file.crc32(data)
    start = row // files * frame.length
    places = EntryPlaces(
        files=tuple(f"__{n}_0.distcp" for n in range(files)),
        file=(row % files).astype(np.int32),
        start=start,
        length=np.full(chunks, frame.length),
        data_start=start + len(frame.head),
        data_nbytes=np.full(chunks, 64),
        first_sum=np.arange(chunks + 1),
        sums=np.full(chunks, crc, np.uint32),
    )
    folder.mkdir()
    entries = (frame.head + data + frame.tail(crc)) * (chunks // files)
    for name in places.files:
        (folder / name).write_bytes(entries)
    catalog = Catalog(index, places, storage_meta=StorageMeta(save_id="large"))
    (folder / ".metadata").write_bytes(b"".join(metadata_file.encode(catalog)))


def look_cases(folder: Path, scale: int) -> Iterator[tuple[str, dict[str, Method]]]:
    """What `ls` and `diff` do, without the printing. Torch has neither: a program reads the index,
    or loads both checkpoints."""
    state = {f"layers.{n}.weight": torch.randn(256, 64) for n in range(1000 // scale)}
    chunks = 256_000 // scale // 1000 * 1000
    dcp.save(state, checkpoint_id=folder / "names")
    torch_dcp.save(state, checkpoint_id=folder / "torchs-names")
    for name in ("large-a", "large-b"):
        write_large_index(folder / name, chunks)

    def list_names(name: str) -> Method:
        def run() -> object:
            with dcp.open(folder / name) as opened:
                return [opened[one].table_row() for one in opened]

        return run

    def read_metadata(*names: str) -> Method:
        def run() -> object:
            found = [torch_dcp.FileSystemReader(folder / name).read_metadata() for name in names]
            return [
                (fqn, getattr(facts, "size", None), len(getattr(facts, "chunks", ())))
                for metadata in found
                for fqn, facts in metadata.state_dict_metadata.items()
            ]

        return run

    def compare_equal() -> None:
        with dcp.open(folder / "large-a") as one, dcp.open(folder / "large-b") as other:
            if compare_checkpoints(one, other) or one.bytes_read:
                raise RuntimeError("the checkpoints are equal by their checksums")

    yield (
        f"ls, {len(state):,} tensors",
        {
            "ours, own checkpoint": list_names("names"),
            "ours, torch's checkpoint": list_names("torchs-names"),
            "torch, read_metadata and a loop": read_metadata("torchs-names"),
        },
    )
    yield (
        f"ls, {chunks:,} chunks",
        {
            "ours": list_names("large-a"),
            "torch, read_metadata and a loop": read_metadata("large-a"),
        },
    )
    yield (
        f"diff, equal, {chunks:,} chunks",
        {
            "ours, by checksums": compare_equal,
            "torch, read_metadata of both": read_metadata("large-a", "large-b"),
        },
    )
    yield from diff_cases(folder, scale)


def diff_cases(folder: Path, scale: int) -> Iterator[tuple[str, dict[str, Method]]]:
    """256 MiB of which one tensor differs."""
    state = {f"layers.{n}.weight": torch.randn(1024, 1024 // scale) for n in range(64)}
    mib = sum(tensor.nbytes for tensor in state.values()) // MIB
    for engine, name in ((dcp, "d"), (torch_dcp, "torchs-d")):
        engine.save(state, checkpoint_id=folder / f"{name}1")
        changed = state | {NAME: state[NAME] + 1}
        engine.save(changed, checkpoint_id=folder / f"{name}2")

    def load_both(name: str) -> Method:
        def run() -> object:
            sides = []
            for n in (1, 2):
                target = {key: torch.empty_like(tensor) for key, tensor in state.items()}
                torch_dcp.load(target, checkpoint_id=folder / f"{name}{n}", no_dist=True)
                sides.append(target)
            return [key for key in state if not torch.equal(sides[0][key], sides[1][key])]

        return run

    yield (
        f"diff, {mib} MiB, one tensor of 64 differs",
        {
            "ours, by checksums": lambda: compare(folder / "d1", folder / "d2"),
            "ours, torch's checkpoints": lambda: compare(
                folder / "torchs-d1", folder / "torchs-d2"
            ),
            "torch, loads of both": load_both("torchs-d"),
        },
    )


def compare(first: Path, second: Path) -> object:
    """The differences that `diff` prints."""
    with dcp.open(first) as one, dcp.open(second) as other:
        return compare_checkpoints(one, other)


def convert_cases(folder: Path, scale: int) -> Iterator[tuple[str, dict[str, Method]]]:
    """Conversions of 256 MiB."""
    state = {f"layers.{n}.weight": torch.randn(1024, 1024 // scale) for n in range(64)}
    dcp.save(state, checkpoint_id=folder / "source")
    torch.save(state, folder / "source.pt")
    mib = sum(tensor.nbytes for tensor in state.values()) // MIB

    def load_and_save() -> None:
        target = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        torch_dcp.load(target, checkpoint_id=folder / "source", no_dist=True)
        save_file(target, folder / "b.safetensors")

    yield (
        f"{mib} MiB, DCP to torch.save",
        {
            "ours": lambda: convert.to_torch_save(folder / "source", folder / "a.pt"),
            "torch": lambda: torch_formats.dcp_to_torch_save(folder / "source", folder / "b.pt"),
        },
    )
    yield (
        f"{mib} MiB, torch.save to DCP",
        {
            "ours": lambda: convert.to_dcp(folder / "source.pt", folder / "a"),
            "torch": lambda: torch_formats.torch_save_to_dcp(folder / "source.pt", folder / "b"),
        },
    )
    yield (
        f"{mib} MiB, DCP to safetensors",
        {
            "ours": lambda: convert.to_safetensors(folder / "source", folder / "a.safetensors"),
            "torch's load, safetensors' save": load_and_save,
        },
    )


def measure(case: str, methods: dict[str, Method], rounds: int) -> list[Row]:
    """The medians of each method."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    cpu_times: dict[str, list[float]] = {name: [] for name in methods}
    peaks: dict[str, list[float]] = {name: [] for name in methods}
    for run in methods.values():
        run()
    for _ in range(rounds):
        for name, run in methods.items():
            # Memory that was freed, and that the heap keeps, would hide the next peak.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
            before = _resident("VmRSS")
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
            cpu_times[name].append(1000 * (time.process_time() - cpu_start))
            peaks[name].append(max(0.0, _resident("VmHWM") - before))
    return [
        Row(case, name, *(statistics.median(found[name]) for found in (times, cpu_times, peaks)))
        for name in methods
    ]


def _resident(field: str) -> float:
    """MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, write the JSON."""
    parser = reports.make_parser(__doc__, FILE_NAME)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--only", action="append", metavar="NAME", help="a pattern of cases")
    parser.add_argument("--quick", action="store_true", help="small states, one round")
    options = parser.parse_args(argv)
    rounds, scale = (1, 16) if options.quick else (options.rounds, 1)
    warnings.simplefilter("ignore")  # saves of one process, and overwriting, are intended here
    work = Path(tempfile.mkdtemp(prefix="bench-opened-", dir=options.folder))
    rows: list[Row] = []
    try:
        for cases in (open_cases, look_cases, convert_cases):
            for case, methods in cases(work, scale):
                if any(fnmatch.fnmatch(case, one) for one in options.only or ["*"]):
                    rows += measure(case, methods, rounds)
    finally:
        shutil.rmtree(work)
    report = {
        "environment": bench_worlds.environment(),
        "quick": options.quick,
        "opened": [asdict(row) for row in rows],
    }
    columns = ("case", "method", "ms", "cpu, ms", "peak, MiB")
    cells = [
        [row.case, row.method, *(f"{n:,.1f}" for n in (row.ms, row.cpu_ms, row.peak_mib))]
        for row in rows
    ]
    table.show(Console(width=120), f"medians of {rounds} rounds", columns, cells)
    reports.save(report, options, FILE_NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
