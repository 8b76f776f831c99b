"""Runs of a row-major tensor's elements, as boxes: each element once, and no other."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.io.segment_targets import run_boxes


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_the_boxes_of_a_run_hold_its_elements_in_their_order(
    shape: list[int], data: st.DataObject
) -> None:
    count = math.prod(shape)
    low = data.draw(st.integers(0, count))
    high = data.draw(st.integers(low, count))
    numbers = np.arange(count).reshape(shape)
    elements = [
        numbers[tuple(slice(at, at + n) for at, n in zip(offset, part, strict=True))].ravel()
        for offset, part in run_boxes(shape, low, high)
    ]
    found = np.concatenate([np.zeros(0, dtype=np.int64), *elements])
    assert found.tolist() == list(range(low, high))
    assert len(elements) <= 2 * max(len(shape), 1)
