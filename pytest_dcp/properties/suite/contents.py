"""Everything in a state is restored to the bit: every dtype, any strides, tiny, big and odd
entries.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import get_args

import torch
from hypothesis import given, settings

from pytest_dcp.properties.bits import Memory
from pytest_dcp.properties.dtypes import DTYPES
from pytest_dcp.properties.laws.round_trips import (
    assert_inplace,
    assert_meta_load,
    assert_partial_load,
    assert_round_trip,
)
from pytest_dcp.properties.state_dicts import SameTensor, StateSpec, state_dicts
from pytest_dcp.properties.suite.base import StorageTests
from pytest_dcp.properties.tensors import TensorSpec

SHAPES = ((), (0,), (3,), (2, 0, 3), (4, 5))
VALUES = StateSpec(
    {
        "none": None,
        "number": 7,
        "big": 1 << 70,
        "infinite": float("-inf"),
        "zero": -0.0,
        "text": "ünïcode \0 and more",
        "bytes": b"\x00\xff",
        "nested": {"list": [1, [2, ("three",)]], "deep": {"er": {"t": TensorSpec((2,))}}},
        "mixed": [TensorSpec((2,)), 3, {"x": TensorSpec()}],
    }
)
NAMES = ("a/b", "../up", "/root", "a space", "ü", ".metadata", "new\nline", "n" * 300, "%s", "C:")


class ContentTests(StorageTests):
    """Round trips in one process."""

    def test_dtypes(self, tmp_path: Path) -> None:
        """Every dtype is restored."""
        tensors = itertools.product(DTYPES, SHAPES, ("random", "special"))
        state = StateSpec(
            {
                f"{dtype} {shape} {content}": TensorSpec(shape, dtype, content)
                for dtype, shape, content in tensors
            }
        )
        assert_round_trip(state.on(), state.on(), tmp_path, dcp=self.dcp)

    def test_strides(self, tmp_path: Path) -> None:
        """Tensors of any strides are restored, into any others."""
        pairs = list(itertools.product(get_args(Memory), repeat=2))
        saved, loaded = (
            StateSpec({f"{pair}": TensorSpec((3, 2), memory=pair[which]) for pair in pairs})
            for which in (0, 1)
        )
        assert_inplace(saved.on(), loaded.on(), tmp_path, dcp=self.dcp)

    def test_values(self, tmp_path: Path) -> None:
        """Python values are restored."""
        assert_round_trip(VALUES.on(), VALUES.on(), tmp_path, dcp=self.dcp)

    def test_names(self, tmp_path: Path) -> None:
        """Any name is restored, and none escapes from the folder."""
        state = StateSpec({name: TensorSpec((2,), seed=n) for n, name in enumerate(NAMES)})
        assert_round_trip(state.on(), state.on(), tmp_path / "inside", dcp=self.dcp)
        assert {path.name for path in tmp_path.iterdir()} <= {"inside"}

    def test_tied_tensors(self, tmp_path: Path) -> None:
        """Two names of one tensor are restored."""
        state = StateSpec({"w": TensorSpec((3,)), "tied": SameTensor("w")})
        assert_round_trip(state.on(), state.on(), tmp_path, dcp=self.dcp)

    def test_tiny_entries(self, tmp_path: Path) -> None:
        """Many tiny entries are restored."""
        state = StateSpec({f"{n}": TensorSpec((n % 3,), seed=n) for n in range(1_000)})
        assert_round_trip(state.on(), state.on(), tmp_path, dcp=self.dcp)

    def test_big_entry(self, tmp_path: Path) -> None:
        """A big entry is restored."""
        big = TensorSpec((3 << 20,), torch.float32, "random")
        state = StateSpec({"before": TensorSpec(), "big": big, "after": TensorSpec()})
        assert_round_trip(state.on(), state.on(), tmp_path, dcp=self.dcp)

    def test_meta_tensors(self, tmp_path: Path) -> None:
        """Tensors on the meta device become real."""
        assert_meta_load(VALUES.on(), VALUES.on(), tmp_path, dcp=self.dcp)

    def test_partial_load(self, tmp_path: Path) -> None:
        """A part can be loaded alone."""
        state = StateSpec({name: TensorSpec((3,), seed=n) for n, name in enumerate("abc")})
        assert_partial_load(state.on(), state.on(), {"b"}, tmp_path, dcp=self.dcp)

    def test_any_state(self, tmp_path: Path) -> None:
        """Any state that Hypothesis draws is restored."""
        places = itertools.count()

        # Inside, since a property must not be in several classes.
        @settings(deadline=None, max_examples=max(settings().max_examples // 4, 1))
        @given(state=state_dicts(min_nested=1))
        def comes_back(state: StateSpec) -> None:
            folder = tmp_path / str(next(places))
            assert_round_trip(state.on(), state.on(), folder, dcp=self.dcp)

        comes_back()
