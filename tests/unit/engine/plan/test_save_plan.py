import pickle
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.index import KeyTable
from pytest_dcp._engine.plan.save import concatenate_tables, global_plan
from pytest_dcp.errors import PlanError
from support.tilings import elements, fewer, shapes, shard_item, tilings, value_item

DTYPES = [torch.float32, torch.int8, torch.float64]


@st.composite
def rank_plans(draw) -> list[list[WriteItem]]:
    """Items of one to four ranks: tensors that they tile together, replicas and values."""
    ranks = draw(st.integers(1, 4))
    plans: list[list[WriteItem]] = [[] for _ in range(ranks)]
    owners = st.lists(st.integers(0, ranks - 1), min_size=1, max_size=ranks, unique=True)
    for n in range(draw(st.integers(0, 5))):
        if not draw(st.integers(0, 3)):
            for rank in draw(owners):
                plans[rank].append(value_item(f"value.{n}"))
            continue
        size, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
        for box in draw(tilings(size)):
            for rank in draw(owners):
                plans[rank].append(shard_item(f"w.{n}", size, box, dtype))
    return [draw(st.permutations(plan)) for plan in plans]


def nbytes_of(item: WriteItem) -> int:
    data = item.tensor_data
    return 1 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


def groups_of(plans: list[list[WriteItem]]) -> dict[tuple, dict[int, WriteItem]]:
    """The ranks that have each box."""
    groups: dict[tuple, dict[int, WriteItem]] = defaultdict(dict)
    for rank, plan in enumerate(plans):
        for item in plan:
            groups[item.index.fqn, item.index.offset][rank] = item
    return groups


def tables_of(plans: list[list[WriteItem]]) -> list[WriteItems]:
    return [WriteItems.of(plan) for plan in plans]


@given(rank_plans(), st.booleans())
@fewer(4)
def test_each_box_is_kept_once_by_a_rank_that_has_it(plans, to_lowest):
    plan = global_plan(tables_of(plans), to_lowest_rank=to_lowest)
    kept = [
        (item.index.fqn, item.index.offset, rank)
        for rank, table in enumerate(plan.tables)
        for item in table
    ]
    groups = groups_of(plans)
    assert sorted(map(str, groups)) == sorted(str(key[:2]) for key in kept)
    for fqn, offset, rank in kept:
        assert rank in groups[fqn, offset]
        if to_lowest:
            assert rank == min(groups[fqn, offset])


@given(rank_plans())
@fewer(4)
def test_each_rank_keeps_its_own_rows_in_its_own_order(plans):
    plan = global_plan(tables_of(plans))
    for own, rows, table in zip(plans, plan.rows, plan.tables, strict=True):
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert list(table) == [own[row] for row in rows.tolist()]


@given(rank_plans())
@fewer(4)
def test_every_hint_leads_to_the_items_own_chunk_of_the_metadata(plans):
    plan = global_plan(tables_of(plans))
    keys = KeyTable(plan.index)
    for table in plan.tables:
        for item in table:
            value = keys[item.index.fqn]
            if item.type == WriteItemType.BYTE_IO:
                assert item.index.index is None
                assert value == BytesStorageMetadata()
            else:
                assert value.chunks[item.index.index] == item.tensor_data.chunk
                assert value.size == item.tensor_data.size
                assert value.properties == item.tensor_data.properties
    seen = {item.index.fqn for own in plans for item in own}
    assert set(keys) == seen


@given(rank_plans())
@fewer(4)
def test_no_rank_writes_more_than_its_fair_share_and_one_box(plans):
    plan = global_plan(tables_of(plans))
    load = [sum(map(nbytes_of, table)) for table in plan.tables]
    groups = groups_of(plans)
    total = sum(nbytes_of(next(iter(owners.values()))) for owners in groups.values())
    assert sum(load) == total
    # A naive greedy of the same order: alone first, then the largest to the least burdened.
    expected = [0] * len(plans)
    shared = []
    for owners in groups.values():
        ranks = sorted(owners)
        size = nbytes_of(owners[ranks[0]])
        if len(ranks) == 1:
            expected[ranks[0]] += size
        else:
            shared.append((size, ranks))
    for size, ranks in sorted(shared, key=lambda one: -one[0]):
        expected[min(ranks, key=expected.__getitem__)] += size
    largest = max((size for size, _ in shared), default=0)
    assert max(load) <= max(expected) + largest


@given(rank_plans())
@fewer(4)
def test_the_same_plans_come_from_pickled_tables(plans):
    tables = tables_of(plans)
    plan, again = global_plan(tables), global_plan(pickle.loads(pickle.dumps(tables)))
    assert all(a == b for a, b in zip(plan.tables, again.tables, strict=True))
    assert dict(KeyTable(plan.index)) == dict(KeyTable(again.index))


@given(rank_plans(), st.data())
@fewer(4)
def test_a_box_that_no_rank_has_is_missed_and_named(plans, data):
    groups = groups_of(plans)
    tensors = [key for key in groups if key[1] is not None]
    if not tensors:
        return
    gone = data.draw(st.sampled_from(tensors))
    left = [[item for item in p if (item.index.fqn, item.index.offset) != gone] for p in plans]
    (box,) = {
        (tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes))
        for item in groups[gone].values()
    }
    if elements(box) and any(key[0] == gone[0] for key in groups if key != gone):
        with pytest.raises(PlanError, match=f"key:{gone[0]} invalid fill"):
            global_plan(tables_of(left))
    global_plan(tables_of(left), complete=False)


def test_ranks_may_have_nothing_to_write():
    plan = global_plan([WriteItems.of([]), WriteItems.of([])])
    assert [len(table) for table in plan.tables] == [0, 0]
    assert len(plan.index) == 0


def whole(fqn: str, size: tuple, dtype=torch.float32) -> WriteItem:
    return shard_item(fqn, size, ((0,) * len(size), size), dtype, WriteItemType.TENSOR)


DISAGREEMENTS = [
    ([whole("w", (4,))], [value_item("w")], "kind"),
    ([whole("w", (4,))], [whole("w", (5,))], "size"),
    ([whole("w", (4,))], [whole("w", (4,), torch.int8)], "dtype"),
    (
        [shard_item("w", (4,), ((0,), (4,)))],
        [shard_item("w", (4,), ((0,), (3,)))],
        "shape",
    ),
    pytest.param(
        [whole("w", (4,))],
        [whole("w", (4, 1))],
        "size",
    ),
]


@pytest.mark.parametrize(("one", "other", "what"), DISAGREEMENTS)
def test_ranks_that_disagree_about_a_name_are_named(one, other, what):
    tables = tables_of([[value_item("before"), *one], other])
    with pytest.raises(PlanError, match=f"'w': ranks 0 and 1 hold it with another {what}"):
        global_plan(tables)


def test_every_disagreement_is_reported_and_the_rest_counted():
    names = [f"w.{n}" for n in range(30)]
    tables = tables_of([[whole(n, (4,)) for n in names], [whole(n, (5,)) for n in names]])
    with pytest.raises(PlanError, match=r"and \d+ more"):
        global_plan(tables)


@pytest.mark.parametrize(
    "box",
    [
        ((3,), (2,)),
        ((-1,), (2,)),
        ((5,), (1,)),
    ],
)
def test_a_box_outside_its_tensor_is_named(box):
    boxes = [((0,), (4,)), box]
    tables = tables_of([[shard_item("w", (4,), one)] for one in boxes])
    with pytest.raises(PlanError, match="key:w has out of bounds chunk"):
        global_plan(tables)


def test_a_box_outside_its_tensor_is_not_taken_for_the_replica_of_one_inside():
    # 5 columns to the right in a tensor of 4: the number that (1, 0) has.
    boxes = [((0, 0), (1, 4)), ((1, 0), (1, 4)), ((0, 5), (1, 4))]
    tables = tables_of([[shard_item("w", (2, 4), box)] for box in boxes])
    with pytest.raises(PlanError, match="key:w has out of bounds chunk"):
        global_plan(tables)


@given(rank_plans())
@fewer(4)
def test_plans_are_concatenated_as_torch_concatenates_them(plans):
    only = [[item for item in plan if item.type == WriteItemType.SHARD] for plan in plans]
    only[0] += [value_item("v"), whole("t", (2, 2))]
    tables, index = concatenate_tables(tables_of(only))
    expected, metadata = create_default_global_save_plan([SavePlan(plan) for plan in only])
    assert dict(KeyTable(index)) == metadata.state_dict_metadata
    assert list(KeyTable(index)) == list(metadata.state_dict_metadata)
    for table, plan in zip(tables, expected, strict=True):
        assert table == plan.items
        assert [i.index.index for i in table] == [i.index.index for i in plan.items]


@pytest.mark.parametrize("item", [value_item("v"), whole("v", (2,))])
def test_an_unsharded_value_is_not_concatenated_twice(item):
    with pytest.raises(PlanError, match=r"Planned more than once: v"):
        concatenate_tables(tables_of([[item], [item]]))


def test_a_tensor_with_many_replicas_is_balanced_by_its_bytes():
    big, small = [whole(f"b{n}", (8,)) for n in range(2)], [whole(f"s{n}", (1,)) for n in range(8)]
    plan = global_plan(tables_of([[*small, *big]] * 2))
    assert [int(table.size_bytes().sum()) for table in plan.tables] == [48, 48]
    assert isinstance(plan.rows[0], np.ndarray)


def test_the_largest_replicas_are_given_out_first():
    items = [whole("a", (1,)), whole("b", (1,)), whole("c", (2,))]
    plan = global_plan(tables_of([items, items]))
    assert [int(table.size_bytes().sum()) for table in plan.tables] == [8, 8]
