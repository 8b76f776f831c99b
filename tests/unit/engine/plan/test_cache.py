import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from pytest_dcp._engine.plan.cache import PlanCache, Unchanged, digest_of
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.describe import write_items
from pytest_dcp._engine.plan.nested import as_saved, flatten
from pytest_dcp.errors import PlanError
from support.catalogs import fqns
from support.tilings import fewer, shard_item, value_item


def plan_of(state: dict, *, lists: bool = False) -> SavePlan:
    """The local plan of the default planner."""
    flat, paths = flatten(state)
    items = write_items(flat)
    return SavePlan(list(items) if lists else items, planner_data=as_saved(paths))


def sent(plan: SavePlan) -> SavePlan:
    """The plan after its way between two ranks."""
    return pickle.loads(pickle.dumps(plan))


def state(**changes) -> dict:
    return {"model": {"weight": torch.ones(2, 3), "bias": torch.ones(3)}, "step": 1} | changes


SHARED = "digest_of pickles by identity: a name may be one object with a field's name, or not"
FIELDS = ["size", "offset", "kind", "shape", "fqn", "index", "type", "dtype", "torch"]


@given(st.dictionaries(fqns, st.dictionaries(fqns, st.integers(0, 3)), max_size=3), st.booleans())
@example({"size": {"w": 1}}, False)
@fewer(2)
def test_a_plan_and_its_copy_on_another_rank_have_one_digest(shapes, lists):
    made = {k: {n: torch.ones(size) for n, size in inner.items()} for k, inner in shapes.items()}
    try:
        plan = plan_of(made, lists=lists)
    except ValueError:
        return  # two paths to one name
    assert digest_of(sent(plan)) == digest_of(plan)


@pytest.mark.parametrize("lists", [False, True])
def test_names_that_are_also_those_of_fields_do_not_change_the_digest(lists):
    for name in FIELDS:
        plan = plan_of({name: {"w": torch.ones(2)}, "other": {name: torch.ones(3)}}, lists=lists)
        assert digest_of(sent(plan)) == digest_of(plan), name


@pytest.mark.parametrize("lists", [False, True])
def test_a_models_plan_and_its_copy_on_another_rank_have_one_digest(lists):
    layers = {n: torch.nn.Linear(2, 2).state_dict() for n in "01"}
    plan = plan_of({"model": {"layers": layers}, "step": 3}, lists=lists)
    assert digest_of(sent(plan)) == digest_of(plan)


@pytest.mark.parametrize("lists", [False, True])
def test_an_optimizers_plan_and_its_copy_on_another_rank_have_one_digest(lists):
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    plan = plan_of({"optimizer": optimizer.state_dict()}, lists=lists)
    assert digest_of(sent(plan)) == digest_of(plan)


def test_an_equal_plan_of_equal_names_has_the_same_digest():
    names = ["".join(["mod", "el"]) for _ in range(2)]
    one, other = (plan_of({name: {"w": torch.ones(2)}, "x": {name: 1}}) for name in names)
    assert digest_of(one) == digest_of(other)


CHANGES = [
    {"step": torch.ones(1)},
    {"more": 1},
    {"model": {"weight": torch.ones(3, 2), "bias": torch.ones(3)}},
    {"model": {"weight": torch.ones(2, 3, dtype=torch.float64), "bias": torch.ones(3)}},
    {"model": {"weight": torch.ones(2, 3, requires_grad=True), "bias": torch.ones(3)}},
    {"model": {"bias": torch.ones(3), "weight": torch.ones(2, 3)}},
    {"model": {"weight": torch.ones(2, 3)}, "model.bias": torch.ones(3)},
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("lists", [False, True])
def test_everything_that_a_plan_says_is_in_its_digest(change, lists):
    assert digest_of(plan_of(state(), lists=lists)) != digest_of(
        plan_of(state(**change), lists=lists)
    )


def test_storage_data_is_in_the_digest():
    plan = plan_of(state())
    assert digest_of(plan) != digest_of(replace(plan, storage_data="a"))


def saved(ranks: list[PlanCache], plans: list[SavePlan]) -> list[SavePlan]:
    """One save, coordinated by the first rank; returns the plan that each rank receives."""
    out = [cache.shorten_plan(plan) for cache, plan in zip(ranks, plans, strict=True)]
    full, digests = ranks[0].recall_plans([out[0], *map(sent, out[1:])])
    answer = ranks[0].answer
    if answer is not None and answer[0] == digests:
        told = [replace(plan, items=[], usable=False) for plan in full]
    else:
        told = full
        ranks[0].answer = (digests, full, Metadata({}))
    return [cache.recall_plan(plan) for cache, plan in zip(ranks, told, strict=True)]


def test_a_plan_is_sent_once_while_it_does_not_change():
    ranks = [PlanCache() for _ in range(3)]
    plans = [plan_of(state(**{f"of{rank}": rank})) for rank in range(3)]
    first = saved(ranks, plans)
    again = [plan_of(state(**{f"of{rank}": rank})) for rank in range(3)]
    for cache, plan in zip(ranks, again, strict=True):
        out = cache.shorten_plan(plan)
        assert not out.usable
        assert out.planner_data == Unchanged(digest_of(plan))
        assert out.items == []
    told = saved(ranks, again)
    assert all(a.items is b.items for a, b in zip(told, first, strict=True))
    assert [plan.items for plan in first] == [plan.items for plan in plans]


def test_an_unchanged_plan_is_carried_out_in_the_files_of_its_own_save():
    cache = PlanCache()
    cache.shorten_plan(plan_of(state()))
    first = cache.recall_plan(replace(plan_of(state()), storage_data="files of the first save"))
    told = SavePlan([], storage_data="files of the second", usable=False)
    assert cache.recall_plan(told).storage_data == "files of the second"
    assert cache.recall_plan(told).items is first.items


def test_one_changed_plan_is_sent_and_the_others_are_remembered():
    ranks = [PlanCache() for _ in range(2)]
    saved(ranks, [plan_of(state()), plan_of(state())])
    other = plan_of(state(more=2))
    told = saved(ranks, [plan_of(state()), other])
    assert told[0].items == plan_of(state()).items
    assert told[1].items == other.items


def test_a_coordinator_that_does_not_remember_names_the_ranks():
    ranks = [PlanCache() for _ in range(3)]
    plans = [plan_of(state()) for _ in range(3)]
    saved(ranks, plans)
    with pytest.raises(PlanError, match=r"ranks \[0, 1, 2\]"):
        PlanCache().recall_plans(
            [rank.shorten_plan(plan) for rank, plan in zip(ranks, plans, strict=True)]
        )
    ranks[0].all_plans[1] = (b"another", plans[1])
    with pytest.raises(PlanError, match=r"ranks \[1\]"):
        ranks[0].recall_plans(
            [rank.shorten_plan(plan) for rank, plan in zip(ranks, plans, strict=True)]
        )


def test_a_plan_of_a_save_that_failed_is_sent_again():
    cache, plan = PlanCache(), plan_of(state())
    assert cache.shorten_plan(plan).usable
    assert cache.shorten_plan(plan).usable
    cache.recall_plan(plan)
    assert not cache.shorten_plan(plan).usable


def test_nothing_to_remember_is_an_error():
    with pytest.raises(PlanError, match="none is remembered"):
        PlanCache().recall_plan(SavePlan([], usable=False))


def test_a_table_and_a_list_of_the_same_items_are_both_understood():
    items = [shard_item("w", (2,), ((0,), (2,))), value_item("v")]
    for plan in (SavePlan(items), SavePlan(WriteItems.of(items))):
        assert digest_of(sent(plan)) == digest_of(plan)
