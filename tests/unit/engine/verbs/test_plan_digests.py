"""The digest that stands for an unchanged plan covers every field of it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner import SavePlan

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.storages.file_names import names_of_rank
from pytest_dcp._engine.verbs.plan_exchange import digest_of


def plan() -> SavePlan:
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner({"w": torch.zeros(3, 2), "v": {"step": 1}})
    return planner.create_local_plan()


def changed_items() -> dict[str, WriteItems]:
    """The plan's table with one field changed, for each field that is sent."""
    table: Any = plan().items
    found = {name: getattr(table, name).copy() for name in WriteItems.column_names()}
    for column in found.values():
        column.flat[0] += 1
    changes: dict[str, Any] = {
        **found,
        "fqns": ("x", *table.fqns[1:]),
        "properties": (TensorProperties(torch.float64),),
    }
    return {name: replace(table, **{name: value}) for name, value in changes.items()}


def test_equal_plans_have_equal_digests() -> None:
    assert digest_of(plan()) == digest_of(plan())


def test_every_field_of_the_table_is_changed_here() -> None:
    assert {field.name for field in fields(WriteItems)} == {*changed_items(), "origin"}


@pytest.mark.parametrize("name", changed_items())
def test_a_change_of_the_items_changes_the_digest(name: str) -> None:
    items: Any = changed_items()[name]
    assert digest_of(replace(plan(), items=items)) != digest_of(plan())


@pytest.mark.parametrize("name", [f.name for f in fields(TensorProperties)])
def test_a_change_of_the_properties_changes_the_digest(name: str) -> None:
    table: Any = plan().items
    others = {
        "dtype": torch.int32,
        "layout": torch.sparse_coo,
        "requires_grad": True,
        "memory_format": torch.channels_last,
        "pin_memory": True,
    }
    properties = (replace(table.properties[0], **{name: others[name]}),)
    items: Any = replace(table, properties=properties)
    assert digest_of(replace(plan(), items=items)) != digest_of(plan())


def test_a_change_of_the_plan_changes_the_digest() -> None:
    first = plan()
    paths: Any = first.planner_data
    changes: dict[str, list[Any]] = {
        "planner_data": [{**paths, "v.step": ("v.step",)}, None, dict(reversed(paths.items()))],
        "storage_data": [names_of_rank(0, "1" * 32), names_of_rank(1, "1" * 32), {"a": 1}],
        "usable": [False],
        "items": [[]],
    }
    assert {field.name for field in fields(SavePlan)} == set(changes)
    digests = [digest_of(replace(first, **{k: v})) for k, vs in changes.items() for v in vs]
    assert len({digest_of(first), *digests}) == 1 + len(digests)


def test_where_one_segment_ends_counts() -> None:
    one, other = (replace(plan(), storage_data=[a, b]) for a, b in ((b"xy", b"z"), (b"x", b"yz")))
    assert digest_of(one) != digest_of(other)
