"""Entries: written as by torch.save, read from files of any torch, all others refused.

The oracles are torch.save, torch.load and the standard library's zipfile.
"""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_dcp._engine.format.entry import pickle_of, tensor_frame, value_entry
from pytest_dcp._engine.format.entry_locator import TensorRecord, locate
from pytest_dcp._engine.format.zip_archive import Source
from pytest_dcp.errors import CheckpointCorruptError

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

DTYPES = [
    *[torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64],
    *[torch.uint16, torch.uint32, torch.uint64],
    *[torch.float16, torch.bfloat16, torch.float32, torch.float64],
    *[torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz],
    *[torch.float8_e8m0fnu, torch.float4_e2m1fn_x2],
    *[torch.complex32, torch.complex64, torch.complex128],
    *[torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2],
]
SHAPES = [
    *[(), (0,), (1,), (7,), (255,), (256,), (65535,), (65536,)],
    *[(0, 3), (3, 0), (2, 3), (1, 1), (2, 0, 3), (0, 0, 0), (3, 1, 5), (64, 256, 2)],
    *[(2, 3, 4, 5), (0, 1, 2, 3), (1,) * 5, (1,) * 40],
]
BIG = [2**32 - 900, 2**32 - 2, 2**32 - 1, 2**32 + 5]
"""Bytes of data: the directory, the records behind the data, or the data need 64-bit fields."""

LARGEST_READ = 128 << 10

dtypes = st.sampled_from(DTYPES)
shapes = st.lists(st.integers(0, 6), max_size=5).map(tuple)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def loaded(entry: bytes) -> Any:
    return torch.load(io.BytesIO(entry), weights_only=True)


def tensor_of(dtype: torch.dtype, shape: Sequence[int], data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def some_bytes(nbytes: int) -> bytes:
    return bytes(i % 2 for i in range(nbytes))  # 0 and 1: bool has no other values


def emitted(dtype: torch.dtype, shape: tuple[int, ...], data: bytes) -> bytes:
    frame = tensor_frame(dtype, shape)
    assert frame.data_nbytes == len(data)
    assert len(frame.head) % 64 == 0
    entry = frame.head + data + frame.tail(zlib.crc32(data))
    assert frame.length == len(entry)
    return entry


@dataclass
class FakeFile:
    """A file that holds an entry, and records what is read of it."""

    entry: bytes
    reads: list[tuple[int, int]] = field(default_factory=list)

    def read(self, offset: int, nbytes: int) -> bytes:
        assert offset >= 0
        assert 0 < nbytes <= LARGEST_READ
        self.reads.append((offset, nbytes))
        assert len(self.reads) < 20
        return self.entry[offset : offset + nbytes]

    def locate(self) -> TensorRecord:
        return locate(self.read, len(self.entry))


def tensor_at(entry: bytes, record: TensorRecord) -> torch.Tensor:
    """The tensor that a record describes, read from its entry."""
    data = entry[record.data_offset : record.data_offset + record.data_nbytes]
    flat = tensor_of(record.dtype, (-1,), data) if data else torch.empty(0, dtype=record.dtype)
    return torch.as_strided(flat, record.shape, record.stride, record.storage_offset)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and bits, for dtypes without arithmetic too."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            return torch.empty(0)
        return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8)

    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(bits(a), bits(b))


# --- written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensors_entry_equals_the_bytes_of_torch_save(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    data = some_bytes(prod(shape) * dtype.itemsize)
    assert emitted(dtype, shape, data) == saved(tensor_of(dtype, shape, data))


@given(dtypes.filter(lambda dtype: dtype != torch.bool), shapes, st.data())
def test_any_tensors_entry_equals_the_bytes_of_torch_save(
    dtype: torch.dtype, shape: tuple[int, ...], draw: st.DataObject
) -> None:
    nbytes = prod(shape) * dtype.itemsize
    data = draw.draw(st.binary(min_size=nbytes, max_size=nbytes))
    assume(not data.startswith(b"PK\x07\x08"))
    assert emitted(dtype, shape, data) == saved(tensor_of(dtype, shape, data))


def test_torch_load_opens_a_tensors_entry_anywhere_in_a_file() -> None:
    data = some_bytes(24)
    entry = emitted(torch.float32, (2, 3), data)
    file = b"x" * 13 + entry + entry
    assert same(loaded(file[13 : 13 + len(entry)]), tensor_of(torch.float32, (2, 3), data))
    assert same(loaded(file[13 + len(entry) :]), tensor_of(torch.float32, (2, 3), data))


def test_data_that_look_like_a_descriptor_differ_in_the_fingerprint_alone() -> None:
    data = b"PK\x07\x08" + some_bytes(20)
    ours, theirs = emitted(torch.uint8, (24,), data), saved(tensor_of(torch.uint8, (24,), data))
    assert ours != theirs
    with zipfile.ZipFile(io.BytesIO(ours)) as a, zipfile.ZipFile(io.BytesIO(theirs)) as b:
        assert a.testzip() is None
        assert a.namelist() == b.namelist()
        differ = [name for name in a.namelist() if a.read(name) != b.read(name)]
    assert differ == ["archive/.data/serialization_id"]
    assert same(loaded(ours), tensor_of(torch.uint8, (24,), data))


class Sink(io.RawIOBase):
    """A stream that keeps small writes and counts the bytes of large ones."""

    def __init__(self) -> None:
        super().__init__()
        self.small: list[bytes] = []
        self.large: list[tuple[int, int]] = []
        """Where each large write came among the small ones, and its bytes."""

    def write(self, data: bytes) -> int:  # type: ignore[override]  # torch's argument
        view = memoryview(data).cast("B")
        if len(view) > 1 << 20:
            self.large.append((len(self.small), len(view)))
        else:
            self.small.append(bytes(view))
        return len(view)


@pytest.mark.parametrize("nbytes", BIG)
def test_an_entry_of_4_gib_equals_the_bytes_of_torch_save(nbytes: int) -> None:
    sink = Sink()
    # Never written to, the pages of zeros take no memory.
    zeros = torch.from_numpy(np.zeros(nbytes, np.uint8))
    torch.save(zeros, sink)  # type: ignore[arg-type]  # a stream, though no IO[bytes]
    [(at, written)] = sink.large
    assert written == nbytes
    head, tail = b"".join(sink.small[:at]), b"".join(sink.small[at:])
    crc = int.from_bytes(tail[4:8], "little")
    frame = tensor_frame(torch.uint8, (nbytes,))
    assert frame.head == head
    assert frame.tail(crc) == tail
    assert frame.length == len(head) + nbytes + len(tail)


@dataclass
class SparseFile(io.RawIOBase):
    """An entry whose data are a hole, as a file."""

    head: bytes
    nbytes: int
    tail: bytes
    at: int = 0

    @property
    def length(self) -> int:
        return len(self.head) + self.nbytes + len(self.tail)

    def read_at(self, offset: int, nbytes: int) -> bytes:
        assert nbytes <= LARGEST_READ
        tail_at = len(self.head) + self.nbytes
        if offset < tail_at:
            hole = bytes(min(nbytes, tail_at - offset))
            found = (self.head[offset:] + hole)[: min(nbytes, tail_at - offset)]
            return found + self.tail[: nbytes - len(found)]
        return self.tail[offset - tail_at :][:nbytes]

    def read(self, size: int = -1) -> bytes:
        found = self.read_at(self.at, size if size >= 0 else self.length - self.at)
        self.at += len(found)
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.length)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def seekable(self) -> bool:
        return True


@pytest.mark.parametrize("nbytes", [*BIG, 2**40, 2**50])
def test_the_records_of_a_huge_entry_are_found(nbytes: int) -> None:
    frame = tensor_frame(torch.int8, (nbytes,))
    file = SparseFile(frame.head, nbytes, frame.tail(77))
    record = locate(file.read_at, file.length)
    assert record == TensorRecord(torch.int8, (nbytes,), (1,), 0, len(frame.head), nbytes, 77)
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo("archive/data/0")
        assert (info.file_size, info.compress_size, info.CRC) == (nbytes, nbytes, 77)
        assert archive.read("archive/version") == b"3\n"
        assert len(archive.read("archive/.data/serialization_id")) == 40


@pytest.mark.parametrize(
    "value",
    [None, 3, "x", {"step": 1, "lr": 1e-3}, [1, 2**70], b"\x00" * 5000, {"a": {"b": [True]}}],
    ids=lambda value: repr(value)[:20],
)
def test_a_values_entry_equals_the_bytes_of_torch_save(value: object) -> None:
    entry = value_entry(pickle.dumps(value, 2))
    assert entry == saved(value)
    assert loaded(entry) == value
    assert pickle.loads(pickle_of(entry)) == value


def test_a_frame_is_made_once() -> None:
    assert tensor_frame(torch.int8, (3, 4)) is tensor_frame(torch.int8, torch.Size((3, 4)))


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint4x2, torch.quint2x4], ids=str)
def test_a_dtype_without_plain_storage_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        tensor_frame(dtype, (2,))


def test_a_negative_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, -1\)"):
        tensor_frame(torch.int8, (2, -1))


# --- found --------------------------------------------------------------------------------------


@given(dtypes.filter(lambda dtype: dtype != torch.bool), shapes, st.data())
def test_a_tensor_that_torch_saved_is_found(
    dtype: torch.dtype, shape: tuple[int, ...], draw: st.DataObject
) -> None:
    nbytes = prod(shape) * dtype.itemsize
    data = draw.draw(st.binary(min_size=nbytes, max_size=nbytes))
    tensor = tensor_of(dtype, shape, data)
    file = FakeFile(saved(tensor))
    record = file.locate()
    assert same(tensor_at(file.entry, record), tensor)
    assert record.crc == zlib.crc32(data)
    assert len(file.reads) == (1 if len(file.entry) <= 4096 else 2)


def test_a_large_tensor_is_found_in_two_short_reads() -> None:
    file = FakeFile(saved(torch.arange(100_000)))
    record = file.locate()
    assert torch.equal(tensor_at(file.entry, record), torch.arange(100_000))
    assert len(file.reads) == 2
    assert sum(nbytes for _, nbytes in file.reads) <= 4096


def test_a_tensor_saved_without_crcs_has_none() -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        file = FakeFile(saved(torch.arange(5)))
    finally:
        torch.serialization.set_crc32_options(before)
    record = file.locate()
    assert record.crc is None
    assert torch.equal(tensor_at(file.entry, record), torch.arange(5))


STRIDED = {
    "contiguous": torch.arange(24.0).reshape(4, 6),
    "transposed": torch.arange(24.0).reshape(4, 6).t(),
    "window": torch.arange(24.0).reshape(4, 6)[1:3, 2:5],
    "stepped": torch.arange(60, dtype=torch.int16).reshape(3, 4, 5)[::2, 1:, ::3],
    "last": torch.arange(7).to(torch.uint32)[6],
    "empty end": torch.arange(5, dtype=torch.float64)[5:],
    "overlapping": torch.arange(6.0).as_strided((2, 2), (1, 1)),
    "fp8": torch.arange(6.0).to(torch.float8_e5m2).reshape(2, 3).t(),
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("tensor", STRIDED.values(), ids=STRIDED)
def test_a_strided_view_is_found(tensor: torch.Tensor) -> None:
    file = FakeFile(saved(tensor))
    record = file.locate()
    assert record.stride == tensor.stride()
    assert record.storage_offset == tensor.storage_offset()
    assert same(tensor_at(file.entry, record), tensor)


@dataclass(frozen=True, slots=True)
class Style:
    """How some version of torch lays out its archive."""

    order: tuple[str, ...]
    folder: str = "archive"
    alignment: int = 1
    descriptors: bool = True
    compression: int = zipfile.ZIP_STORED
    contents: tuple[tuple[str, bytes], ...] = ()
    """Contents of some records, instead of torch's."""


STYLES = {
    "2.0": Style(("data.pkl", "data/0", "version"), alignment=64),
    "2.1": Style(("data.pkl", "byteorder", "data/0", "version"), alignment=64),
    "2.3": Style(
        ("data.pkl", "byteorder", "data/0", "version", ".data/serialization_id"), alignment=64
    ),
    "2.6": Style(
        (
            *("data.pkl", ".format_version", "byteorder", "data/0"),
            *("version", ".data/serialization_id"),
        ),
        alignment=64,
    ),
    "version first": Style(("version", "data.pkl", "data/0")),
    "data first": Style(("data/0", "byteorder", "version", "data.pkl"), alignment=64),
    "named by its file": Style(("data.pkl", "data/0", "version"), folder="__0_0"),
    "named in UTF-8": Style(("data.pkl", "data/0", "version"), folder="gewichte_größe"),
    "unaligned": Style(("data.pkl", "byteorder", "data/0", "version")),
    "page aligned": Style(("data.pkl", "data/0", "version"), alignment=4096),
    "sizes in front": Style(
        ("data.pkl", "byteorder", "data/0", "version"), alignment=64, descriptors=False
    ),
}


class Unseekable(io.RawIOBase):
    """A stream that zipfile cannot seek in, so that it writes descriptors as torch does."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]  # zipfile's argument
        self.written += data
        return len(data)


def written_as(style: Style, tensor: torch.Tensor) -> bytes:
    """The tensor's entry as zipfile writes it in that style."""
    with zipfile.ZipFile(io.BytesIO(saved(tensor))) as theirs:
        contents = {name.partition("/")[2]: theirs.read(name) for name in theirs.namelist()}
    contents |= dict(style.contents)
    stream: Unseekable | io.BytesIO = Unseekable() if style.descriptors else io.BytesIO()
    with zipfile.ZipFile(stream, "w", style.compression) as archive:
        for name in style.order:
            info = zipfile.ZipInfo(f"{style.folder}/{name}")
            info.compress_type = style.compression
            assert archive.fp is not None
            start = archive.fp.tell() + 30 + len(info.filename.encode()) + 4
            pad = -start % style.alignment
            info.extra = b"FB" + pad.to_bytes(2, "little") + b"Z" * pad
            archive.writestr(info, contents[name])
    return bytes(stream.written) if isinstance(stream, Unseekable) else stream.getvalue()


@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_the_layouts_of_other_versions_are_opened(style: Style, kind: str) -> None:
    tensor = STRIDED[kind]
    entry = written_as(style, tensor)
    assert same(loaded(entry), tensor)
    record = FakeFile(entry).locate()
    assert same(tensor_at(entry, record), tensor)
    assert record.stride == tensor.stride()
    if style.alignment > 1:
        assert record.data_offset % style.alignment == 0
    with zipfile.ZipFile(io.BytesIO(entry)) as archive:
        assert pickle_of(entry) == archive.read(f"{style.folder}/data.pkl")


def test_the_other_byte_order_is_refused_by_name() -> None:
    style = replace(STYLES["2.1"], contents=(("byteorder", b"big"),))
    with pytest.raises(CheckpointCorruptError, match=r"'byteorder'.*b'big'"):
        FakeFile(written_as(style, STRIDED["window"])).locate()


# --- refused ------------------------------------------------------------------------------------

GOOD = saved(torch.arange(6.0).reshape(2, 3))
FLAGS, CRC, PACKED, NBYTES, OFFSET = (8, 2), (16, 4), (20, 4), (24, 4), (42, 4)
"""Where fields are in a record of the directory, and their bytes."""


def central(entry: bytes, name: str) -> int:
    """Where the directory's record of that name starts."""
    return entry.rindex(b"archive/" + name.encode()) - 46


def edited(entry: bytes, name: str, place: tuple[int, int], value: int) -> bytes:
    at = central(entry, name) + place[0]
    return entry[:at] + value.to_bytes(place[1], "little") + entry[at + place[1] :]


def compressed() -> bytes:
    return written_as(replace(STYLES["2.1"], compression=zipfile.ZIP_DEFLATED), torch.zeros(100))


def twice_named() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 8)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", b"y" * 8)
    return stream.getvalue()


def fewer() -> bytes:
    entry = bytearray(GOOD)
    for at in (END + 8, END + 10, END - 76 + 24, END - 76 + 32):
        entry[at] = 6
    return bytes(entry)


def crowded() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for i in range(2000):
            archive.writestr(f"archive/{i}", b"")
    return stream.getvalue()


def in_two_folders() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in ("archive/data.pkl", "elsewhere/data/0"):
            archive.writestr(name, b"x" * 8)
    return stream.getvalue()


def repickled(pickled: bytes) -> bytes:
    """The entry of six floats with another pickle, its CRC true."""
    style = replace(STYLES["2.1"], contents=(("data.pkl", pickled),))
    return written_as(style, torch.arange(6.0))


END = len(GOOD) - 22

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "end record"),
    "no end": (lambda: GOOD[:-1], "end record"),
    "more after the end": (lambda: GOOD + b"\x00", "end record"),
    "more before the start": (lambda: b"\x00" + GOOD, "zip64 end record"),
    "more before the start, no zip64": (
        lambda: b"\x00" + written_as(STYLES["2.0"], torch.zeros(3)),
        "a directory that ends at",
    ),
    "fewer records than it has": (fewer, "expected 6 records in the directory, found more"),
    "encrypted": (lambda: edited(GOOD, "data/0", FLAGS, 0x0809), "flags 0x809"),
    "compressed": (compressed, "'archive/data.pkl' is compressed"),
    "a large directory": (crowded, "a directory of 65536 bytes at most"),
    "a large pickle": (lambda: repickled(bytes(70_000)), "'data.pkl' of 65536 bytes at most"),
    "one name twice": (twice_named, "once"),
    "two folders": (in_two_folders, "elsewhere/data/0"),
    "no pickle": (lambda: GOOD.replace(b"/data.pkl", b"/data.pkX"), "a record 'data.pkl'"),
    "no data": (lambda: GOOD.replace(b"/data/0", b"/data/1"), "a record 'data/0'"),
    "offset outside": (lambda: edited(GOOD, "data/0", OFFSET, 2**31), "outside"),
    "offset of another": (lambda: edited(GOOD, "data/0", OFFSET, 0), "overlaps"),
    "offset of nothing": (lambda: edited(GOOD, "data.pkl", OFFSET, 1), "entry's start"),
    "offset moved": (
        lambda: edited(GOOD, "data/0", OFFSET, GOOD.index(b"archive/data/0") - 29),
        "'archive/byteorder' to fill its place, 17 are left",
    ),
    "another name in front": (lambda: GOOD.replace(b"data/0FB", b"data/1FB"), "local header"),
    "another size in front": (
        lambda: (
            GOOD[: GOOD.index(b"archive/data/0") - 8]
            + b"\x19"
            + GOOD[GOOD.index(b"archive/data/0") - 7 :]
        ),
        "local header of b'archive/data/0' denies",
    ),
    "one size": (lambda: edited(GOOD, "data/0", NBYTES, 25), "two sizes"),
    "too long": (
        lambda: edited(edited(GOOD, "data/0", NBYTES, 999), "data/0", PACKED, 999),
        "overlaps",
    ),
    "too short": (
        lambda: edited(edited(GOOD, "data/0", NBYTES, 4), "data/0", PACKED, 4),
        "expected a record of 24 bytes",
    ),
    "64-bit size absent": (lambda: edited(GOOD, "data/0", NBYTES, 2**32 - 1), "zip64 extra"),
    "another CRC of the data": (lambda: edited(GOOD, "data/0", CRC, 5), "descriptor"),
    "another CRC of the pickle": (lambda: edited(GOOD, "data.pkl", CRC, 5), "descriptor"),
    "another pickle": (lambda: GOOD.replace(b"K\x02K\x03\x86", b"K\x03K\x02\x86"), "CRC"),
    "many records": (
        lambda: GOOD[: END + 8] + b"\xff\x7f\xff\x7f" + GOOD[END + 12 :],
        "disagree",
    ),
}


@pytest.mark.parametrize(("make", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_entry_is_refused(make: Callable[[], bytes], reason: str) -> None:
    entry = make()
    with pytest.raises(CheckpointCorruptError, match=reason) as caught:
        FakeFile(entry).locate()
    assert caught.value.offset is not None


VIEWS = st.tuples(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=3), st.integers(0, 8)
)


@given(VIEWS)
def test_a_view_is_found_if_it_fits_its_storage_and_else_refused(
    view: tuple[list[tuple[int, int]], int],
) -> None:
    dimensions, offset = view
    shape, stride = tuple(n for n, _ in dimensions), tuple(step for _, step in dimensions)
    entry = repickled(six_floats_pickle(shape, stride, offset))
    try:
        expected = torch.arange(6.0).as_strided(shape, stride, offset)
        fits = expected.numel() <= 6 and offset <= 6
    except RuntimeError:
        fits = False
    if fits:
        assert same(tensor_at(entry, FakeFile(entry).locate()), expected)
    else:
        with pytest.raises(CheckpointCorruptError, match=r"of a tensor|within its storage"):
            FakeFile(entry).locate()


class SixFloats(pickle.Pickler):
    """Pickles a view of the storage of six floats that need not exist."""

    def persistent_id(self, value: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", 6) if value == "six" else None


class View:
    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return torch._utils._rebuild_tensor_v2, self.arguments


def six_floats_pickle(shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> bytes:
    stream = io.BytesIO()
    SixFloats(stream, 2).dump(View("six", offset, shape, stride, False, OrderedDict()))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((2**40,), (0,), 0),
        ((2**62, 2**62), (0, 0), 0),
        ((2,), (2**63,), 0),
        ((7,), (1,), 0),
        ((0,), (1,), 7),
        ((2,), (-1,), 3),
        ((-2,), (1,), 0),
        ((2, 3), (3,), 0),
    ],
    ids=str,
)
def test_a_view_beyond_its_storage_is_refused(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    with pytest.raises(CheckpointCorruptError):
        FakeFile(repickled(six_floats_pickle(shape, stride, offset))).locate()


def test_a_bad_pickle_is_placed_in_the_entry() -> None:
    entry = repickled(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(CheckpointCorruptError, match="system") as caught:
        FakeFile(entry).locate()
    at = caught.value.offset
    assert at is None or entry.index(b"\x80\x02cos") <= at < entry.index(b"system") + 10


def test_no_byte_beyond_the_entry_is_given() -> None:
    source = Source(FakeFile(GOOD + b"x").read, len(GOOD))
    assert source.get(len(GOOD) - 2, 2, "the last bytes") == GOOD[-2:]
    with pytest.raises(CheckpointCorruptError, match="the last bytes of 3 bytes"):
        source.get(len(GOOD) - 2, 3, "the last bytes")


def flipped(entry: bytes) -> Iterator[tuple[int, bytes]]:
    for at in range(len(entry)):
        for bit in range(8):
            damaged = bytearray(entry)
            damaged[at] ^= 1 << bit
            yield at, bytes(damaged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16], ids=str)
def test_no_flipped_bit_gives_a_wrong_record(dtype: torch.dtype) -> None:
    entry = saved(torch.arange(6).reshape(2, 3).to(dtype))
    record = FakeFile(entry).locate()
    unseen = 0
    for at, damaged in flipped(entry):
        try:
            assert FakeFile(damaged).locate() == record, f"bit flipped at {at}"
            unseen += 1
        except CheckpointCorruptError as refusal:
            assert refusal.offset is None or 0 <= refusal.offset <= len(entry)  # noqa: PT017
    assert 0 < unseen < 8 * len(entry)


def test_no_flipped_bit_gives_a_wrong_pickle() -> None:
    entry = saved({"step": 3})
    pickled = bytes(pickle_of(entry))
    for at, damaged in flipped(entry):
        try:
            assert pickle_of(damaged) == pickled, f"bit flipped at {at}"
        except CheckpointCorruptError:
            continue


@pytest.mark.parametrize("entry", [GOOD, saved(torch.arange(1000))], ids=["small", "large"])
def test_no_truncated_entry_is_opened(entry: bytes) -> None:
    for length in range(len(entry)):
        with pytest.raises(CheckpointCorruptError):
            FakeFile(entry[:length]).locate()
        with pytest.raises(CheckpointCorruptError):
            pickle_of(entry[:length])


@given(st.integers(0, len(GOOD)), st.integers(0, 2**62))
def test_a_file_shorter_than_its_entry_is_refused(have: int, missing: int) -> None:
    file = FakeFile(GOOD[:have])
    assume(have + missing != len(GOOD) or have != len(GOOD))
    with pytest.raises(CheckpointCorruptError):
        locate(file.read, have + missing)


edits = st.lists(
    st.tuples(
        st.integers(0, len(GOOD) - 1),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from(
                [b"\xff\xff", b"\xff" * 4, b"\xff" * 8, b"\x00" * 4, b"PK\x01\x02", b"PK\x06\x07"]
            ),
        ),
    ),
    min_size=1,
    max_size=6,
)


@given(st.one_of(edits, st.binary(max_size=3000)))
def test_any_bytes_give_a_record_inside_the_entry_or_a_refusal(
    damage: list[tuple[int, bytes]] | bytes,
) -> None:
    entry = bytearray(GOOD if isinstance(damage, list) else damage)
    for at, new in damage if isinstance(damage, list) else []:
        entry[at : at + len(new)] = new
    try:
        record = FakeFile(bytes(entry)).locate()
    except CheckpointCorruptError:
        pass
    else:
        tensor_at(bytes(entry), record)
        assert record.data_offset + record.data_nbytes <= len(entry)
        assert prod(record.shape) * record.dtype.itemsize <= record.data_nbytes
    try:
        pickled = pickle_of(bytes(entry))
    except CheckpointCorruptError:
        return
    assert len(pickled) <= len(entry)
