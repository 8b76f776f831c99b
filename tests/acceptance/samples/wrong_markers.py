"""Copied as test_wrong_markers.py: every test but the first two has a marker that is wrong."""

from __future__ import annotations

import unittest

import pytest
from session_recorder import note

world_size = pytest.mark.world_size


def test_ordinary() -> None:
    note("ran")


@world_size(2)
def test_right() -> None:
    note("ran")


WRONG = {
    "zero": world_size(0),
    "negative": world_size(-1),
    "too_large": world_size(5000),
    "text": world_size("4"),
    "float": world_size(2.0),
    "bool": world_size(True),
    "none": world_size(None),
    "set": world_size({2}),
    "no_size": world_size(),
    "two_sizes": world_size(2, 3),
    "keyword_size": world_size(size=2),
    "empty_list": world_size([]),
    "list_with_text": world_size([2, "x"]),
    "list_in_list": world_size([[1], [2]]),
    "size_twice": world_size([2, 2]),
    "backend": world_size(2, backend="mpi"),
    "device": world_size(2, device="tpu"),
    "nccl_on_cpu": world_size(2, backend="nccl", device="cpu"),
    "mesh_product": world_size(4, mesh=(2, 3)),
    "mesh_int": world_size(4, mesh=4),
    "mesh_names": world_size(4, mesh=(2, 2), mesh_dim_names=("dp",)),
    "mesh_names_twice": world_size(4, mesh=(2, 2), mesh_dim_names=("dp", "dp")),
    "mesh_names_text": world_size(2, mesh_dim_names="dp"),
    "timeout_negative": world_size(2, timeout=-1),
    "timeout_nan": world_size(2, timeout=float("nan")),
    "timeout_text": world_size(2, timeout="1"),
    "isolation": world_size(2, isolation="process"),
    "typing_error": world_size(2, tiemout=3),
    "two_problems": world_size(2, timeout=-1, backend="mpi"),
    "list_in_param": world_size([1, 2]),
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=mark) for name, mark in WRONG.items()])
def test_wrong(case: str) -> None:
    note("ran")


@world_size([2, 3], mesh=(2,))
def test_mesh_of_one_size() -> None:
    note("ran")


@pytest.mark.parametrize("world_size", [0, 5000, "x"])
@world_size
def test_parametrised(world_size: object) -> None:
    note("ran")


class TestOfUnittest(unittest.TestCase):
    @world_size([1, 2])
    def test_list(self) -> None:
        note("ran")
