"""The state machine draws the same for an example, whichever state a crash left."""

from __future__ import annotations

import random

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test

from pytest_dcp.properties import CheckpointMachine, StateSpec, TensorSpec
from pytest_dcp.properties.placements import Layout

LUCK = random.SystemRandom()
"""Which of its threads a machine runs first: nothing that Hypothesis could seed."""


class Fickle(CheckpointMachine):
    """A crash leaves the old state or the new one, by luck.

    There is little to choose, so that examples begin alike and the engine compares their draws.
    """

    states = st.just(StateSpec({"w": TensorSpec((2,), torch.float32)}))

    @rule()
    def maybe_saved(self) -> None:
        if LUCK.random() < 0.5:
            self._save("b", StateSpec({"v": TensorSpec((2,), torch.float32)}), (Layout(),))


def test_draws_do_not_depend_on_the_held_state() -> None:
    steps = settings(max_examples=100, stateful_step_count=5, deadline=None, database=None)
    run_state_machine_as_test(Fickle, settings=steps)
