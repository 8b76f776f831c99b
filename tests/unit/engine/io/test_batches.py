"""Small parts that are read together: right, counted once, in the file's order."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.format.catalog import BLOCK_BYTES, Catalog, EntryPlaces
from pytest_dcp._engine.io.checked_ranges import ByteCounts, RangeReader
from pytest_dcp._engine.io.copy_plan import Copies
from pytest_dcp._engine.io.progress_observer import Observer, Progress
from pytest_dcp._engine.io.small_reads import (
    AT_A_TIME,
    BATCH,
    FEW,
    ReadKind,
    read_together,
    split_by_read_kind,
)
from pytest_dcp._engine.io.threads import StopFlag, Stopped
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.errors import CheckpointCorruptError

WINDOW_BYTES = 1 << 20
SMALL, LARGE = 100, BLOCK_BYTES + 1


class FakeIn:
    """A file in memory that may cut a read short."""

    request_bytes = 0

    def __init__(self, content: bytes, *, maps: bool, short: int = 0) -> None:
        self.content = content
        self.size = len(content)
        self.maps = maps
        self.short = short
        """How many of the next calls of `read_rows` give less than was asked."""
        self.calls: list[str] = []

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        self.calls.append("window")
        inside = self.maps and offset + nbytes <= self.size
        return memoryview(self.content)[offset : offset + nbytes] if inside else None

    def read_rows(self, offsets: Sequence[int], views: Sequence[memoryview]) -> int:
        self.calls.append("rows")
        self.short -= 1
        cut = self.short >= 0
        return sum(map(self.read_into, offsets, views)) - cut

    def read_into(self, offset: int, view: memoryview) -> int:
        part = self.content[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)


class Part:
    """Chunks of some lengths, one after the other in a file, and memory for each."""

    def __init__(self, sizes: Sequence[int], *, summed: bool = True) -> None:
        rng = np.random.default_rng(7)
        self.data = [rng.integers(0, 256, size, dtype=np.uint8).tobytes() for size in sizes]
        self.targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
        count, lengths = len(sizes), np.array(sizes)
        sums: list[int] = []
        first = [0]
        for some in self.data if summed else ():
            sums += [crc32(some[: at + BLOCK_BYTES]) for at in range(0, len(some), BLOCK_BYTES)]
            first.append(len(sums))
        start = np.cumsum(lengths) - lengths
        places = EntryPlaces(
            files=("f",),
            file=np.zeros(count, np.int32),
            start=start,
            length=lengths,
            data_start=start,
            data_nbytes=lengths,
            first_sum=np.array(first if summed else [0] * (count + 1)),
            sums=np.array(sums, dtype=np.uint32),
        )
        keys = {f"{n:04}": _entry(size) for n, size in enumerate(sizes)}
        self.catalog = Catalog(Index.of(keys), places)
        ones = np.ones((count, 1), np.int64)
        self.rows = np.arange(count)
        self.copies = Copies(
            row=self.rows,
            entry=self.rows,
            shape=lengths[:, None],
            from_stride=ones,
            from_start=np.zeros(count, np.int64),
            to_stride=ones,
            address=np.array([target.data_ptr() for target in self.targets]),
            nbytes=lengths,
            flat=np.ones(count, np.bool_),
            target=self.targets,
        )

    def reader(self, file: FakeIn, verify: str = "auto") -> RangeReader:
        return RangeReader(file, "f", self.catalog, verify, Observer("load"), StopFlag())  # type: ignore[arg-type]

    def file(self, **options: int) -> FakeIn:
        return FakeIn(b"".join(self.data), **{"maps": False, **options})

    @property
    def is_right(self) -> bool:
        pairs = zip(self.targets, self.data, strict=True)
        return all(target.numpy().tobytes() == some for target, some in pairs)


def _entry(size: int) -> TensorStorageMetadata:
    shape = torch.Size((size,))
    chunk = ChunkStorageMetadata(torch.Size((0,)), shape)
    return TensorStorageMetadata(TensorProperties(torch.uint8), shape, [chunk])


@pytest.mark.parametrize("maps", [True, False])
@pytest.mark.parametrize("short", [0, 1, 3])
@pytest.mark.parametrize("kind", [ReadKind.BLOCK, ReadKind.UNCHECKED])
def test_a_short_read_is_repeated_and_counted_once(maps: bool, short: int, kind: ReadKind) -> None:
    part = Part([SMALL + n % 7 for n in range(BATCH + AT_A_TIME + 3)])
    file = part.file(maps=maps, short=short)
    reader = part.reader(file, "auto" if kind is ReadKind.BLOCK else "off")
    read_together(reader, part.copies, part.rows, kind, WINDOW_BYTES)
    nbytes = len(file.content)
    assert part.is_right
    assert reader.tally == ByteCounts(nbytes, nbytes if kind is ReadKind.BLOCK else 0)
    assert reader.observer.done_bytes == nbytes
    assert ("rows" in file.calls) is not maps


def test_entries_without_sums_are_not_mapped_and_take_one_call() -> None:
    part = Part([SMALL] * BATCH, summed=False)
    file = part.file(maps=True)
    read_together(part.reader(file), part.copies, part.rows, ReadKind.UNCHECKED, WINDOW_BYTES)
    assert part.is_right
    assert file.calls == ["rows"]


@pytest.mark.parametrize("maps", [True, False])
def test_damage_is_named_by_entry_and_offset(maps: bool) -> None:
    part = Part([SMALL] * BATCH)
    file = part.file(maps=maps)
    file.content = file.content[: 70 * SMALL + 5] + b"?" + file.content[70 * SMALL + 6 :]
    with pytest.raises(CheckpointCorruptError, match="checksum differs") as caught:
        read_together(part.reader(file), part.copies, part.rows, ReadKind.BLOCK, WINDOW_BYTES)
    assert (caught.value.entry, caught.value.offset) == ("0070", 70 * SMALL)


@pytest.mark.parametrize("summed", [True, False])
def test_a_file_that_ends_early_is_named_where_it_ends(summed: bool) -> None:
    part = Part([SMALL] * BATCH, summed=summed)
    file = part.file(maps=True)
    file.content = file.content[: 70 * SMALL + 5]
    file.size = len(file.content)
    kind = ReadKind.BLOCK if summed else ReadKind.UNCHECKED
    with pytest.raises(CheckpointCorruptError, match="ends here") as caught:
        read_together(part.reader(file), part.copies, part.rows, kind, WINDOW_BYTES)
    assert (caught.value.entry, caught.value.offset) == ("0070", 70 * SMALL + 5)


def test_no_more_than_some_are_read_between_two_looks_at_whether_to_go_on() -> None:
    part = Part([SMALL] * BATCH)
    seen: list[Progress] = []
    reader = part.reader(part.file())
    reader.observer = Observer("load", progress=seen.append, every_s=0.0)
    read_together(reader, part.copies, part.rows, ReadKind.BLOCK, WINDOW_BYTES)
    assert [one.done_bytes // SMALL for one in seen] == list(range(AT_A_TIME, BATCH + 1, AT_A_TIME))
    reader.stop.set()
    with pytest.raises(Stopped):
        read_together(reader, part.copies, part.rows, ReadKind.BLOCK, WINDOW_BYTES)


@pytest.mark.parametrize(
    ("sizes", "verify", "expected"),
    [
        ([SMALL] * 3, "auto", [(ReadKind.BLOCK, 3)]),
        ([SMALL] * 3, "off", [(ReadKind.UNCHECKED, 3)]),
        ([LARGE] * 3, "off", [(ReadKind.ALONE, 3)]),
        ([SMALL, LARGE] * 3, "auto", [(ReadKind.ALONE, 6)]),
        (
            [*[SMALL] * FEW, LARGE, *[SMALL] * (FEW - 1), LARGE, *[SMALL] * (FEW + 1)],
            "full",
            [
                (ReadKind.BLOCK, FEW),
                (ReadKind.ALONE, 1),
                (ReadKind.BLOCK, FEW - 1),
                (ReadKind.ALONE, 1),
                (ReadKind.BLOCK, FEW + 1),
            ],
        ),
    ],
)
def test_parts_stay_in_the_files_order(
    sizes: list[int], verify: str, expected: list[tuple[ReadKind, int]]
) -> None:
    part = Part(sizes)
    found = list(split_by_read_kind(part.catalog, part.copies, part.rows, verify))  # type: ignore[arg-type]
    assert [(kind, len(rows)) for kind, rows in found] == expected
    assert np.concatenate([rows for _, rows in found]).tolist() == part.rows.tolist()
