"""The safetensors format against the package that defines it; headers that nobody vouches for."""

from __future__ import annotations

import json
import math
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from pytest_dcp._engine.format.write_results import Written
from pytest_dcp._engine.io.disk import LocalDisk
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.write_files import FileJob, Settings
from pytest_dcp._engine.io.write_safetensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    Header,
    decode,
    encode,
    header_length,
    place_tensors,
    read_header,
    write_safetensors,
)
from pytest_dcp.errors import CheckpointCorruptError

dtypes = st.sampled_from(list(DTYPES.values()))
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype, shape = draw(dtypes), draw(shapes)
    nbytes = math.prod(shape) * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=nbytes, max_size=nbytes)))
    if dtype == torch.bool:
        data = bytearray(b & 1 for b in data)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else None
    return tensor.dtype, tuple(tensor.shape), b"" if flat is None else bytes(flat.tolist())


def split(file: bytes) -> Header:
    length = header_length(file[:8], len(file))
    return decode(file[8 : 8 + length], len(file))


def framed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# The format.


@given(st.dictionaries(names, tensors(), max_size=5), st.dictionaries(names, names, max_size=2))
def test_the_package_reads_what_is_encoded(
    values: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    found = place_tensors((name, value.dtype, tuple(value.shape)) for name, value in values.items())
    head = encode(found, metadata)
    file = head + b"".join(bits(value)[2] for value in values.values())
    loaded = safetensors.torch.load(file) if not _has_e8m0(values) else {}
    assert {k: bits(v) for k, v in loaded.items()} == (
        {k: bits(v) for k, v in values.items()} if not _has_e8m0(values) else {}
    )
    assert len(head) % 64 == 0
    header = split(file)
    assert header.metadata == metadata
    assert {t.name: (t.dtype, t.shape, t.start) for t in header.tensors} == {
        t.name: (t.dtype, t.shape, t.start) for t in found
    }


def _has_e8m0(values: dict[str, torch.Tensor]) -> bool:
    # The package writes this dtype and cannot read it back.
    return any(value.dtype == torch.float8_e8m0fnu for value in values.values())


@given(st.dictionaries(names, tensors(), max_size=5), st.dictionaries(names, names, max_size=2))
def test_what_the_package_writes_is_decoded(
    values: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    file = safetensors.torch.save(values, metadata or None)
    header = split(file)
    assert header.metadata == metadata
    start = header.data_start
    assert {
        t.name: (t.dtype, t.shape, file[start + t.start : start + t.start + t.nbytes])
        for t in header.tensors
    } == {name: bits(value) for name, value in values.items()}


def one(**changed: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}}


DATA = bytes(8)
BAD: dict[str, tuple[bytes, str]] = {
    "no length": (b"\1\0\0", "at least 8 bytes"),
    "longer than the file": ((99).to_bytes(8, "little") + b"{}", "length of 99"),
    "endless": (b"\xff" * 8 + b"{}", "length of 18446744073709551615"),
    "no JSON": (framed(b"{"), "in JSON"),
    "no UTF-8": (framed(b'{"\xff":1}'), "in JSON"),
    "deep": (framed(b"[" * 100_000), "in JSON"),
    "a list": (framed([]), "to be an object"),
    "NaN": (framed(b'{"t":NaN}'), "NaN"),
    "a long number": (framed(b'{"t":' + b"9" * 5000 + b"}"), "in JSON"),
    "a half character": (framed(b'{"\\ud800":1}'), "in JSON"),
    "one name twice": (
        framed(b'{"t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"u":1,"t":2}'),
        r"once.*entry 't'",
    ),
    "one word twice": (framed(b'{"t":{"dtype":"U8","dtype":"U8"}}'), "once"),
    "metadata of numbers": (framed({"__metadata__": {"a": 1}}), "strings"),
    "another word": (framed({"t": {**one()["t"], "x": 1}}, DATA), "entry 't'"),
    "no offsets": (framed({"t": {"dtype": "F32", "shape": [2]}}), "entry 't'"),
    "a dtype that is none": (framed(one(dtype="F33"), DATA), "entry 't'"),
    "a dtype that is a list": (framed(one(dtype=[]), DATA), "entry 't'"),
    "half bytes": (framed(one(dtype="F4"), DATA), "entry 't'"),
    "a negative size": (framed(one(shape=[-2]), DATA), "entry 't'"),
    "a true size": (framed(one(shape=[True, 2]), DATA), "entry 't'"),
    "a float size": (framed(one(shape=[2.0]), DATA), "entry 't'"),
    "too many dimensions": (framed(one(shape=[1] * 65), DATA), "entry 't'"),
    "too large": (framed(one(shape=[1 << 40, 1 << 40, 0], data_offsets=[0, 0])), "at most"),
    "other bytes than the shape": (framed(one(shape=[3]), DATA), "expected 12 bytes.*entry 't'"),
    "offsets that fall": (framed(one(data_offsets=[8, 0]), DATA), "expected 8 bytes.*entry 't'"),
    "a gap before": (framed(one(data_offsets=[4, 12]), bytes(12)), "gaps.*entry 't'"),
    "an overlap": (
        framed({"t": one()["t"], "u": one(data_offsets=[4, 12])["t"]}, bytes(12)),
        "overlaps.*entry 'u'",
    ),
    "cut off": (framed(one(), bytes(7)), "cut off"),
    "more than it says": (framed(one(), bytes(9)), "more than it says"),
}


@pytest.mark.parametrize(("file", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_header_is_refused_with_its_reason(file: bytes, reason: str) -> None:
    with pytest.raises(CheckpointCorruptError, match=reason):
        split(file)


@given(st.data())
def test_any_change_of_a_file_is_refused_or_describes_its_bytes_exactly(
    data: st.DataObject,
) -> None:
    values = {"a": torch.arange(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}
    file = bytearray(safetensors.torch.save(values, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    del file[data.draw(st.sampled_from([len(file), len(file), *range(len(file))])) :]
    try:
        header = split(bytes(file))
    except CheckpointCorruptError:
        return
    end = 0
    for tensor in header.tensors:
        assert tensor.start == end
        end += tensor.nbytes
    assert header.data_start + end == len(file)


def test_many_doubled_names_are_refused_at_once() -> None:
    text = b"{" + b",".join(b'"n%d":0' % n for n in range(200_000)) + b',"n199999":0}'
    began_s = time.monotonic()
    with pytest.raises(CheckpointCorruptError, match="entry 'n199999'"):
        split(framed(text))
    assert time.monotonic() - began_s < 5


def test_the_limit_of_the_format_holds_both_ways() -> None:
    head = (MAX_HEADER_BYTES + 1).to_bytes(8, "little")
    with pytest.raises(CheckpointCorruptError, match="at most 100000000"):
        header_length(head, 1 << 40)
    with pytest.raises(ValueError, match="write more files"):
        encode(place_tensors([("x" * (MAX_HEADER_BYTES + 1), torch.uint8, (0,))]), {})


@pytest.mark.parametrize("found", [("__metadata__",), ("t", "t")], ids=["reserved", "twice"])
def test_a_header_that_no_reader_would_take_is_not_made(found: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="one tensor of each name"):
        encode(place_tensors((name, torch.uint8, (0,)) for name in found), {})


def test_a_dtype_that_the_format_lacks_is_named() -> None:
    with pytest.raises(TypeError, match=r"'t' is torch\.complex128"):
        place_tensors([("t", torch.complex128, (1,))])


# Files.


def item(fqn: str, offset: tuple[int, ...], size: tuple[int, ...], value: Any) -> WriteItem:
    if isinstance(value, bytes):
        return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)
    return WriteItem(
        MetadataIndex(fqn, offset),
        WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(torch.Size(offset), value.size()),
            TensorProperties(value.dtype),
            torch.Size(size),
        ),
    )


def written(
    folder: Path, values: list[Any], items: list[WriteItem] | None, jobs: list[FileJob]
) -> Written:
    return write_safetensors(
        LocalDisk(), folder, jobs, values.__getitem__, Settings(threads=2, copy_ahead_bytes=1),
        Observer("save"), items, {"save": "1"},
    )  # fmt: skip


def test_rows_are_where_the_places_say_with_their_sums(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values: list[Any] = [
        torch.tensor(5),
        torch.randn(3, 4).t(),
        torch.randn(300, 301),
        torch.randn(700, 100).t()[::2],
        torch.empty(0, 3),
        b"a value's bytes",
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.tensor([True, False, True]),
    ]
    items = [
        item(f"t{row}", (0,) * getattr(v, "ndim", 0), getattr(v, "shape", ()), v)
        for row, v in enumerate(values)
    ]
    jobs = [FileJob("one", [0, 2, 4, 6]), FileJob("two", [7, 5, 3, 1]), FileJob("none", [])]
    places = written(tmp_path, values, items, jobs)
    for row, value in enumerate(values):
        file = (tmp_path / places.files[places.file[row]]).read_bytes()
        data = value if isinstance(value, bytes) else bits(value.resolve_conj())[2]
        start, nbytes = int(places.data_start[row]), int(places.data_nbytes[row])
        assert file[start : start + nbytes] == data
        assert (places.start[row], places.length[row]) == (start, nbytes)
        assert start % (1 if isinstance(value, bytes) else value.itemsize) == 0
        sums = places.sums[places.first_sum[row] : places.first_sum[row + 1]].tolist()
        ends = [*range(1 << 16, nbytes, 1 << 16), nbytes] if nbytes else []
        assert sums == [zlib.crc32(data[:end]) for end in ends]
    loaded = safetensors.torch.load_file(tmp_path / "two")
    assert torch.equal(loaded["t3"], values[3])
    assert bytes(loaded["t5"].tolist()) == b"a value's bytes"
    assert safetensors.torch.load_file(tmp_path / "none") == {}


def test_two_parts_of_one_tensor_keep_names_of_their_own(tmp_path: Path) -> None:
    values = [torch.zeros(2), torch.ones(3), torch.full((1,), 7.0), torch.full((2,), 9.0)]
    where = [("w", (0,), (5,)), ("w", (2,), (5,)), ("w#1", (0,), (1,)), ("w", (5,), (5,))]
    items = [item(*box, value) for box, value in zip(where, values, strict=True)]
    written(tmp_path, values, items, [FileJob("f", range(4))])
    loaded = safetensors.torch.load_file(tmp_path / "f")
    assert sorted(map(torch.Tensor.tolist, loaded.values())) == sorted(v.tolist() for v in values)
    assert loaded["w"].tolist() == [0.0, 0.0]
    assert loaded["w#1"].tolist() == [7.0]
    with LocalDisk().open(tmp_path, "f") as file:
        said = json.loads(read_header(file, "f").metadata["DCP_SHARDING_INFO"])
    found = {
        (info.get("fqn", name), tuple(info["saved_offsets"]), tuple(info["full_size"]))
        for name, info in said.items()
    }
    assert found == set(where)


def test_a_sparse_tensor_and_stream_transforms_are_refused(tmp_path: Path) -> None:
    items = [item("w", (0, 0), (2, 2), torch.eye(2))]
    with pytest.raises(TypeError, match=r"'w' is torch\.sparse_coo"):
        written(tmp_path, [torch.eye(2).to_sparse()], items, [FileJob("f", [0])])
    with pytest.raises(ValueError, match="transforms"):
        write_safetensors(
            LocalDisk(), tmp_path, [], [].__getitem__, Settings(transforms=[object()]),  # type: ignore[list-item]  # any
            Observer("save"), [],
        )  # fmt: skip
