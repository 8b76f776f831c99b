from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.io import checked_ranges as ranges
from pytest_dcp._engine.io.checked_ranges import ByteCounts, RangeReader
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.threads import StopFlag, Stopped
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.errors import CheckpointCorruptError
from support.tilings import fewer

LEAD = 5
"""Bytes of the file before the entry's data."""
MODES = ["auto", "full", "off"]


class FakeIn:
    """A file in memory."""

    request_bytes = 0

    def __init__(self, content: bytes, *, maps: bool = False) -> None:
        self.content = content
        self.size = len(content)
        self.maps = maps
        self.calls: list[int] = []
        """The length of each read."""

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        return memoryview(bytearray(self.content[offset : offset + nbytes]))

    def read_rows(self, offsets, views) -> int:
        return sum(map(self.read_into, offsets, views))

    def read_into(self, offset: int, view: memoryview) -> int:
        self.calls.append(len(view))
        part = self.content[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)


def data_of(nbytes: int) -> bytes:
    return bytes(at * 37 % 251 for at in range(nbytes))


def catalog_of(data: bytes, block: int, *, sums: bool = True) -> Catalog:
    size = torch.Size((len(data),))
    chunk = ChunkStorageMetadata(torch.Size((0,)), size)
    entry = TensorStorageMetadata(TensorProperties(torch.uint8), size, [chunk])
    running = [crc32(data[: at + block]) for at in range(0, len(data), block)] if sums else []
    places = EntryPlaces(
        files=("f",),
        file=np.zeros(1, np.int32),
        start=np.zeros(1, np.int64),
        length=np.array([LEAD + len(data) + 3]),
        data_start=np.array([LEAD]),
        data_nbytes=np.array([len(data)]),
        first_sum=np.array([0, len(running)]),
        sums=np.array(running, dtype=np.uint32),
        block_bytes=block,
    )
    return Catalog(Index.of({"w": entry}), places)


def reader_of(
    data: bytes, block: int, verify, *, stored: bytes | None = None, maps: bool = False, **options
):
    content = b"<" * LEAD + (data if stored is None else stored) + b">>>"
    return RangeReader(
        FakeIn(content, maps=maps),
        "f",
        catalog_of(data, block, **options),
        verify,
        Observer("load"),
        StopFlag(),
    )


def verified(low: int, high: int, nbytes: int, block: int, verify: str, extend_from: int) -> range:
    """The bytes that a checksum vouches for: of the blocks inside the range, or that it touches."""
    if verify == "off" or low == high:
        return range(0)
    blocks = [(at, min(at + block, nbytes)) for at in range(0, nbytes, block)]
    if verify == "full" or high - low >= extend_from or nbytes <= block:
        found = [(a, b) for a, b in blocks if a < high and b > low]
    else:
        found = [(a, b) for a, b in blocks if a >= low and b <= high]
    return range(found[0][0], found[-1][1]) if found else range(0)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(ranges, "PIECE_BYTES", 7)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("verify", MODES)
@pytest.mark.parametrize(("nbytes", "block"), [(40, 16), (32, 16), (11, 16), (1, 1), (0, 16)])
def test_every_range_is_read_as_it_is_sliced(nbytes, block, verify):
    data = data_of(nbytes)
    for low in range(nbytes + 1):
        for high in range(low, nbytes + 1):
            reader = reader_of(data, block, verify)
            view = memoryview(bytearray(high - low))
            reader.read(0, low, view)
            assert bytes(view) == data[low:high]
            checked = verified(low, high, nbytes, block, verify, 1 << 60)
            vouched = len(set(checked) & set(range(low, high)))
            assert reader.tally.verified == vouched
            assert reader.tally.read >= high - low
            assert reader.observer.done_bytes == high - low


@given(
    st.integers(1, 50),
    st.sampled_from([1, 8, 16, 64]),
    st.sampled_from(MODES),
    st.sampled_from([10, 1 << 60]),
    st.booleans(),
    st.data(),
)
@fewer(4)
def test_a_flipped_bit_is_found_where_it_is_checked_and_there_is_no_false_alarm(
    nbytes, block, verify, extend_from, maps, data
):
    whole = data_of(nbytes)
    low = data.draw(st.integers(0, nbytes - 1))
    high = data.draw(st.integers(low + 1, nbytes))
    checked = verified(low, high, nbytes, block, verify, extend_from)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PIECE_BYTES", "WINDOW_PIECE_BYTES"):
            patch.setattr(ranges, name, data.draw(st.sampled_from([3, 16, 100])))
        patch.setattr(ranges, "EXTEND_FROM_BYTES", extend_from)
        for at in range(nbytes):
            broken = bytearray(whole)
            broken[at] ^= 1 << (at % 8)
            reader = reader_of(whole, block, verify, stored=bytes(broken), maps=maps)
            view = memoryview(bytearray(high - low))
            if maps:
                view[:] = reader.window(0, low, high - low)
            take = reader.check if maps else reader.read
            if at in checked:
                with pytest.raises(CheckpointCorruptError, match="checksum") as caught:
                    take(0, low, view)
                assert caught.value.offset == LEAD + at // block * block
                assert (caught.value.file, caught.value.entry) == ("f", "w")
            else:
                take(0, low, view)
                assert bytes(view) == broken[low:high]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("verify", "sums", "request_bytes", "calls"),
    [
        ("auto", True, 0, [7, 7, 7, 7, 2]),
        ("auto", True, 20, [20, 10]),
        ("off", True, 0, [30]),
        ("auto", False, 0, [30]),
    ],
)
def test_ranges_are_read_in_pieces_only_to_be_summed(verify, sums, request_bytes, calls):
    reader = reader_of(data_of(30), 10, verify, sums=sums)
    reader.file.request_bytes = request_bytes
    reader.read(0, 0, memoryview(bytearray(30)))
    assert reader.file.calls == calls


@pytest.mark.parametrize("verify", MODES)
def test_data_without_sums_is_read_unchecked(verify):
    reader = reader_of(data_of(40), 16, verify, sums=False)
    view = memoryview(bytearray(30))
    reader.read(0, 3, view)
    assert bytes(view) == data_of(40)[3:33]
    assert reader.tally == ByteCounts(30, 0)


@pytest.mark.parametrize("verify", MODES)
def test_a_range_past_the_data_is_refused(verify):
    with pytest.raises(CheckpointCorruptError, match="past the data, which has 40"):
        reader_of(data_of(40), 16, verify).read(0, 38, memoryview(bytearray(3)))


@pytest.mark.parametrize("verify", MODES)
@pytest.mark.parametrize(("nbytes", "low"), [(40, 0), (40, 20), (11, 0)])
def test_a_file_that_is_cut_short_is_reported_with_the_place(nbytes, low, verify):
    reader = reader_of(data_of(nbytes), 16, verify)
    reader.file = FakeIn(reader.file.content[: LEAD + nbytes - 4])
    with pytest.raises(CheckpointCorruptError, match="the file ends here") as caught:
        reader.read(0, low, memoryview(bytearray(nbytes - low)))
    assert caught.value.offset == LEAD + nbytes - 4


def test_damage_that_is_gone_when_it_is_read_again_is_still_reported():
    class Flickers(FakeIn):
        reads = 0

        def read_into(self, offset: int, view: memoryview) -> int:
            got = super().read_into(offset, view)
            self.reads += 1
            if self.reads == 1:
                view[0] ^= 1
            return got

    reader = reader_of(data_of(40), 16, "auto")
    reader.file = Flickers(reader.file.content)
    with pytest.raises(CheckpointCorruptError, match="once and not when read again"):
        reader.read(0, 0, memoryview(bytearray(40)))


@pytest.mark.parametrize("verify", MODES)
def test_a_window_is_checked_as_a_read_is(verify):
    data = bytearray(data_of(48))
    data[20] ^= 4
    reader = reader_of(data_of(48), 16, verify, stored=bytes(data), maps=True)
    reader.check(0, 32, reader.window(0, 32, 16))
    assert reader.tally == ByteCounts(16, 0 if verify == "off" else 16)
    if verify == "off":
        reader.check(0, 16, reader.window(0, 16, 32))
        return
    with pytest.raises(CheckpointCorruptError, match="checksum") as caught:
        reader.check(0, 16, reader.window(0, 16, 32))
    assert caught.value.offset == LEAD + 16


def test_a_checkpoint_without_sums_is_not_mapped():
    reader = reader_of(data_of(40), 16, "auto", sums=False, maps=True)
    assert reader.window(0, 0, 40) is None


@pytest.mark.parametrize("cut", [0, 1])
def test_rows_are_read_and_a_file_that_ends_too_early_is_reported(cut):
    data = data_of(40)
    reader = reader_of(data, 16, "auto", stored=data[: 40 - cut * 10])
    reader.file.content = reader.file.content[:-3]
    views = [memoryview(bytearray(4)) for _ in range(3)]
    if cut:
        with pytest.raises(CheckpointCorruptError, match="ends here"):
            reader.rows(0, [0, 16, 36], views)
    else:
        reader.rows(0, [0, 16, 36], views)
        assert [bytes(view) for view in views] == [data[at : at + 4] for at in (0, 16, 36)]
        assert reader.tally == ByteCounts(12, 0)


@pytest.mark.parametrize("verify", ["auto", "off"])
def test_a_long_read_looks_at_whether_to_go_on(verify):
    reader = reader_of(data_of(40), 16, verify)
    reader.stop.set()
    with pytest.raises(Stopped):
        reader.read(0, 0, memoryview(bytearray(40)))


def test_tallies_add_up():
    total = ByteCounts(1, 2)
    total.add(ByteCounts(10, 20))
    assert total == ByteCounts(11, 22)
