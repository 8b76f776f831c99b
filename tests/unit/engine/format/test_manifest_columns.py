import json
import math
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties

from pytest_dcp._engine.format import catalog_checks as checks
from pytest_dcp._engine.format import manifest_columns
from pytest_dcp._engine.format import planner_paths as paths
from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.catalog_checks import check_catalog, checked_path
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.errors import CheckpointCorruptError
from support.catalogs import Sample, describe_fields, same, samples

EXTREMES = [0, 1, -1, -2, 63, 1 << 31, 1 << 62, (1 << 63) - 1, -(1 << 63)]


def decoded(data: bytes, whole: Metadata | None = None) -> Catalog:
    """The manifest's catalog; fails where the pickle is asked for without need."""

    def read() -> Metadata:
        if whole is None:
            raise CheckpointCorruptError("the pickle was asked for")
        return whole

    return manifest_columns.decode(memoryview(data), read)


def two_tensors() -> Catalog:
    """`a` of (4, 6) in two chunks, the byte value `b`, `c` of (5,) in one; all with sums."""
    return Catalog(
        Index(
            fqns=("a", "b", "c"),
            property_of=np.array([0, -1, 1], np.int32),
            properties=(TensorProperties(torch.float32), TensorProperties(torch.int64)),
            ndim=np.array([2, -1, 1], np.int16),
            size=np.array([[4, 6], [1, 1], [5, 1]], np.int64),
            first=np.array([0, 2, 3, 4], np.int64),
            offset=np.array([[0, 0], [2, 0], [0, 0], [0, 0]], np.int64),
            shape=np.array([[2, 6], [2, 6], [1, 1], [5, 1]], np.int64),
        ),
        EntryPlaces(
            files=("x", "y/z"),
            file=np.array([0, 1, 0, 0], np.int32),
            start=np.array([0, 0, 100, 200], np.int64),
            length=np.array([64, 64, 10, 44], np.int64),
            data_start=np.array([10, 16, 100, 202], np.int64),
            data_nbytes=np.array([48, 48, 10, 40], np.int64),
            first_sum=np.array([0, 2, 4, 5, 7], np.int64),
            sums=np.arange(7, dtype=np.uint32),
            block_bytes=32,
        ),
        planner_data={"a": ("a",), "b": ("b",), "c": ("c",)},
        storage_meta=StorageMeta("/x"),
        version="1",
    )


@given(samples())
def test_decodes_to_the_encoded_value(sample: Sample) -> None:
    data = manifest_columns.encode(sample.catalog)

    assert len(data) % 8 == 0
    assert same(decoded(data, sample.stock), sample.catalog)


@given(samples())
def test_shows_torch_the_same_metadata(sample: Sample) -> None:
    shown = decoded(manifest_columns.encode(sample.catalog), sample.stock).metadata()

    assert dict(shown.state_dict_metadata) == sample.stock.state_dict_metadata
    assert dict(shown.storage_data) == sample.stock.storage_data
    assert shown.planner_data == sample.stock.planner_data
    assert shown.storage_meta == sample.stock.storage_meta


def test_arrays_are_read_only_views_of_the_buffer() -> None:
    data = bytearray(manifest_columns.encode(two_tensors()))
    catalog = decoded(data)  # type: ignore[arg-type]  # writable on purpose
    at = data.index(struct.pack("<4q", 0, 2, 3, 4))
    data[at : at + 8] = struct.pack("<q", 9)

    assert catalog.index.first[0] == 9
    for column in (catalog.index.first, catalog.index.size, catalog.places.sums):
        assert not column.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1


def test_paths_of_the_default_planner_need_no_pickle() -> None:
    known: dict[str, Any] = {
        "model.layers.0.weight": ("model", "layers.0.weight"),
        "optim.state.0.step": ("optim", "state", 0, "step"),
        "flat.name": ("flat.name",),
        "odd": ("not", "its", "name", 3),
        "not.in.the.index": ("not.in", "the.index"),
        "0": (0,),
    }
    keys = [*list(known)[:4], "has no path"]
    rows = np.full((5, 0), 1, np.int64)
    index = Index(
        tuple(keys),
        np.zeros(5, np.int32),
        (TensorProperties(torch.float32),),
        np.zeros(5, np.int16),
        rows,
        np.arange(6),
        rows,
        rows,
    )
    found = decoded(
        manifest_columns.encode(Catalog(index, EntryPlaces.nowhere(5), known))
    ).planner_data

    assert found == known
    assert known == found
    assert found.get("has no path") is None
    assert "odd" in found
    assert "has no path" not in found
    assert dict(found.items()) == known
    assert type(pickle.loads(pickle.dumps(found))) is dict
    assert pickle.loads(pickle.dumps(found)) == known
    assert repr(found) == repr(dict(found))
    again = decoded(manifest_columns.encode(Catalog(index, EntryPlaces.nowhere(5), found)))
    assert again.planner_data == known


@pytest.mark.parametrize(
    "said",
    [
        {"planner_data": {"a": ["a list"]}},
        {"planner_data": [1]},
        {"planner_data": {"a": (True,)}},
        {"planner_data": {"x": ("\ud83d\ude00",)}},  # JSON would join the halves
        {"storage_meta": StorageMeta("/\ud83d\ude00")},
        {"storage_meta": StorageMeta(checkpoint_id=b"bytes")},  # type: ignore[arg-type]
        {"storage_meta": StorageMeta(modules=[1])},  # type: ignore[list-item]
        {"version": 3},
    ],
)
def test_planner_data_that_is_not_plain_comes_from_the_pickle(said: dict[str, Any]) -> None:
    catalog = replace(replace(two_tensors(), planner_data=None), **said)
    found = decoded(manifest_columns.encode(catalog), catalog.metadata())

    assert same(found, catalog)
    assert describe_fields(found.planner_data) == describe_fields(catalog.planner_data)


def test_transforms_beyond_the_known_are_refused() -> None:
    some = {1: ("zstd",), 3: ("zstd",)}
    data = manifest_columns.encode(_places(transforms=some)(two_tensors()))

    assert decoded(data).places.transforms == some
    with pytest.raises(CheckpointCorruptError):
        decoded(_with_header(data, lambda header: header.update(transforms=[])))


@pytest.mark.parametrize(("name", "form"), [("01", (-1,)), ("a.b", (1,)), ("a", (-1,)), ("", (2,))])
def test_a_form_that_does_not_fit_makes_no_path(name: str, form: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected|invalid literal"):
        paths.path_of(name, form)


def test_a_path_as_checkpoint_id_keeps_its_class() -> None:
    catalog = replace(two_tensors(), storage_meta=StorageMeta(PosixPath("/a"), "s", "l", ["m"]))
    found = decoded(manifest_columns.encode(catalog)).storage_meta

    assert found == catalog.storage_meta
    assert type(getattr(found, "checkpoint_id", None)) is PosixPath


def test_a_header_too_long_to_be_read_is_not_written() -> None:
    catalog = replace(two_tensors(), version="v" * manifest_columns.MAX_HEADER_BYTES)

    with pytest.raises(ValueError, match="header of at most"):
        manifest_columns.encode(catalog)


# ---- hostile bytes


@given(samples(), st.data())
def test_altered_bytes_are_refused_or_give_a_lawful_catalog(sample: Sample, data: Any) -> None:
    raw = bytearray(manifest_columns.encode(sample.catalog))
    for _ in range(data.draw(st.integers(1, 3))):
        _alter(raw, data)
    try:
        found = decoded(bytes(raw), sample.stock)
    except CheckpointCorruptError:
        return
    _assert_lawful(found)


def _alter(raw: bytearray, data: Any) -> None:
    """One byte, one number of a column, or the length."""
    how = data.draw(st.sampled_from(["byte", "byte", "number", "number", "short", "long"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if how == "byte":
        raw[at] = data.draw(st.integers(0, 255))
    elif how == "number":
        at = max(min(at - at % 8, len(raw) - 8), 0)
        raw[at : at + 8] = struct.pack("<q", data.draw(st.sampled_from(EXTREMES)))
    elif how == "short":
        del raw[max(at, 1) :]
    else:
        raw.extend(bytes(data.draw(st.integers(1, 16))))


def _assert_lawful(catalog: Catalog) -> None:
    """Every rule, one row at a time, in Python's unbounded ints."""
    index, places = catalog.index, catalog.places
    assert len(set(index.fqns)) == len(index.fqns)
    rank = index.size.shape[1]
    assert rank <= 64
    first, sums = index.first.tolist(), places.first_sum.tolist()
    assert (first[0], first[-1]) == (0, len(index.offset))
    assert (sums[0], sums[-1]) == (0, len(places.sums))
    for name in places.files:
        assert name
        assert not name.startswith("/")
        assert "\0" not in name
        assert ".." not in name.split("/")
    for key in range(len(index)):
        ndim, size = int(index.ndim[key]), index.size[key].tolist()
        which = int(index.property_of[key])
        assert -1 <= ndim <= rank
        assert (which == -1) if ndim < 0 else (0 <= which < len(index.properties))
        assert all(side >= 0 for side in size)
        assert all(side == 1 for side in size[max(ndim, 0) :])
        width = 1 if ndim < 0 else index.properties[which].dtype.itemsize
        assert math.prod(max(side, 1) for side in size) * width < 1 << 63
        assert first[key] <= first[key + 1]
        assert ndim >= 0 or first[key + 1] - first[key] == 1
        for row in range(first[key], first[key + 1]):
            _assert_lawful_chunk(catalog, row, ndim, size, width)
    assert all(places.file[row] >= 0 for row in places.transforms)


def _assert_lawful_chunk(catalog: Catalog, row: int, ndim: int, size: Any, width: int) -> None:
    offset, shape = catalog.index.offset[row].tolist(), catalog.index.shape[row].tolist()
    assert min([0, *offset, *shape]) == 0
    assert offset[max(ndim, 0) :] == [0] * (len(offset) - max(ndim, 0))
    assert shape[max(ndim, 0) :] == [1] * (len(shape) - max(ndim, 0))
    if math.prod(shape):
        assert all(o + s <= n for o, s, n in zip(offset, shape, size, strict=True))
    places = catalog.places
    file, start, length, data_start, data_nbytes, first_sum = (
        int(column[row])
        for column in (
            *(places.file, places.start, places.length),
            *(places.data_start, places.data_nbytes, places.first_sum),
        )
    )
    count = int(places.first_sum[row + 1]) - first_sum
    assert -1 <= file < len(places.files)
    if file < 0:
        assert start == length == -1
        assert data_start == -1
    else:
        assert start >= 0
        assert length >= 0
        assert start + length < 1 << 63
    assert count >= 0
    if data_start < 0:
        assert data_start == data_nbytes == -1
        assert count == 0
    else:
        assert start <= data_start
        assert data_nbytes >= 0
        assert data_start + data_nbytes <= start + length
        # A transformed entry is one stream, whose length says nothing of the chunk's.
        transformed = row in places.transforms
        assert ndim < 0 or transformed or data_nbytes == math.prod(shape) * width
        assert count in (0, max(-(-data_nbytes // places.block_bytes), 1))


@given(samples())
def test_lawful_catalogs_pass_the_checks(sample: Sample) -> None:
    _assert_lawful(sample.catalog)
    check_catalog(sample.catalog)


CELLS = (
    ("ndim", "property_of", "size", "first", "offset", "shape"),
    (*("file", "start", "length", "data_start", "data_nbytes", "first_sum"),),
)


def _without_value() -> Catalog:
    """`a` of two_tensors alone, whose dimensions are all its own."""
    catalog = two_tensors()
    chunks = {name: getattr(catalog.index, name)[:2] for name in ("offset", "shape")}
    keys = {name: getattr(catalog.index, name)[:1] for name in ("property_of", "ndim", "size")}
    index = replace(catalog.index, fqns=("a",), first=catalog.index.first[:2], **chunks, **keys)
    rows = {name: getattr(catalog.places, name)[:2] for name in CELLS[1][:-1]}
    sums = {"first_sum": catalog.places.first_sum[:3], "sums": catalog.places.sums[:4]}
    return replace(catalog, index=index, places=replace(catalog.places, **rows, **sums))


def _empty_value() -> Catalog:
    """two_tensors, `b` of no bytes and without a sum."""
    sums = np.arange(6, dtype=np.uint32)
    return _places(data_nbytes={2: 0}, first_sum={3: 4, 4: 6}, sums=sums)(two_tensors())


@pytest.mark.parametrize("sound", [two_tensors, _without_value, _empty_value])
def test_the_short_way_through_the_checks_lets_nothing_else_pass(
    sound: Callable[[], Catalog], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of a usual catalog, replaced by others one at a time."""
    usual: list[bool] = []
    real = checks._is_ordinary

    def refused(catalog: Catalog, shortly: Callable[..., bool]) -> str | None:
        monkeypatch.setattr(checks, "_is_ordinary", shortly)
        try:
            check_catalog(catalog)
        except CheckpointCorruptError as error:
            return str(error)
        return None

    def noted(*args: Any) -> bool:
        usual.append(real(*args))
        return usual[-1]

    for names, change in zip(CELLS, (_index, _places), strict=True):
        table = sound().index if change is _index else sound().places
        for name in names:
            column = getattr(table, name)
            for at in np.ndindex(column.shape):
                near = [int(column[at]) + by for by in (-2, -1, 0, 1, 2, 8, 32)]
                limits = np.iinfo(column.dtype)
                for number in {n for n in (*EXTREMES, *near) if limits.min <= n <= limits.max}:
                    catalog = change(**{name: {at: number}})(sound())
                    reason = refused(catalog, noted)
                    assert reason == refused(catalog, lambda *_: False), (name, at, number)
                    if reason is None:
                        _assert_lawful(catalog)
    assert {True, False} <= set(usual)
    assert usual.count(True) > 50


def _index(**columns: Any) -> Callable[[Catalog], Catalog]:
    return lambda catalog: replace(catalog, index=_with(catalog.index, columns))


def _places(**columns: Any) -> Callable[[Catalog], Catalog]:
    return lambda catalog: replace(catalog, places=_with(catalog.places, columns))


def _with(table: Any, columns: dict[str, Any]) -> Any:
    """The table; a column given as {position: number} is changed there."""
    changed = {}
    for name, value in columns.items():
        if isinstance(value, dict) and name != "transforms":
            column = getattr(table, name).copy()
            for at, number in value.items():
                column[at] = number
            changed[name] = column
        else:
            changed[name] = value
    return replace(table, **changed)


BIG = (1 << 63) - 1
BROKEN: dict[str, tuple[Callable[[Catalog], Catalog], str, str | None]] = {
    "a key twice": (_index(fqns=("a", "b", "a")), "each key once", "a"),
    "too few names": (
        lambda catalog: replace(_index(fqns=("a", "b"))(catalog), planner_data=None),
        "2 names for 3 keys",
        None,
    ),
    "dimensions beyond the rank": (_index(ndim={0: 3}), "-1 to 2 dimensions", "a"),
    "dimensions below -1": (_index(ndim={0: -2}), "-1 to 2 dimensions", "a"),
    "a tensor without properties": (_index(property_of={0: -1}), "one of 2 properties", "a"),
    "properties beyond the known": (_index(property_of={2: 2}), "one of 2 properties", "c"),
    "a byte value with properties": (_index(property_of={1: 0}), "one of 2 properties", "b"),
    "a negative size": (_index(size={(0, 0): -4}), "sizes of 0 or more", "a"),
    "a padded size": (_index(size={(2, 1): 2}), "sizes padded with 1", "c"),
    "a size that overflows": (_index(size={(0, 0): 1 << 60}), "a tensor of at most", "a"),
    "an empty tensor whose strides overflow": (
        _index(size={(0, 0): 0, (0, 1): BIG}),
        "a tensor of at most",
        "a",
    ),
    "first chunk not 0": (_index(first={0: 1}), "first chunks", None),
    "chunks that fall": (_index(first={1: 3, 2: 2}), "first chunks", None),
    "chunks beyond the last": (_index(first={3: 5}), "first chunks", None),
    "chunks far beyond": (_index(first={1: BIG, 2: -BIG}), "first chunks", None),
    "two chunks of a byte value": (_index(first={1: 1}), "one chunk for a byte value", "b"),
    "a negative offset": (_index(offset={(1, 0): -1}), "offsets and shapes of 0 or more", "a"),
    "a negative shape": (_index(shape={(1, 1): -6}), "offsets and shapes of 0 or more", "a"),
    "a padded offset": (_index(offset={(3, 1): 1}), "padded", "c"),
    "a padded shape": (_index(shape={(3, 1): 0}), "padded", "c"),
    "a chunk outside": (_index(offset={(1, 0): 3}), "chunks inside their tensor", "a"),
    "a chunk that wraps around": (
        _index(offset={(1, 0): BIG}, shape={(1, 0): BIG}),
        "chunks inside their tensor",
        "a",
    ),
    "a file beyond the known": (_places(file={1: 2}), "one of 2 files", "a"),
    "a file below -1": (_places(file={1: -2}), "one of 2 files", "a"),
    "a place without file": (_places(file={2: -1}), "no place for a chunk", "b"),
    "a negative start": (_places(start={0: -1}), "an entry of 0 or more bytes", "a"),
    "a negative length": (_places(length={0: -64}), "an entry of 0 or more bytes", "a"),
    "an end that overflows": (_places(start={0: BIG}), "ends below", "a"),
    "data before its entry": (_places(data_start={3: 199}), "data inside its entry", "c"),
    "data beyond its entry": (_places(data_start={3: 205}), "data inside its entry", "c"),
    "data far beyond": (_places(data_start={3: BIG}), "data inside its entry", "c"),
    "data far before": (_places(data_start={3: -BIG - 1}), "both -1 or neither", "c"),
    "a start without length": (_places(data_nbytes={3: -1}), "data inside its entry", "c"),
    "a length without start": (_places(data_start={3: -1}), "both -1 or neither", "c"),
    "data of another shape": (_places(data_nbytes={3: 39}), "shape and dtype", "c"),
    "sums that fall": (_places(first_sum={1: 4, 2: 2}), "first sums", None),
    "sums that wrap around": (
        _places(first_sum={1: BIG, 2: -BIG - 1, 3: -1}),
        "first sums",
        None,
    ),
    "sums beyond the last": (_places(first_sum={4: 8}), "first sums", None),
    "too few sums": (_places(first_sum={1: 1}), "a sum for each block", "a"),
    "a sum too few": (
        _places(first_sum={1: 1, 2: 3, 3: 4, 4: 6}, sums=np.arange(6, dtype=np.uint32)),
        "a sum for each block",
        "a",
    ),
    "sums without data": (
        _places(data_start={3: -1}, data_nbytes={3: -1}),
        "a sum for each block",
        "c",
    ),
    "no block": (_places(block_bytes=0), "blocks of 1 to", None),
    "blocks too large": (_places(block_bytes=1 << 32), "blocks of 1 to", None),
    "transforms without a file": (
        _places(
            file={2: -1},
            start={2: -1},
            length={2: -1},
            data_start={2: -1},
            data_nbytes={2: -1},
            transforms={2: ("zstd",)},
        ),
        "transforms of chunks with a file",
        None,
    ),
    "a file outside": (_places(files=("x", "../y")), "inside the checkpoint's folder", None),
}


@pytest.mark.parametrize("slab", [checks._SLAB, 2])
@pytest.mark.parametrize("case", BROKEN)
def test_a_catalog_that_breaks_a_rule_is_refused(
    case: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_SLAB", slab)
    damage, expected, entry = BROKEN[case]
    check_catalog(two_tensors())
    data = manifest_columns.encode(damage(two_tensors()))

    with pytest.raises(CheckpointCorruptError, match=expected) as caught:
        decoded(data)
    assert caught.value.entry == entry


def test_rules_hold_beyond_the_rows_that_are_checked_at_a_time() -> None:
    chunks = 2 * checks._SLAB + 5
    index = Index(
        ("a",),
        np.zeros(1, np.int32),
        (TensorProperties(torch.int8),),
        np.ones(1, np.int16),
        np.array([[chunks]]),
        np.array([0, chunks]),
        np.arange(chunks)[:, None],
        np.ones((chunks, 1), np.int64),
    )
    sound = Catalog(index, EntryPlaces.nowhere(chunks))
    check_catalog(sound)

    with pytest.raises(CheckpointCorruptError, match=f"in chunk {chunks - 1}"):
        check_catalog(_index(offset={(chunks - 1, 0): chunks})(sound))


def test_a_chunk_without_elements_may_lie_anywhere() -> None:
    damage = _index(offset={(1, 0): 1 << 40}, shape={(1, 0): 0})
    sums = np.arange(5, dtype=np.uint32)
    empty = _places(data_nbytes={1: 0}, first_sum={2: 2, 3: 3, 4: 5}, sums=sums)
    check_catalog(empty(damage(two_tensors())))


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no counts": (lambda h: h.pop("counts"), "the counts"),
    "a count too few": (lambda h: h["counts"].pop("keys"), "the counts"),
    "a count that is negative": (lambda h: h["counts"].update(keys=-1), "count of keys"),
    "a count that is enormous": (lambda h: h["counts"].update(sums=1 << 70), "count of sums"),
    "a count that is true": (lambda h: h["counts"].update(rank=True), "count of rank"),
    "a count that is a float": (lambda h: h["counts"].update(rank=2.0), "count of rank"),
    "too many dimensions": (lambda h: h["counts"].update(rank=65), "0 to 64"),
    "more chunks than bytes": (lambda h: h["counts"].update(chunks=500), "within"),
    "fewer sums than bytes": (lambda h: h["counts"].update(sums=1), "a manifest of"),
    "transforms of some rows": (lambda h: h["counts"].update(transformed=1), "row for each"),
    "paths of some rows": (lambda h: h["counts"].update(pathed=1), "row for each"),
    "no properties": (lambda h: h.pop("properties"), "properties"),
    "properties of no dtype": (lambda h: h["properties"][0].__setitem__(0, "torch.os"), "torch.os"),
    "too few properties": (lambda h: h["properties"][0].pop(), "unpack"),
    "properties of other types": (lambda h: h["properties"][0].__setitem__(2, 1), "properties"),
    "properties that are a number": (lambda h: h.update(properties=3), "iterable"),
    "blocks of a text": (lambda h: h.update(block_bytes="8"), "blocks"),
    "transforms of numbers": (lambda h: h.update(transforms=[[3]]), "a string"),
    "words of no kind": (lambda h: h["said"].update(version=["magic", 3]), "magic"),
    "a version that is a number": (lambda h: h["said"].update(version=["value", 3]), "a string"),
    "a value too many": (lambda h: h["said"].update(version=["value", "1", "2"]), "argument"),
    "nothing said": (lambda h: h["said"].update(version=[]), "unpack"),
    "paths of storage": (lambda h: h["said"].update(storage_meta=["paths"]), "paths"),
    "a folder of no kind": (
        lambda h: h["said"]["storage_meta"][1].update(checkpoint_id=["os", "/"]),
        "checkpoint_id",
    ),
    "the pickle without need": (lambda h: h["said"].update(version=["pickle"]), "asked for"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_of_other_things_is_refused(case: str) -> None:
    damage, expected = HEADERS[case]

    with pytest.raises(CheckpointCorruptError, match=expected):
        decoded(_with_header(manifest_columns.encode(two_tensors()), damage))


def _with_header(data: bytes, damage: Callable[[dict[str, Any]], Any]) -> bytes:
    (length,) = struct.unpack_from("<Q", data, 8)
    header = json.loads(data[16 : 16 + length])
    damage(header)
    text = json.dumps(header).encode()
    columns = data[16 + length + -length % 8 :]
    return b"".join([data[:8], struct.pack("<Q", len(text)), text, bytes(-len(text) % 8), columns])


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"3", b"\xff{}", b"[" * 100_000, b'{"counts": ' + b"9" * 5000 + b"}"]
)
def test_a_header_that_is_none_is_refused(text: bytes) -> None:
    data = b"".join(
        [manifest_columns.MAGIC, struct.pack("<Q", len(text)), text, bytes(-len(text) % 8)]
    )

    with pytest.raises(CheckpointCorruptError):
        decoded(data)


@pytest.mark.parametrize("length", [1 << 20, manifest_columns.MAX_HEADER_BYTES + 1, (1 << 64) - 1])
def test_a_header_beyond_the_buffer_is_refused(length: int) -> None:
    data = bytearray(manifest_columns.encode(two_tensors()))
    struct.pack_into("<Q", data, 8, length)

    with pytest.raises(CheckpointCorruptError, match="a header within"):
        decoded(bytes(data))


PATHS = {
    "forms beyond the known": (b"", 7),
    "a form of no words": (b'{"forms":[[0]],"extra":[]}', 0),
    "an empty form": (b'{"forms":[[]],"extra":[]}', 0),
    "a form of too many words": (b'{"forms":[[2]],"extra":[]}', 0),
    "a form with an int where there is none": (b'{"forms":[[-1]],"extra":[]}', 0),
    "a form of a text": (b'{"forms":["ab"],"extra":[]}', 0),
    "a path that is a text": (b'{"forms":[],"extra":[["x","y"]]}', -1),
    "a path of floats": (b'{"forms":[],"extra":[["x",[0.5]]]}', -1),
    "a name that is a number": (b'{"forms":[],"extra":[[3,["y"]]]}', -1),
    "a name twice": (b'{"forms":[],"extra":[["x",["y"]],["x",["z"]]]}', -1),
    "a name of the index again": (b'{"forms":[[1]],"extra":[["a",["y"]]]}', 0),
    "no paths": (b"{}", -1),
    "no JSON": (b"{", -1),
}


@pytest.mark.parametrize("case", PATHS)
def test_paths_that_do_not_fit_are_refused(case: str) -> None:
    text, form = PATHS[case]
    data = manifest_columns.encode(replace(two_tensors(), planner_data={}))
    own = b'{"forms":[],"extra":[]}'
    text = text or own
    at = data.rindex(own)
    rows = at - 16  # three int32, padded to 16 bytes
    data_of_case = b"".join(
        [data[:rows], struct.pack("<3i4x", form, form, form), text, bytes(-len(text) % 8)]
    )

    with pytest.raises(CheckpointCorruptError):
        decoded(
            _with_header(data_of_case, lambda header: header["counts"].update(path_bytes=len(text)))
        )


@pytest.mark.parametrize("name", ["x", "a/b", "__0_0.distcp", "..x", "a/...", "ü \n", ".metadata"])
def test_a_name_inside_the_folder_is_a_data_file(name: str) -> None:
    assert checked_path(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/",
        "/etc/passwd",
        "..",
        "../x",
        "a/../b",
        "a/..",
        ".",
        "./a",
        "a//b",
        "a/",
        "a\0",
        "a" * 4096,
    ],
)
def test_a_name_outside_the_folder_is_refused(name: str) -> None:
    with pytest.raises(CheckpointCorruptError, match="inside the checkpoint's folder"):
        checked_path(name)
