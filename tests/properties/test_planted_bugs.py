"""The laws are tested: bugs planted into the engine are found, and shrink to a few lines."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, find, settings
from hypothesis import strategies as st

import pytest_dcp.properties as props
from pytest_dcp.errors import WorldError
from support.mutants import MUTANTS
from support.unsynced import UNSYNCED

if TYPE_CHECKING:
    from pytest_dcp._harness.controller.worlds_fixture import Worlds

BUDGET = settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
)
"""As many examples as a property has in the ci profile, and always the same."""

Case = tuple[props.StateSpec, tuple[props.Layout, ...], tuple[props.Layout, ...]]


@pytest.mark.parametrize("bug", MUTANTS)
def test_a_planted_bug_is_found_and_shrinks(worlds: Worlds, tmp_path: Path, bug: str) -> None:
    mutant, places = MUTANTS[bug], itertools.count()
    law: Any = getattr(props, mutant.law)
    one = mutant.law == "assert_idempotent_save"
    with worlds(4) as world:
        world.run(mutant.plant)

        def breaks(case: Case) -> bool:
            state, *layouts = case
            placed = [state.on(*some) for some in (layouts[:1] if one else layouts)]
            try:
                world.run(law, *placed, tmp_path / str(next(places)), dcp=UNSYNCED)
            except WorldError as error:
                return all("LawError" in failure.summary for failure in error.failures)
            return False

        ranks = props.arrangements()
        state, *layouts = find(
            st.tuples(props.state_dicts(), ranks, ranks), breaks, settings=BUDGET
        )
    print(f"{next(places)} examples: {state.on(*layouts[0])} -> {layouts[1]}")
    assert max(some[0].mesh.size for some in layouts) <= 2 or len(state.tensors()) <= 2
