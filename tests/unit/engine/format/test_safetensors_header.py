"""The safetensors format against the package that defines it; headers from strangers."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.format.safetensors_header import (
    DTYPES,
    MAX_HEADER_BYTES,
    Header,
    decode,
    encode,
    header_length,
    place_tensors,
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
def test_the_package_reads_an_encoded_header(
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
def test_a_header_of_the_package_is_decoded(
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
