import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from pytest_dcp._engine.plan.columns import ReadItems, WriteItems
from support.catalogs import fqns, properties
from support.tilings import boxes_in, fewer, shapes

hints = st.one_of(st.none(), st.integers(0, 9))


def told(index: MetadataIndex) -> tuple:
    """All of a key, the hint that its comparison leaves out as well."""
    return index.fqn, index.offset, index.index


@st.composite
def write_items(draw) -> WriteItem:
    fqn = draw(fqns)
    if not draw(st.integers(0, 3)):
        nbytes = draw(st.one_of(st.none(), st.integers(0, 1 << 40)))
        known = None if nbytes is None else BytesIOWriteData(nbytes)
        return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO, bytes_io_data=known)
    size = draw(shapes())
    offset, sides = draw(boxes_in(size))
    chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(sides))
    data = TensorWriteData(chunk, draw(properties), torch.Size(size))
    kind = draw(st.sampled_from([WriteItemType.TENSOR, WriteItemType.SHARD]))
    return WriteItem(MetadataIndex(fqn, offset, draw(hints)), kind, tensor_data=data)


@st.composite
def read_items(draw) -> ReadItem:
    fqn, stored = draw(fqns), draw(fqns)
    if not draw(st.integers(0, 3)):
        zero = torch.Size((0,))
        keys = MetadataIndex(fqn), MetadataIndex(stored)
        return ReadItem(LoadItemType.BYTE_IO, keys[0], zero, keys[1], zero, zero)
    rank = draw(st.integers(0, 3))
    a, b, c, d, e = (
        torch.Size(draw(st.lists(st.integers(0, 9), min_size=rank, max_size=rank)))
        for _ in range(5)
    )
    return ReadItem(
        LoadItemType.TENSOR,
        MetadataIndex(fqn, a, draw(hints)),
        b,
        MetadataIndex(stored, c, draw(hints)),
        d,
        e,
    )


def hint_of(item):
    if isinstance(item, WriteItem):
        return told(item.index)
    return told(item.dest_index), told(item.storage_index)


tables = st.one_of(
    st.lists(write_items(), max_size=6).map(lambda items: (items, WriteItems.of(items))),
    st.lists(read_items(), max_size=6).map(lambda items: (items, ReadItems.of(items))),
)


@fewer(6)
@given(tables)
def test_a_table_equals_the_list_that_it_was_made_from(pair):
    items, table = pair
    assert len(table) == len(items)
    assert list(table) == items
    assert table == items
    assert items == table
    assert list(map(hint_of, table)) == list(map(hint_of, items))


@fewer(6)
@given(tables)
def test_a_pickled_table_comes_back_equal(pair):
    items, table = pair
    again = pickle.loads(pickle.dumps(table))
    assert type(again) is type(table)
    assert again == items
    assert list(map(hint_of, again)) == list(map(hint_of, items))


@fewer(6)
@given(tables, st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([-2, -1, 1, 2, None]))
def test_a_table_is_indexed_and_sliced_as_a_list(pair, start, stop, step):
    items, table = pair
    assert table[start:stop:step] == items[start:stop:step]
    try:
        expected = items[start]
    except IndexError:
        with pytest.raises(IndexError):
            table[start]
    else:
        assert table[start] == expected


@fewer(6)
@given(tables)
def test_tables_and_lists_are_joined_to_lists(pair):
    items, table = pair
    assert table + items == items + items
    assert items + table == items + items
    assert list(reversed(table)) == items[::-1]


def test_a_table_differs_from_a_list_with_another_item():
    one, other = (WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in "ab")
    assert WriteItems.of([one]) != [other]
    assert WriteItems.of([one]) != [one, other]
    assert WriteItems.of([one]) != 7


@fewer(6)
@given(st.data(), tables)
def test_rows_that_are_taken_are_the_items_of_these_rows(data, pair):
    items, table = pair
    rows = data.draw(st.lists(st.sampled_from(range(len(items))))) if items else []
    taken = table.take(np.array(rows, dtype=np.int64))
    assert taken == [items[row] for row in rows]
    assert pickle.loads(pickle.dumps(taken)) == [items[row] for row in rows]


@fewer(6)
@given(st.lists(write_items(), max_size=5))
def test_rows_are_taken_with_other_hints(items):
    table = WriteItems.of(items)
    tensors = [row for row, item in enumerate(items) if item.tensor_data is not None]
    rows, wanted = np.array(tensors, dtype=np.int64), np.arange(len(tensors)) + 3
    taken = table.take(rows, wanted)
    assert [item.index.index for item in taken] == wanted.tolist()
    assert taken.origin is not None
    assert taken.origin.table is table
    assert pickle.loads(pickle.dumps(taken)).origin is None


@fewer(6)
@given(st.lists(write_items(), max_size=5))
def test_sizes_are_those_of_the_boxes_and_of_values_at_least_a_byte(items):
    expected = []
    for item in items:
        if item.tensor_data is None:
            known = item.bytes_io_data.nbytes if item.bytes_io_data else 1
            expected.append(max(known, 1))
        else:
            chunk, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
            expected.append(chunk.sizes.numel() * dtype.itemsize)
    assert WriteItems.of(items).size_bytes().tolist() == expected


def test_a_table_of_a_table_is_itself():
    writes, reads = WriteItems.of([]), ReadItems.of([])
    assert WriteItems.of(writes) is writes
    assert ReadItems.of(reads) is reads
