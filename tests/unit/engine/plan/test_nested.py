import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import _nested_dict as stock

from pytest_dcp._engine.plan.nested import (
    Position,
    Room,
    as_saved,
    flatten,
    get_element,
    set_element,
)
from pytest_dcp.errors import CheckpointCorruptError, PlanError
from support.tilings import fewer

# No dots: two paths could then give one name. Digits differ from positions in their type.
words = st.text("abc01", min_size=1, max_size=2)
tensors = st.integers(0, 9).map(torch.tensor)
leaves = st.one_of(tensors, st.integers(), st.none(), st.tuples(st.integers()), st.text(max_size=2))


def nested(keys: st.SearchStrategy) -> st.SearchStrategy[dict]:
    values = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)
        ),
        max_leaves=8,
    )
    return st.dictionaries(keys, values, max_size=3)


def told(value):
    """A value with tensors as plain data, so that it can be compared."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.tolist())
    if isinstance(value, dict):
        return {key: told(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [told(inner) for inner in value]
    return value


def without_empty(value):
    """A dict as it is once the empty mappings, of which nothing is stored, are gone."""
    if isinstance(value, dict):
        kept = {key: without_empty(inner) for key, inner in value.items()}
        return {key: inner for key, inner in kept.items() if inner != {}}
    return value


@given(nested(words))
@fewer(2)
def test_a_dict_is_flattened_as_torch_flattens_it(state_dict):
    flat, paths = flatten(state_dict)
    theirs, their_paths = stock.flatten_state_dict(state_dict)
    assert list(flat) == list(theirs)
    assert all(flat[fqn] is theirs[fqn] for fqn in flat)
    assert as_saved(paths) == their_paths
    assert pickle.loads(pickle.dumps(as_saved(paths))) == their_paths


@given(nested(words))
@fewer(2)
def test_a_dict_is_rebuilt_from_its_values_and_paths(state_dict):
    flat, paths = flatten(state_dict)
    rebuilt: dict = {}
    for fqn, path in paths.items():
        set_element(rebuilt, path, flat[fqn])
    expected: dict = {}
    for fqn, path in stock.flatten_state_dict(state_dict)[1].items():
        stock.set_element(expected, path, flat[fqn])
    assert told(rebuilt) == told(expected)


@given(
    st.dictionaries(words, st.recursive(leaves, lambda i: st.dictionaries(words, i), max_leaves=6))
)
@fewer(2)
def test_a_dict_of_dicts_comes_back_without_its_empty_ones(state_dict):
    flat, paths = flatten(state_dict)
    rebuilt: dict = {}
    for fqn, path in paths.items():
        set_element(rebuilt, path, flat[fqn])
    assert told(rebuilt) == without_empty(told(state_dict))


@given(nested(st.one_of(words, st.integers(0, 3))))
@fewer(2)
def test_every_value_is_found_and_replaced_in_place_by_its_path(state_dict):
    try:
        flat, paths = flatten(state_dict)
    except ValueError:
        return  # 1 and "1" side by side
    for n, (fqn, path) in enumerate(paths.items()):
        assert get_element(state_dict, path) is flat[fqn]
        set_element(state_dict, path, (n,))
    for n, path in enumerate(paths.values()):
        assert get_element(state_dict, path) == (n,)


def test_two_paths_to_one_name_are_both_named():
    with pytest.raises(ValueError, match=r"\('a', 'b'\).*\('a\.b',\)"):
        flatten({"a": {"b": 1}, "a.b": 2})
    with pytest.raises(ValueError, match=r"'1'"):
        flatten({1: 0, "1": 0})


def test_lists_are_walked_only_where_they_hold_tensors():
    tensor = torch.ones(1)
    flat, paths = flatten({"l": [1, [tensor]], "m": [[{}], 2], "n": [1, (tensor,)], "o": []})
    assert list(flat) == ["l.0", "l.1.0", "m.1", "n", "o"]
    assert paths["l.1.0"] == ("l", 1, 0)
    assert isinstance(paths["l.1.0"][1], Position)


def test_mappings_without_tensors_stay_whole_as_torch_2_3_kept_them():
    state = {"a": {"b": 1}, "c": {"d": torch.ones(1)}, "e": [{"f": 2}], "g": {"h": {"i": 3}}}
    flat, _ = flatten(state, plain_mappings_whole=True)
    theirs: dict = {}
    stock.traverse_state_dict_v_2_3(
        state, lambda path, value: theirs.update({".".join(map(str, path)): value})
    )
    assert list(flat) == list(theirs)


@given(nested(words))
@fewer(2)
def test_dicts_are_flattened_as_torch_2_3_flattened_them(state_dict):
    flat, _ = flatten(state_dict, plain_mappings_whole=True)
    theirs: dict = {}
    stock.traverse_state_dict_v_2_3(
        state_dict, lambda path, value: theirs.update({".".join(map(str, path)): value})
    )
    assert told(flat) == told(theirs)


def test_integer_keys_of_mappings_are_saved_as_strings_and_positions_as_numbers():
    _, paths = flatten({"state": {0: {"step": 1}}, "groups": [{"lr": 1}]})
    saved = as_saved(paths)
    assert saved == {"state.0.step": ("state", "0", "step"), "groups.0.lr": ("groups", 0, "lr")}
    assert all(type(key) in (str, int) for path in saved.values() for key in path)


def test_containers_that_are_missing_are_made_and_lists_grow_with_none():
    root: dict = {}
    set_element(root, ("a", 2, "b"), 1)
    set_element(root, ("a", 0), 2)
    assert root == {"a": [2, None, {"b": 1}]}


def test_a_path_without_an_element_gives_the_default():
    root = {"a": [1, {"b": 2}]}
    assert get_element(root, ("a", 1, "b")) == 2
    for path in [("x",), ("a", 5), ("a", -1), ("a", 1, "c"), ("a", 0, "b"), ("a", 1, "b", "c")]:
        assert get_element(root, path, "none") == "none"


def deep(levels: int, kind: type) -> object:
    value: object = torch.ones(1)
    for _ in range(levels):
        value = {"k": value} if kind is dict else [value]
    return value


@pytest.mark.parametrize("kind", [dict, list])
def test_a_value_nested_too_deeply_is_refused_in_words(kind):
    assert len(flatten({"top": deep(50, kind)})[0]) == 1
    with pytest.raises(PlanError, match="nested more deeply than Python can walk, below 'top'"):
        flatten({"top": deep(100_000, kind)})
    inside = {}
    inside["itself"] = inside
    with pytest.raises(PlanError, match="inside itself"):
        flatten({"top": inside})


def test_a_path_that_is_too_long_is_refused_in_words():
    assert Room(1).check_path("w", ("k",) * 100)
    with pytest.raises(CheckpointCorruptError, match=r"its path has 100000 keys.*\(entry 'w'\)"):
        Room(1).check_path("w", ("k",) * 100_000)
