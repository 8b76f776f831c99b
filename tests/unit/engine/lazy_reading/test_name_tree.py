"""Names of an opened checkpoint: nested, by pattern, and the nearest to a wrong one."""

from __future__ import annotations

import time

import pytest

from pytest_dcp._engine.lazy_reading.name_tree import NameTree, find_names, find_nearest

NAMES = ["model.layers.0.w", "model.layers.1.w", "model.layers.1", "model.norm", "step", "a..b"]


def tree() -> NameTree:
    return NameTree(NAMES, lambda name: f"<{name}>")  # type: ignore[arg-type,return-value]  # a text for a tensor


def test_names_are_split_at_their_dots() -> None:
    assert list(tree()) == ["model", "step", "a"]
    assert list(tree()["model"]) == ["layers", "norm"]
    assert tree()["step"] == "<step>"
    assert tree()["model"]["layers"]["0"]["w"] == "<model.layers.0.w>"  # type: ignore[index]  # subtrees
    assert len(tree()["model"]) == 2  # type: ignore[arg-type]  # a subtree


def test_a_name_that_others_begin_with_is_under_the_empty_key() -> None:
    first = tree()["model"]["layers"]["1"]  # type: ignore[index]  # subtrees
    assert dict(first) == {"w": "<model.layers.1.w>", "": "<model.layers.1>"}  # type: ignore[arg-type]  # a subtree


def test_empty_parts_of_names_are_keys_too() -> None:
    assert tree()["a"][""]["b"] == "<a..b>"  # type: ignore[index]  # subtrees


def test_every_name_is_at_its_place() -> None:
    def leaves(node: NameTree) -> list[str]:
        found: list[str] = []
        for key in node:
            value = node[key]
            found += leaves(value) if isinstance(value, NameTree) else [str(value)]
        return found

    assert sorted(leaves(tree())) == sorted(f"<{name}>" for name in NAMES)


def test_an_unknown_key_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        tree()["model"]["lost"]  # type: ignore[index]  # a subtree


def test_the_text_shows_two_levels() -> None:
    assert repr(tree()).splitlines() == [
        "model  (4 names)",
        "  layers  (3 names)",
        "  norm",
        "step",
        "a  (1 name)",
        "    (1 name)",
    ]


def test_a_star_matches_dots_and_brackets_are_sets() -> None:
    assert find_names(NAMES, "model.*w") == ["model.layers.0.w", "model.layers.1.w"]
    assert find_names(NAMES, "model.layers.[1-9]") == ["model.layers.1"]
    assert find_names(NAMES, "MODEL*") == []


def test_the_nearest_names_come_first() -> None:
    assert find_nearest(NAMES, "model.nrom") == ("model.norm",)
    assert find_nearest(NAMES, "layers.0.w")[0] == "model.layers.0.w"
    assert find_nearest(NAMES, "zzzzzz") == ()
    assert find_nearest([], "w") == ()


def test_of_many_names_those_with_the_same_last_part_are_compared() -> None:
    many = [f"model.layers.{n}.attention.wq.weight" for n in range(200_000)]
    start = time.process_time()
    nearest = find_nearest([*many, "model.head.bias"], "model.haed.bias")
    assert nearest == ("model.head.bias",)
    assert time.process_time() - start < 5  # all of them would take most of a minute
