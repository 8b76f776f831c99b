"""A state machine: saves, overwrites, crashes, loads, reshards and prunes, beside a plain dict.

The dict maps each folder to the state saved there last; a crash leaves the old or the new state.
Each step draws its own layouts, so that one folder is written and read by different numbers of
ranks. In a world every rank runs the machine in lockstep; without one the process is its only rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch.distributed.checkpoint.api import CheckpointException

import pytest_dcp.checkpoint as checkpoint
from pytest_dcp.errors import LawError
from pytest_dcp.faults.crash_models import Model
from pytest_dcp.properties.laws.crash import recorded_save
from pytest_dcp.properties.laws.engine import Engine
from pytest_dcp.properties.laws.round_trips import load_part
from pytest_dcp.properties.laws.steps import enter, load, save
from pytest_dcp.properties.placements import Layout, arrangements
from pytest_dcp.properties.state_dicts import StateSpec, state_dicts
from pytest_dcp.properties.subworlds import on_first_ranks, shared_folder

PLACES = ("a", "b")
"""Folders that the machine saves to: few, so that they are overwritten."""
CRASHES = 60
"""Number of folders that a cut-off save could leave, of which one is drawn."""

Layouts = tuple[Layout, ...]


def _of(strategy: Callable[[CheckpointMachine], st.SearchStrategy[Any]]) -> Any:
    """The machine's repr, as a strategy."""
    return st.runner().flatmap(strategy)


def _layouts_for(machine: CheckpointMachine) -> st.SearchStrategy[Layouts]:
    # A single rank may have no world, and therefore no mesh.
    size = machine.world_size
    return arrangements(world_size=size) if size > 1 else st.just((Layout(),))


_PLACE = st.sampled_from(PLACES)
_WHICH = st.integers(0, 999)
"""Picks one of the saved states. It is not drawn from them: a crash leaves the old or the new one
depending on the ranks' timing, and draws must be the same each time an example runs.
"""
_RANKS = _of(_layouts_for)
_STATE = _of(lambda machine: machine.states)
_MODEL = _of(lambda machine: st.sampled_from(machine.models))


class CheckpointMachine(RuleBasedStateMachine):
    """Folders of checkpoints, and the state that each must hold.

    Inherit and override attributes; then `TestMine = Mine.TestCase`, in a world `TestMine =
    pytest.mark.world_size(4)(Mine.TestCase)`.
    """

    dcp: ClassVar[Engine] = checkpoint
    """The engine under test."""
    world_size: ClassVar[int] = 1
    """The ranks of the world, or fewer."""
    models: ClassVar[Sequence[Model]] = ("kill", "posix")
    """The crash models tried."""
    states: ClassVar[st.SearchStrategy[StateSpec]] = state_dicts(max_size=3)
    """Strategy for the states to save."""

    def __init__(self) -> None:
        super().__init__()
        self.saved_states: dict[str, StateSpec] = {}

    @initialize(state=_STATE)
    def begin(self, state: StateSpec) -> None:
        """Create the root folder, and save once, so that there is always a saved state."""
        self.root = shared_folder()
        self._save(PLACES[0], state, (Layout(),))

    def teardown(self) -> None:
        """Remove the root folder when no rank needs it any more."""
        if hasattr(self, "root"):
            on_first_ranks(1, "removing the folders", lambda: _remove(self.root))

    @rule(place=_PLACE, state=_STATE, ranks=_RANKS)
    def save(self, place: str, state: StateSpec, ranks: Layouts) -> None:
        """Save, replacing any checkpoint there."""
        self._save(place, state, ranks)

    @rule(
        place=_PLACE,
        state=_STATE,
        ranks=_RANKS,
        model=_MODEL,
        which=st.integers(0, CRASHES - 1),
    )
    def crash(self, place: str, state: StateSpec, ranks: Layouts, model: Model, which: int) -> None:
        """Save and be cut off: the folder holds the complete old or new checkpoint."""
        placed, folder = state.on(*ranks), self.root / place
        enter(placed)
        states = list(recorded_save(self.dcp, placed, folder).crash_states(model, CRASHES))
        crashed = states[which % len(states)]

        def put_back() -> None:
            _remove(folder)
            with crashed.restored() as found:
                shutil.copytree(found, folder)

        on_first_ranks(1, "putting the folder into the state of a crash", put_back)
        old = self.saved_states.pop(place, None)
        for candidate in [state] if crashed.returned else [state, old]:
            if candidate is not None and self._holds(folder, candidate):
                self.saved_states[place] = candidate
                return
        if crashed.returned or old is not None:
            raise LawError(f"{crashed!r} leaves neither the old checkpoint nor the new one")

    @rule(which=_WHICH, ranks=_RANKS)
    def load(self, which: int, ranks: Layouts) -> None:
        """Load, in other layouts and with other ranks."""
        place = _pick("place", self.saved_states, which)
        placed = self.saved_states[place].on(*ranks)
        enter(placed)
        load(self.dcp, placed, self.root / place, f"loading {place}")

    @rule(which=_WHICH, which_key=_WHICH, ranks=_RANKS)
    def load_a_part(self, which: int, which_key: int, ranks: Layouts) -> None:
        """Load only some keys."""
        place = _pick("place", self.saved_states, which)
        state = self.saved_states[place]
        key = _pick("key", state.tree, which_key)
        placed = state.on(*ranks)
        enter(placed)
        load_part(self.dcp, placed, {key}, self.root / place)

    @rule(which=_WHICH, before=_RANKS, after=_RANKS)
    def reshard(self, which: int, before: Layouts, after: Layouts) -> None:
        """Load from one folder, and save to the other in another layout."""
        place = _pick("place", self.saved_states, which)
        other = next(one for one in PLACES if one != place)
        state = self.saved_states[place]
        one, two = state.on(*before), state.on(*after)
        enter(one, two)
        load(self.dcp, one, self.root / place, f"loading {place} to reshard it")
        save(self.dcp, two, self.root / other)
        self.saved_states[other] = state

    @rule(place=_PLACE)
    def prune(self, place: str) -> None:
        """Remove a folder, unless it is the last one or missing."""
        if place not in self.saved_states or len(self.saved_states) == 1:
            return
        on_first_ranks(1, "removing a folder", lambda: _remove(self.root / place))
        del self.saved_states[place]

    def _save(self, place: str, state: StateSpec, ranks: Layouts) -> None:
        placed = state.on(*ranks)
        enter(placed)
        save(self.dcp, placed, self.root / place)
        self.saved_states[place] = state

    def _holds(self, folder: Path, state: StateSpec) -> bool:
        """Whether the folder holds the whole of this state."""
        try:
            load(self.dcp, state.on(), folder, "loading after a crash")
        except (Exception, CheckpointException):  # noqa: BLE001  # any exception refuses the folder
            return False
        return True


def _pick(what: str, names: Iterable[str], which: int) -> str:
    found = sorted(names)
    picked = found[which % len(found)]
    note(f"{what}: {picked!r}")
    return picked


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
