"""The state machine finds engines that lose or mix checkpoints, in a few steps."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

import pytest_dcp.checkpoint as dcp
from pytest_dcp.errors import LawError
from pytest_dcp.properties import CheckpointMachine, StateSpec, TensorSpec
from pytest_dcp.properties.laws.torch_peer import TORCH

RUNS = settings(
    max_examples=50,
    stateful_step_count=5,
    report_multiple_bugs=False,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
)
STATES = st.integers(0, 3).map(lambda seed: StateSpec({"w": TensorSpec((2,), seed=seed)}))


class Once:
    """Saves to a place only once."""

    def save(self, state_dict: Any, *, checkpoint_id: Any, process_group: Any = None) -> None:
        if not Path(checkpoint_id, ".metadata").exists():
            dcp.save(state_dict, checkpoint_id=checkpoint_id)

    def load(self, state_dict: Any, *, checkpoint_id: Any, process_group: Any = None) -> None:
        dcp.load(state_dict, checkpoint_id=checkpoint_id)


def steps_to_break(engine: Any) -> list[str]:
    """The steps after which the engine is found wrong, as Hypothesis prints them."""
    printed = io.StringIO()
    said = {"dcp": engine, "models": ("kill",), "states": STATES}
    machine = type("Broken", (CheckpointMachine,), said)
    with redirect_stdout(printed), pytest.raises(LawError) as raised:
        run_state_machine_as_test(machine, settings=RUNS)
    notes = "\n".join([printed.getvalue(), *getattr(raised.value, "__notes__", [])])
    print(notes)
    return re.findall(r"^ *state\.(\w+)\(", notes, re.MULTILINE)


def test_finds_a_save_that_does_not_overwrite() -> None:
    assert steps_to_break(Once()) in (
        ["begin", "save", "load", "teardown"],
        ["begin", "save", "load_a_part", "teardown"],
        ["begin", "crash", "teardown"],
    )


def test_finds_that_torchs_engine_overwrites_in_place() -> None:
    assert steps_to_break(TORCH) == ["begin", "crash", "teardown"]
