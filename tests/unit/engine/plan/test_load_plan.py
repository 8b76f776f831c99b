from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType

from pytest_dcp._engine.plan import load
from pytest_dcp._engine.plan.boxes import pad_rows
from pytest_dcp._engine.plan.columns import ReadItems
from pytest_dcp._engine.plan.describe import Wanted
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.load import read_items
from pytest_dcp.errors import CheckpointCorruptError
from support.tilings import Box, boxes_in, elements, fewer, shapes, tilings

Tensors = dict[str, tuple[tuple, list[Box]]]


def index_of(tensors: Tensors, values: tuple[str, ...] = ()) -> Index:
    keys = {
        fqn: TensorStorageMetadata(
            TensorProperties(torch.float32),
            torch.Size(size),
            [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in boxes],
        )
        for fqn, (size, boxes) in tensors.items()
    }
    return Index.of(keys | dict.fromkeys(values, BytesStorageMetadata()))


def wanted_of(boxes: list[tuple[str, Box | None]]) -> Wanted:
    """The boxes of these names; None: a value."""
    rank = max((len(box[0]) for _, box in boxes if box), default=0)
    seen: dict[str, int] = defaultdict(int)
    nth = []
    for fqn, _ in boxes:
        nth.append(seen[fqn])
        seen[fqn] += 1
    return Wanted(
        fqns=tuple(fqn for fqn, _ in boxes),
        ndim=np.array([-1 if box is None else len(box[0]) for _, box in boxes], dtype=np.int16),
        offset=pad_rows([box[0] if box else () for _, box in boxes], rank, 0),
        shape=pad_rows([box[1] if box else () for _, box in boxes], rank, 1),
        nth=np.array(nth, dtype=np.int64),
    )


@st.composite
def loads(draw) -> tuple[Tensors, list[tuple[str, Box | None]]]:
    tensors: Tensors = {}
    wanted: list[tuple[str, Box | None]] = []
    for n in range(draw(st.integers(0, 3))):
        size = draw(shapes())
        tensors[f"w{n}"] = size, draw(tilings(size))
        boxes = draw(st.lists(boxes_in(size), max_size=3, unique_by=lambda box: box[0]))
        wanted += [(f"w{n}", box) for box in boxes]
    if draw(st.booleans()):
        wanted.append(("value", None))
    return tensors, draw(st.permutations(wanted))


def moved(offset: tuple, by: tuple) -> tuple:
    return tuple(a + b for a, b in zip(offset, by, strict=True))


def check(items: ReadItems, tensors: Tensors, wanted: list) -> None:
    """Each wanted element is read once, from the stored box that has it."""
    filled: dict[tuple, list] = defaultdict(list)
    for item in items:
        if item.type == LoadItemType.BYTE_IO:
            filled[item.dest_index.fqn, None].append(item.storage_index.fqn)
            continue
        fqn, stored = item.dest_index.fqn, tensors[item.storage_index.fqn][1]
        box = stored[item.storage_index.index]
        assert box[0] == tuple(item.storage_index.offset)
        source = elements((moved(box[0], item.storage_offsets), tuple(item.lengths)))
        target = moved(tuple(item.dest_index.offset), item.dest_offsets)
        assert source == elements((target, tuple(item.lengths)))
        assert source <= elements(box)
        filled[fqn, tuple(item.dest_index.offset)] += source
    for fqn, box in wanted:
        found = filled.pop((fqn, None if box is None else box[0]), [])
        if box is None:
            assert found == [fqn]
        else:
            assert len(found) == len(set(found))
            assert set(found) == elements(box)
    assert not filled


@given(loads())
@fewer(2)
def test_each_wanted_element_is_read_once_from_where_it_is_stored(pair):
    tensors, wanted = pair
    items = read_items(wanted_of(wanted), index_of(tensors, ("value",)))
    check(items, tensors, wanted)


@given(loads())
@fewer(4)
def test_the_plan_is_the_same_when_it_is_made_in_small_parts(pair):
    tensors, wanted = pair
    expected = list(read_items(wanted_of(wanted), index_of(tensors, ("value",))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "PAIRS_AT_ONCE", 2)
        assert read_items(wanted_of(wanted), index_of(tensors, ("value",))) == expected


@given(loads())
@fewer(4)
def test_hints_and_entries_lead_to_the_rows_they_name(pair):
    tensors, wanted = pair
    index = index_of(tensors, ("value",))
    table = wanted_of(wanted)
    items = read_items(table, index)
    for row, item in enumerate(items):
        at = int(items.entry[row])
        assert index.fqns[index.key_of[at]] == item.storage_index.fqn
        if item.type == LoadItemType.TENSOR:
            assert index.chunk(at).offsets == item.storage_index.offset
            mine = [box for fqn, box in wanted if fqn == item.dest_index.fqn]
            assert mine[item.dest_index.index][0] == tuple(item.dest_index.offset)


def test_stored_names_may_be_others():
    tensors = {"old": ((4,), [((0,), (2,)), ((2,), (2,))]), "kept": ((1,), [((0,), (1,))])}
    wanted = wanted_of([("new", ((1,), (3,))), ("kept", ((0,), (1,))), ("v", None)])
    items = read_items(wanted, index_of(tensors, ("u",)), {"new": "old", "v": "u"})
    assert items.fqns == ("new", "new", "kept", "v")
    assert items.stored_fqns == ("old", "old", "kept", "u")
    assert [item.storage_index.fqn for item in items] == ["old", "old", "kept", "u"]


@given(st.data(), shapes(min_side=1).filter(len))
@fewer(4)
def test_a_wanted_element_that_no_chunk_holds_is_an_error(data, size):
    boxes = data.draw(tilings(size))
    gone = data.draw(st.sampled_from(boxes))
    wanted = data.draw(boxes_in(size))
    index = index_of({"w": (size, [box for box in boxes if box != gone])})
    if elements(gone) & elements(wanted):
        with pytest.raises(CheckpointCorruptError, match="leave a gap") as caught:
            read_items(wanted_of([("w", wanted)]), index)
        assert caught.value.entry == "w"
    else:
        check(
            read_items(wanted_of([("w", wanted)]), index),
            {"w": (size, [])} | {"w": (size, [box for box in boxes if box != gone])},
            [("w", wanted)],
        )


@pytest.mark.parametrize(
    "boxes",
    [
        [((0,), (3,)), ((2,), (2,))],
        pytest.param(
            [((0,), (2,)), ((1,), (2,))],
        ),
    ],
)
def test_an_element_that_two_chunks_hold_is_an_error(boxes):
    with pytest.raises(CheckpointCorruptError, match="overlap"):
        read_items(wanted_of([("w", ((0,), (4,)))]), index_of({"w": ((4,), boxes)}))


def test_a_wanted_tensor_of_no_dimensions_is_one_element():
    items = read_items(wanted_of([("s", ((), ()))]), index_of({"s": ((), [((), ())])}))
    assert [item.lengths for item in items] == [torch.Size()]
    with pytest.raises(CheckpointCorruptError, match="0 of 1 elements"):
        read_items(wanted_of([("s", ((), ()))]), index_of({"s": ((), [])}))
