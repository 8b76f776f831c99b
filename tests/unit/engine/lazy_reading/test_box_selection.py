"""The index of a lazy tensor selects the elements that torch's own indexing selects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.lazy_reading.box_selection import select_box
from support.states import numbered


@st.composite
def shapes_and_indices(draw: st.DrawFn) -> tuple[tuple[int, ...], Any]:
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    keys: list[Any] = []
    for side in shape[: draw(st.integers(0, len(shape)))]:
        bound = st.none() | st.integers(-side - 2, side + 2)
        kinds = [st.builds(slice, bound, bound, st.none() | st.integers(1, 4))]
        kinds += [st.integers(-side, side - 1)] if side else []
        keys.append(draw(st.one_of(kinds)))
    if draw(st.booleans()):
        # The keys after an ellipsis are for the last dimensions.
        at = draw(st.integers(0, len(keys)))
        tail = [slice(None)] * (len(keys) - at)
        keys = [*keys[:at], ..., *tail]
    return shape, tuple(keys) if len(keys) != 1 or draw(st.booleans()) else keys[0]


@given(shapes_and_indices())
def test_a_box_and_its_rest_select_the_same_elements_as_torch(
    case: tuple[tuple[int, ...], Any],
) -> None:
    shape, index = case
    full = numbered(*shape)
    box = select_box(shape, index, "w")
    part = full
    for dim, (start, length) in enumerate(zip(box.offset, box.shape, strict=True)):
        part = part.narrow(dim, start, length)
    assert torch.equal(part[box.inside], full[index])


@given(shapes_and_indices())
def test_a_box_ends_at_the_last_selected_element(case: tuple[tuple[int, ...], Any]) -> None:
    shape, index = case
    box = select_box(shape, index, "w")
    chosen = np.zeros(shape, dtype=bool)
    chosen[index] = True
    for dim, length in enumerate(box.shape):
        others = tuple(n for n in range(len(shape)) if n != dim)
        span = np.flatnonzero(chosen.any(axis=others))
        if chosen.any():
            assert length == span[-1] - span[0] + 1


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        ((0, 0, 0), IndexError, "has 2 dimensions, the index has 3"),
        ((..., ...), IndexError, "one ellipsis, got 2"),
        (4, IndexError, "position 4 is out of range in dimension 0, which has 4"),
        ((0, -7), IndexError, "position -7 is out of range in dimension 1, which has 6"),
        (slice(None, None, -1), ValueError, "step must be 1 or more, got -1"),
        (slice(None, None, 0), ValueError, "step must be 1 or more, got 0"),
        (None, TypeError, "got NoneType: read the tensor, and index that"),
        (True, TypeError, "got bool"),
        ([0, 1], TypeError, "got list"),
        (torch.tensor([0, 1]), TypeError, "got Tensor"),
        (np.array([True] * 4), TypeError, "got ndarray"),
        ("a", TypeError, "got str"),
        (1.5, TypeError, "got float"),
    ],
)
def test_other_indices_are_refused_in_one_line(
    index: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match="'w'") as raised:
        select_box((4, 6), index, "w")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_integers_of_numpy_and_torch_are_positions() -> None:
    for position in (np.int64(-1), torch.tensor(3)):
        assert select_box((4,), position, "w").offset == (3,)
