import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.plan.index import ChunkList, Index, KeyTable, index_of
from support.catalogs import samples
from support.tilings import fewer


def chunk(offset: tuple, shape: tuple) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))


def two_tensors() -> dict:
    properties = TensorProperties(torch.float32)
    return {
        "a": TensorStorageMetadata(
            properties, torch.Size((4,)), [chunk((0,), (2,)), chunk((2,), (2,))]
        ),
        "b": TensorStorageMetadata(replace(properties), torch.Size((4,)), [chunk((0,), (4,))]),
        "c": BytesStorageMetadata(),
    }


def equal(left: Index, right: Index) -> bool:
    return dict(KeyTable(left)) == dict(KeyTable(right)) and left.fqns == right.fqns


@fewer(8)
@given(samples())
def test_a_table_equals_the_mapping_that_it_was_made_from(sample):
    keys = sample.stock.state_dict_metadata
    table = KeyTable(Index.of(keys))
    assert all(fqn in table for fqn in keys)
    assert dict(table) == keys
    assert keys == dict(table)
    assert list(table) == list(keys)
    assert len(table) == len(keys)
    assert all(fqn in table for fqn in keys)
    assert "no such name" not in table
    assert pickle.loads(pickle.dumps(table)) == keys
    assert type(pickle.loads(pickle.dumps(table))) is dict
    assert repr(table) == repr(keys)


@fewer(8)
@given(samples())
def test_looking_at_every_key_keeps_the_index(sample):
    index = Index.of(sample.stock.state_dict_metadata)
    table = KeyTable(index)
    for value in table.values():
        if isinstance(value, TensorStorageMetadata):
            assert list(value.chunks) is not None
    assert index_of(Metadata(table)) is index


@fewer(8)
@given(samples())
def test_the_columns_equal_the_objects(sample):
    index = Index.of(sample.stock.state_dict_metadata)
    row = 0
    for at, (fqn, value) in enumerate(sample.stock.state_dict_metadata.items()):
        assert index.fqns[at] == fqn
        assert index.row_of[fqn] == at
        chunks = value.chunks if isinstance(value, TensorStorageMetadata) else [None]
        for one in chunks:
            assert index.key_of[row] == at
            assert one is None or index.chunk(row) == one
            row += 1
        tensor = isinstance(value, TensorStorageMetadata)
        assert index.itemsize[at] == (value.properties.dtype.itemsize if tensor else 1)
    assert index.first[-1] == len(index.offset) == row


@fewer(8)
@given(st.data(), samples())
def test_a_chunk_list_is_changed_as_a_list(data, sample):
    found = [v for v in sample.stock.state_dict_metadata.values() if hasattr(v, "chunks")]
    index = Index.of({str(n): value for n, value in enumerate(found)})
    for n, value in enumerate(found):
        mine, expected = ChunkList(index, n), list(value.chunks)
        assert mine == expected
        assert expected == mine
        assert mine[::-1] == expected[::-1]
        new = chunk((0,), (1,))
        where = data.draw(st.integers(-3, 3))
        mine.insert(where, new)
        expected.insert(where, new)
        assert mine[where:] == expected[where:]
        mine[0] = expected[0] = chunk((7,), (7,))
        del mine[-1], expected[-1]
        mine.append(new)
        expected.append(new)
        assert list(mine) == expected
        assert len(mine) == len(expected)
        assert pickle.loads(pickle.dumps(mine)) == expected
        assert type(pickle.loads(pickle.dumps(mine))) is list


def set_size(table):
    table["a"].size = torch.Size((9,))


def set_dtype(table):
    table["a"].properties.dtype = torch.float64


def set_properties(table):
    table["a"].properties = TensorProperties(torch.int8)


def add_chunk(table):
    table["a"].chunks.append(chunk((4,), (1,)))


def set_chunks(table):
    table["a"].chunks = [chunk((0,), (4,))]


def drop_key(table):
    del table["b"]


def pop_key(table):
    table.pop("a")


def add_key(table):
    table["d"] = BytesStorageMetadata()


def make_value(table):
    table["a"] = BytesStorageMetadata()


def clear(table):
    table.clear()


def update(table):
    table.update({"a": BytesStorageMetadata(), "z": BytesStorageMetadata()})


def take_chunks_of_another_key(table):
    table["a"].chunks = table["b"].chunks


def set_sizes_of_a_chunk(table):
    table["a"].chunks[0].sizes = torch.Size((1,))


EDITS = [
    set_size,
    set_dtype,
    set_properties,
    add_chunk,
    set_chunks,
    drop_key,
    pop_key,
    add_key,
    make_value,
    clear,
    update,
    pytest.param(
        take_chunks_of_another_key,
    ),
    pytest.param(
        set_sizes_of_a_chunk,
    ),
]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("looked", [False, True])
def test_no_edit_of_a_planner_is_lost(edit, looked):
    plain, table = two_tensors(), KeyTable(Index.of(two_tensors()))
    if looked:
        assert dict(table) == plain
    edit(plain)
    edit(table)
    assert dict(table) == plain
    assert equal(index_of(Metadata(table)), Index.of(plain))
    assert pickle.loads(pickle.dumps(table)) == plain


def test_a_changed_value_stays_changed_beside_a_change_of_the_table():
    table = KeyTable(Index.of(two_tensors()))
    table["a"].size = torch.Size((9,))
    table["z"] = BytesStorageMetadata()
    assert table["a"].size == (9,)
    assert list(table) == ["a", "b", "c", "z"]


def test_a_missing_key_raises():
    table = KeyTable(Index.of(two_tensors()))
    for _ in range(2):
        with pytest.raises(KeyError):
            table["no such key"]
        del table["b"]
        with pytest.raises(KeyError):
            table["b"]
        table["b"] = BytesStorageMetadata()


def test_metadata_of_other_planners_is_read_from_its_objects():
    keys = two_tensors()
    index = index_of(Metadata(keys))
    assert dict(KeyTable(index)) == keys
    assert np.array_equal(index.first, [0, 2, 3, 4])
    assert len(index_of(Metadata({}))) == 0


def test_a_deep_copy_of_the_table_is_independent():
    table = KeyTable(Index.of(two_tensors()))
    again = copy.deepcopy(table)
    again["a"].chunks.clear()
    assert table == two_tensors()
