from fnmatch import translate
from re import compile as compiled

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.plan.select import Selection
from pytest_dcp.errors import CheckpointMismatchError

names = st.text("ab.*", min_size=1, max_size=4)
states = st.lists(names, unique=True).map(lambda fqns: {fqn: n for n, fqn in enumerate(fqns)})


@given(states, st.lists(names, max_size=3))
def test_the_chosen_keys_are_the_ones_matching_a_pattern(state, patterns):
    fits = [compiled(translate(pattern)).match for pattern in patterns]
    expected = {fqn: n for fqn, n in state.items() if any(fit(fqn) for fit in fits)}
    if all(any(fit(fqn) for fqn in state) for fit in fits):
        assert Selection(patterns).choose(state) == expected
    else:
        with pytest.raises(CheckpointMismatchError, match="match nothing"):
            Selection(patterns).choose(state)


@given(states)
def test_without_a_choice_every_key_is_loaded_by_its_own_name(state):
    assert Selection().choose(state) == state
    assert Selection().choose(state) is not state
    assert Selection().stored_as(state) is None


def test_one_pattern_may_stand_alone():
    assert Selection("a.*").choose({"a.b": 1, "b": 2}) == {"a.b": 1}


def test_a_flat_name_with_brackets_chooses_itself():
    assert Selection(["groups[0]"]).choose({"groups[0]": 1, "groups0": 2}) == {"groups[0]": 1}


def test_names_are_mapped_whole_or_by_their_longest_prefix():
    names = {"a.": "x.", "a.b.": "y.", "a.b.c": "z", "q": "never a prefix"}
    found = Selection(rename=names).stored_as(dict.fromkeys(["a.b.c", "a.b.d", "a.e", "qq", "a"]))
    assert found == {"a.b.c": "z", "a.b.d": "y.d", "a.e": "x.e", "qq": "qq", "a": "a"}


def test_entries_that_find_nothing_are_named_with_the_reason():
    here, stored = ["new.a", "new.b", "n"], ["old.a", "old.b", "step"]
    names = {"new.": "old.", "n": "steps", "old.": "new.", "gone": "x", "new.a": "old.a"}
    idle = Selection(rename=names).idle_renames(here, stored)
    assert list(idle) == ["n", "old.", "gone"]
    assert idle["n"] == "rename={'n': 'steps'}: the checkpoint has no 'steps'"
    assert idle["old."].endswith("so write {'new.': 'old.'}")
    assert idle["gone"] == "rename={'gone': 'x'}: the state dict has no 'gone'"
    assert Selection().idle_renames(here, stored) == {}


def test_an_entry_for_names_that_are_found_otherwise_is_not_judged():
    selection = Selection(rename={"rng.": "state.", "x.": "y."})
    assert list(selection.idle_renames(["rng.3", "x.1"], ["state.0"], ("rng.",))) == ["x."]


def test_an_entry_that_more_exact_ones_overrule_is_not_idle():
    names = {"new.": "nowhere.", "new.a": "old.a"}
    assert Selection(rename=names).idle_renames(["new.a"], ["old.a"]) == {}


@given(states)
def test_a_function_renames_each_name(state):
    renamed = Selection(rename=lambda fqn: f"old.{fqn}").stored_as(state)
    assert renamed == {fqn: f"old.{fqn}" for fqn in state}
