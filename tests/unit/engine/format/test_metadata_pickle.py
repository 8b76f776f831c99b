import pickle
import pickletools
from collections import OrderedDict
from typing import Any

import torch
from hypothesis import given
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.metadata_pickle import MARK_OF_OURS, MARK_WITHIN, pickle_metadata
from pytest_dcp._engine.plan.nested import Position
from pytest_dcp._engine.unpickle import read_metadata
from support.catalogs import Sample, describe_fields, samples


def metadata(chunks: int, dims: int = 2, transform: bool = False) -> Metadata:
    """Two sharded tensors with a byte value between them."""
    entries: dict[str, Any] = {}
    storage = {}
    for fqn in ("a.weight", "b.weight"):
        boxes = [
            ChunkStorageMetadata(torch.Size([i, *[0] * (dims - 1)]), torch.Size([1] * dims))
            for i in range(chunks)
        ]
        size = torch.Size([chunks, *[1] * (dims - 1)])
        entries[fqn] = TensorStorageMetadata(TensorProperties(torch.float32), size, boxes)
        for i, box in enumerate(boxes):
            info = _StorageInfo(
                f"__{i % 3}_0.distcp", 100 * i, 100, ["zstd"] if transform else None
            )
            storage[MetadataIndex(fqn, box.offsets, i)] = info
        entries[f"{fqn}.step"] = BytesStorageMetadata()
        storage[MetadataIndex(f"{fqn}.step")] = _StorageInfo("__0_0.distcp", 7, 8)
    paths = {fqn: tuple(fqn.split(".")) for fqn in entries}
    return Metadata(entries, paths, storage, StorageMeta("/tmp/x", "1"), "1.0.0")


def reloaded(stock: Metadata) -> Any:
    """The metadata after a round trip through the stock pickler and unpickler."""
    return describe_fields(pickle.loads(pickle.dumps(stock)))


@given(samples())
def test_unpickles_to_the_object_that_torch_would_have_pickled(sample: Sample) -> None:
    loaded = pickle.loads(pickle_metadata(sample.catalog))

    assert loaded == sample.stock
    assert describe_fields(loaded) == reloaded(sample.stock)


@given(samples())
def test_every_unpickler_agrees(sample: Sample) -> None:
    data = pickle_metadata(sample.catalog)

    assert describe_fields(pickle._loads(data)) == reloaded(sample.stock)  # type: ignore[attr-defined]  # in Python
    assert describe_fields(read_metadata(data)) == reloaded(sample.stock)
    assert list(pickletools.genops(data))[-1][0].name == "STOP"


def test_more_items_than_a_batch_or_a_block_keep_their_order() -> None:
    stock = metadata(chunks=7001)

    assert describe_fields(pickle.loads(pickle_metadata(Catalog.of(stock)))) == reloaded(stock)


def test_more_keys_than_a_batch_keep_their_order() -> None:
    entries: dict[str, Any] = {f"k{i}": BytesStorageMetadata() for i in range(2001)}
    stock = Metadata(entries, None, {}, None, None)

    assert describe_fields(pickle.loads(pickle_metadata(Catalog.of(stock)))) == reloaded(stock)


def test_many_dimensions_and_transforms_survive() -> None:
    stock = metadata(chunks=3, dims=7, transform=True)

    assert describe_fields(pickle.loads(pickle_metadata(Catalog.of(stock)))) == reloaded(stock)


def test_says_within_its_first_bytes_that_a_manifest_follows() -> None:
    assert MARK_OF_OURS in pickle_metadata(Catalog.of(metadata(1)))[:MARK_WITHIN]


def test_any_object_of_a_planner_is_pickled_as_it_is() -> None:
    shared = [1, 2]
    stock = metadata(2)
    stock.planner_data = OrderedDict(a=shared, b=shared, paths={"x": ("x", 0)})

    loaded = pickle.loads(pickle_metadata(Catalog.of(stock)))

    assert describe_fields(loaded) == reloaded(stock)
    assert loaded.planner_data["a"] is loaded.planner_data["b"]


def test_positions_in_lists_become_plain_ints() -> None:
    stock = metadata(1)
    stock.planner_data = {"layers.0": ("layers", Position(0)), "flag": (True,)}

    loaded = pickle.loads(pickle_metadata(Catalog.of(stock)))

    assert describe_fields(loaded.planner_data) == describe_fields(
        {"layers.0": ("layers", 0), "flag": (True,)}
    )


def test_equal_properties_are_not_one_object() -> None:
    loaded = pickle.loads(pickle_metadata(Catalog.of(metadata(1))))
    a, b = (loaded.state_dict_metadata[fqn].properties for fqn in ("a.weight", "b.weight"))

    assert a == b
    assert a is not b


def test_names_are_shared_as_the_stock_pickler_shares_them() -> None:
    loaded = pickle.loads(pickle_metadata(Catalog.of(metadata(2))))
    keys = {fqn: fqn for fqn in loaded.state_dict_metadata}

    assert all(key.fqn is keys[key.fqn] for key in loaded.storage_data)


def test_numbers_beyond_32_bits_survive() -> None:
    stock = metadata(3)
    for number, info in enumerate(stock.storage_data.values()):
        info.offset = (1 << 31) - 1 + number
        info.length = (1 << 62) + number

    assert describe_fields(pickle.loads(pickle_metadata(Catalog.of(stock)))) == reloaded(stock)


def test_is_not_longer_than_the_stock_pickle() -> None:
    stock = metadata(chunks=500)

    assert len(pickle_metadata(Catalog.of(stock))) <= len(pickle.dumps(stock))
