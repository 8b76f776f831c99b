"""Which of a state dict's groups is which of an optimizer's."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.state_dicts.optimizer_flattening import (
    flatten_optimizer_state,
    nest_optimizer_state,
)
from pytest_dcp._engine.state_dicts.optimizer_groups import pair_groups


def group(*names: str, **settings: Any) -> dict[str, Any]:
    return {**settings, "params": list(names)}


def test_groups_are_found_by_their_parameters_in_any_order() -> None:
    stored = [group("c", lr=3), group("b", "a", lr=1)]
    pairing = pair_groups([["a", "b"], ["c"]], stored)
    assert [p and p["lr"] for p in pairing.partners] == [1, 3]
    assert pairing.mismatch.groups == ()


def test_empty_groups_are_paired_in_their_order() -> None:
    stored = [group(lr=1), group("a", lr=2), group(lr=3)]
    pairing = pair_groups([["a"], [], [], []], stored)
    assert [p and p["lr"] for p in pairing.partners] == [2, 1, 3, None]


def test_a_group_that_was_split_is_named() -> None:
    pairing = pair_groups([["a"], ["b"]], [group("a", "b", lr=1)])
    assert pairing.partners == (None, None)
    first, second = pairing.mismatch.groups
    assert "parameter group 0 of the optimizer ('a')" in first
    assert "group 0 ('a', 'b') of the state dict, which also has ('b')" in first
    assert "parameter group 1" in second


def test_groups_that_were_joined_are_named() -> None:
    pairing = pair_groups([["a", "b"]], [group("a"), group("b")])
    assert pairing.partners == (None,)
    assert "is group 0 ('a') and group 1 ('b') of the state dict" in pairing.mismatch.groups[0]


def test_missing_and_unexpected_parameters_are_all_named() -> None:
    pairing = pair_groups([["a", "b"], ["c"]], [group("a", "x"), group("y")])
    assert pairing.mismatch.missing == ("b", "c")
    assert pairing.mismatch.unexpected == ("x", "y")
    assert pairing.mismatch.groups == ()


def test_ignored_parameters_count_on_neither_side() -> None:
    pairing = pair_groups([["a", "frozen"]], [group("a", lr=1)], {"frozen"})
    assert pairing.mismatch.missing == ()
    assert pairing.partners[0] == group("a", lr=1)
    pairing = pair_groups([["a"]], [group("frozen"), group("a", lr=1)], {"frozen"})
    assert pairing.mismatch.unexpected == ()


NAMES = ["a", "a.b", "a.b.c", "b.weight", "weight"]


@st.composite
def optimizer_states(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.permutations(NAMES))
    cut = draw(st.integers(1, len(names)))
    groups = [names[:cut], names[cut:]] if cut < len(names) else [names]
    entries = st.dictionaries(st.sampled_from(["step", "exp_avg", "m"]), st.integers(), min_size=1)
    return {
        "state": {name: draw(entries) for name in names if draw(st.booleans())},
        "param_groups": [group(*of, lr=at, betas=(0.5, at)) for at, of in enumerate(groups)],
    }


@given(optimizer_states())
def test_flattening_is_undone(state: dict[str, Any]) -> None:
    flat = flatten_optimizer_state(state)
    assert all(not isinstance(value, dict) for value in flat.values())
    groups = [of["params"] for of in state["param_groups"]]
    assert nest_optimizer_state(flat, groups, NAMES) == state


def test_a_key_is_assigned_to_the_longest_name_that_it_begins_with() -> None:
    flat = {"state.a.b.m.n": 1, "state.a.m": 2, "state.gone.m": 3}
    state = nest_optimizer_state(flat, [["a", "a.b"]], NAMES)["state"]
    assert state == {"a.b": {"m.n": 1}, "a": {"m": 2}, "gone": {"m": 3}}


def test_settings_that_differ_within_a_group_are_seen() -> None:
    flat = {"param_groups.a.lr": 1, "param_groups.b.lr": 2}
    state = nest_optimizer_state(flat, [["a", "b"]], ["a", "b"])
    assert [of["lr"] for of in state["param_groups"]] == [1, 2]
    pairing = pair_groups([["a", "b"]], state["param_groups"])
    assert len(pairing.mismatch.groups) == 1
