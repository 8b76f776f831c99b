"""Differences are found to the bit, and said with all that is needed to find their cause."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch

from pytest_dcp.errors import LawError
from pytest_dcp.properties import Difference, assert_state_dict_equal, differences


def only(actual: Any, expected: Any) -> Difference:
    (found,) = differences(actual, expected)
    return found


def floats(*bits: int) -> torch.Tensor:
    return torch.tensor([b - (1 << 32) if b >> 31 else b for b in bits], dtype=torch.int32).view(
        torch.float32
    )


def test_equal_states_have_none() -> None:
    state = {
        "a": {"w": torch.arange(6.0).reshape(2, 3), "empty": torch.empty(0, 2)},
        "list": [torch.tensor(1), {"x": math.nan}],
        "value": (1, "two", None, b"3"),
    }
    assert_state_dict_equal(state, state)
    assert not differences({"t": state["a"]["w"].mT.contiguous().mT}, {"t": state["a"]["w"]})


def test_names_the_first_element_its_bits_and_how_many() -> None:
    expected = torch.arange(6.0).reshape(2, 3)
    actual = expected.clone()
    actual[0, 2] = 7.0
    actual[1, 1] = 8.0
    found = only({"a": {"w": actual}}, {"a": {"w": expected}})
    assert (found.fqn, found.what, found.index, found.count, found.of) == (
        "a.w",
        "bits",
        (0, 2),
        2,
        6,
    )
    assert str(found) == (
        "rank 0: a.w[0, 2]: bits: expected 0x40000000 (2.0), got 0x40e00000 (7.0), 2 of 6 elements"
    )


@pytest.mark.parametrize(
    ("actual", "expected"),
    [(0x80000000, 0), (0x7FC00001, 0x7FC00000), (0x7F800001, 0x7FC00001), (1, 0)],
    ids=["-0.0", "NaN payload", "signalling NaN", "subnormal"],
)
def test_distinguishes_values_that_compare_equal_or_unordered(actual: int, expected: int) -> None:
    found = only({"w": floats(actual)}, {"w": floats(expected)})
    assert (found.what, found.index) == ("bits", (0,))
    assert f"{actual:08x}" in found.actual
    assert f"{expected:08x}" in found.expected


CASES: dict[str, tuple[Any, Any, str, str]] = {
    "a name is missing": ({}, {"w": torch.ones(1)}, "w", "missing"),
    "a name is new": ({"w": 1}, {}, "w", "unexpected"),
    "another shape": ({"w": torch.ones(2)}, {"w": torch.ones(3)}, "w", "shape"),
    "another dtype": ({"w": torch.ones(2)}, {"w": torch.ones(2).bfloat16()}, "w", "dtype"),
    "no tensor": ({"w": 1.0}, {"w": torch.tensor(1.0)}, "w", "kind"),
    "still on meta": ({"w": torch.ones(2, device="meta")}, {"w": torch.ones(2)}, "w", "kind"),
    "another value": ({"s": {"lr": 0.1}}, {"s": {"lr": 0.2}}, "s.lr", "value"),
    "another type": ({"v": True}, {"v": 1}, "v", "kind"),
    "another sign of zero": ({"v": [-0.0]}, {"v": [0.0]}, "v.0", "value"),
    "a tuple that was a list": ({"v": [1]}, {"v": (1,)}, "v", "kind"),
    "a shorter list": ({"v": [1]}, {"v": [1, 2]}, "v.1", "missing"),
    "a longer list": ({"v": [1, 2]}, {"v": [1]}, "v.1", "unexpected"),
}


@pytest.mark.parametrize("case", CASES)
def test_names_the_differences(case: str) -> None:
    actual, expected, fqn, what = CASES[case]
    found = only(actual, expected)
    assert (found.fqn, found.what) == (fqn, what)


def test_equal_nans_are_equal_and_others_are_not() -> None:
    quiet, loaded = (
        struct.unpack("<d", struct.pack("<Q", bits))[0]
        for bits in (0x7FF8000000000000, 0x7FF8000000000001)
    )
    assert not differences({"v": quiet}, {"v": quiet})
    assert only({"v": loaded}, {"v": quiet}).what == "value"


def test_all_differences_are_reported_at_once() -> None:
    with pytest.raises(LawError) as raised:
        assert_state_dict_equal({"a": 1, "c": 3}, {"a": 2, "b": 1})
    assert str(raised.value).splitlines() == [
        "the state dicts differ in 3 names:",
        "  rank 0: a: value: expected int 2, got int 1",
        "  rank 0: b: missing: expected int 1, got nothing",
        "  rank 0: c: unexpected: expected nothing, got int 3",
    ]
