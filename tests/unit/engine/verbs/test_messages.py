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
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from pytest_dcp._engine.coordinate.wire import pack, unpack
from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.write_results import WriteColumns, WriteResults
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.verbs.save_messages import (
    CompressedPlan,
    EncodedMetadata,
    change_metadata,
    compress_plan,
    compress_results,
    decode_metadata,
    encode_metadata,
    expand_plan,
    expand_results,
    restore_metadata,
)
from support.catalogs import describe_fields, same, samples
from support.tilings import fewer, shard_item, value_item


def sent(message):
    return unpack([bytes(segment) for segment in pack(message)])


def plain(lazy):
    return pickle.loads(pickle.dumps(lazy))


def local_plan(count: int = 4, **more) -> SavePlan:
    items = [shard_item(f"w{n}", (8,), ((n,), (1,))) for n in range(count)]
    return SavePlan(WriteItems.of([*items, value_item("v")]), **more)


@given(st.lists(st.integers(0, 4), unique=True).map(sorted), st.booleans())
@fewer(4)
def test_a_global_plan_comes_home_as_row_numbers(rows, same_data):
    local = local_plan(planner_data={"a": ("a",)})
    items = local.items.take(np.array(rows, dtype=np.int64), np.array(rows, dtype=np.int64) + 5)
    data = local.planner_data if same_data else {"other": ("b",)}
    plan = replace(local, items=items, planner_data=data, storage_data="files")
    message = compress_plan(plan, local)
    assert isinstance(message, CompressedPlan)
    assert message.plan.items == []
    back = expand_plan(sent(message), local)
    assert back.items == items
    assert [back.items.key(n).index for n in range(len(rows))] == [
        items.key(n).index for n in range(len(rows))
    ]
    assert (back.planner_data, back.storage_data) == (data, "files")
    assert (back.planner_data is local.planner_data) == same_data


def test_a_plan_of_other_items_is_sent_in_full():
    local, other = local_plan(), local_plan()
    for items in (list(local.items), other.items, other.items.take(np.array([1]))):
        plan = replace(local, items=items)
        assert compress_plan(plan, local) is plan
        assert expand_plan(sent(plan), local).items == items


def test_a_rank_may_have_nothing_to_write():
    local = local_plan()
    plan = replace(local, items=local.items.take(np.zeros(0, dtype=np.int64)))
    assert len(expand_plan(sent(compress_plan(plan, local)), local).items) == 0


def results(plan: SavePlan) -> WriteResults:
    column = np.arange(len(plan.items), dtype=np.int64)
    written = WriteColumns(
        files=("f", "g"),
        file=(column % 2).astype(np.int32),
        start=column,
        length=column + 1,
        data_start=column,
        data_nbytes=column,
        first_sum=np.zeros(len(column) + 1, np.int64),
        sums=np.zeros(0, np.uint32),
    )
    return WriteResults(plan.items, written)


def test_only_the_places_of_known_items_are_sent_back():
    told_plan = local_plan()
    wrote = results(told_plan)
    message = compress_results(wrote, told_plan)
    assert isinstance(message, WriteColumns)
    assert list(expand_results(sent(message), local_plan())) == list(wrote)
    with pytest.raises(ValueError, match="no plan"):
        expand_results(message, None)


def test_results_of_other_items_are_sent_in_full():
    wrote = results(local_plan())
    assert compress_results(wrote, local_plan()) is wrote
    listed = list(wrote)
    assert compress_results(listed, local_plan()) is listed
    assert expand_results(sent(listed), None) == listed


@given(samples())
@fewer(8)
def test_metadata_comes_home_as_it_was(sample):
    metadata = sample.catalog.metadata()
    message = encode_metadata(metadata)
    assert isinstance(message, EncodedMetadata)
    back = decode_metadata(sent(message))
    assert same(Catalog.of(back), sample.catalog)
    copy = replace(
        back,
        state_dict_metadata=plain(back.state_dict_metadata),
        storage_data=plain(back.storage_data),
        planner_data=sample.stock.planner_data,
    )
    expected = Metadata(
        sample.stock.state_dict_metadata,
        sample.stock.planner_data,
        sample.stock.storage_data,
        sample.stock.storage_meta,
    )
    assert describe_fields(copy.state_dict_metadata) == describe_fields(
        expected.state_dict_metadata
    )
    assert copy.storage_data == expected.storage_data


def many_chunks(count: int) -> Catalog:
    size, shape = torch.Size((count,)), torch.Size((1,))
    chunks = [ChunkStorageMetadata(torch.Size((n,)), shape) for n in range(count)]
    index = Index.of({"w": TensorStorageMetadata(TensorProperties(torch.float32), size, chunks)})
    start = np.arange(count) * 1000
    places = replace(
        EntryPlaces.nowhere(count),
        files=("f",),
        file=np.zeros(count, np.int32),
        start=start,
        length=np.full(count, 1000),
        data_start=start + 64,
        data_nbytes=np.full(count, 4),
        first_sum=np.arange(count + 1),
        sums=np.random.default_rng(0).integers(0, 1 << 32, count, dtype=np.uint32),
    )
    return Catalog(index, places)


def test_metadata_for_peers_has_all_but_the_checksums():
    catalog = many_chunks(10)
    back = decode_metadata(sent(encode_metadata(catalog.metadata(), sums=False)))
    assert dict(back.storage_data) == dict(catalog.metadata().storage_data)
    assert same(Catalog.of(back), replace(catalog, places=catalog.places.without_sums()))


def test_metadata_of_many_chunks_is_compressed():
    catalog = many_chunks(20_000)
    whole = encode_metadata(catalog.metadata())
    bare = encode_metadata(catalog.metadata(), sums=False)
    assert isinstance(bare, EncodedMetadata)
    assert bare.compressed_from > 5 * len(bare.manifest)
    assert same(Catalog.of(decode_metadata(sent(whole))), catalog)
    assert dict(decode_metadata(sent(bare)).storage_data) == dict(catalog.metadata().storage_data)


@pytest.mark.parametrize("length", [-1, +1])
def test_compressed_metadata_of_another_length_is_refused(length: int):
    message = encode_metadata(many_chunks(20_000).metadata())
    wrong = replace(message, compressed_from=message.compressed_from + length)
    with pytest.raises(ValueError, match="compressed bytes, got"):
        decode_metadata(wrong)
    for manifest in (message.manifest[:-9], b"no deflated bytes", b""):
        with pytest.raises(ValueError, match="compressed bytes, got"):
            decode_metadata(replace(message, manifest=manifest))


@given(samples())
@fewer(8)
def test_metadata_of_other_storages_is_sent_as_it_is(sample):
    message = encode_metadata(sample.stock)
    assert message is sample.stock
    assert decode_metadata(message) is sample.stock


@given(samples())
@fewer(8)
def test_an_edit_of_the_keys_is_sent_as_well(sample):
    if (sample.catalog.places.file < 0).any():
        return  # see the next test
    metadata = sample.catalog.metadata()
    metadata.state_dict_metadata["added by a planner"] = BytesStorageMetadata()
    back = decode_metadata(sent(encode_metadata(metadata)))
    assert dict(back.state_dict_metadata) == dict(metadata.state_dict_metadata)
    assert "added by a planner" in back.state_dict_metadata


def test_an_edit_of_the_keys_is_sent_where_some_chunks_have_no_file():
    entry = TensorStorageMetadata(
        TensorProperties(torch.float32),
        torch.Size((1,)),
        [ChunkStorageMetadata(torch.Size((0,)), torch.Size((1,)))],
    )
    keys = {"a": entry, "b": BytesStorageMetadata()}
    places = replace(EntryPlaces.nowhere(2), files=("f",), file=np.array([-1, 0], np.int32))
    start = np.array([-1, 0])
    metadata = Catalog(Index.of(keys), replace(places, start=start, length=start)).metadata()
    assert metadata.storage_data.get(MetadataIndex("a", (0,))) is None
    del metadata.state_dict_metadata["b"]
    assert dict(decode_metadata(sent(encode_metadata(metadata))).state_dict_metadata) == {
        "a": entry
    }


@given(samples())
@fewer(8)
def test_metadata_of_other_storages_arrives_as_it_was(sample):
    assert sent(sample.stock) == sample.stock


def renamed(catalog: Catalog) -> Catalog:
    """The catalog of another save of the same state."""
    files = tuple(f"{name[:-1]}x" for name in catalog.places.files)
    return replace(catalog, places=replace(catalog.places, files=files))


@pytest.mark.parametrize("count", [1, 10, 20_000])
def test_a_later_metadata_comes_home_from_its_difference(count: int):
    paths = {"w": ("w",), "v": ("v",)}
    base = replace(many_chunks(count), planner_data=paths)
    later = replace(renamed(base), version="later")
    messages = [encode_metadata(one.metadata(), sums=False) for one in (base, later)]
    change = sent(change_metadata(messages[1], messages[0]))
    assert len(change.difference) < 200
    back = decode_metadata(restore_metadata(change, messages[0]))
    expected = decode_metadata(messages[1])
    assert same(Catalog.of(back), Catalog.of(expected))
    assert (back.planner_data, back.version) == (paths, "later")
    assert back.planner_data is not paths


def test_a_metadata_with_other_paths_or_of_another_length_has_no_difference():
    base = replace(many_chunks(300), planner_data={"w": ("w",), "v": ("v",)})
    longer = replace(base, places=replace(base.places, files=("a longer name" * 9,)))
    others = [
        replace(base, planner_data={"v": ("v",), "w": ("w",)}),
        replace(base, planner_data=None),
        longer,
    ]
    first = encode_metadata(base.metadata())
    for other in others:
        assert change_metadata(encode_metadata(other.metadata()), first) is None


def test_a_difference_from_another_metadata_is_refused():
    base, other = (encode_metadata(many_chunks(count).metadata()) for count in (300, 301))
    change = change_metadata(encode_metadata(renamed(many_chunks(300)).metadata()), base)
    with pytest.raises(ValueError, match="changed from one that this rank does not have"):
        restore_metadata(change, other)
