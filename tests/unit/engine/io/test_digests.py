"""Digests and sums by which ranks compare their copies: equal for equal values, in any process."""

from __future__ import annotations

import copy
import os
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.io.digests import block_sums, digest_of_value, outline, sum_of_tensor
from pytest_dcp._engine.plan.replica_comparison import (
    NOT_COMPARED,
    SAMPLE_BYTES,
    Replicas,
    first_difference,
)
from pytest_dcp.rank_names import some_ranks_text

atoms = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=False), st.text("ab")
)
keys = st.one_of(st.integers(-2, 2), st.text("ab", max_size=1))
values = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.sets(keys, max_size=3),
    ),
    max_leaves=6,
)


def told(value: Any) -> Any:
    """The value with the classes of everything in it, and without any order of sets and dicts."""
    if isinstance(value, dict):
        return "dict", frozenset((told(k), told(v)) for k, v in value.items())
    if isinstance(value, set):
        return "set", frozenset(map(told, value))
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(map(told, value))
    return type(value).__name__, repr(value)


@given(values, values)
def test_digests_are_equal_where_the_values_are(one: Any, other: Any) -> None:
    assert (digest_of_value(one) == digest_of_value(other)) == (told(one) == told(other))
    assert digest_of_value(copy.deepcopy(one)) == digest_of_value(one) != NOT_COMPARED


@given(st.dictionaries(keys, atoms, max_size=4), st.randoms(use_true_random=False))
def test_the_order_of_a_dict_plays_no_part_and_that_of_an_ordered_one_does(
    value: dict[Any, Any], random: Any
) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert digest_of_value((dict(items),)) == digest_of_value((value,))
    same = items == list(value.items())
    pair = digest_of_value(OrderedDict(items)), digest_of_value(OrderedDict(value))
    assert (pair[0] == pair[1]) == same


SCRIPT = """
import torch, numpy as np
from collections import Counter, deque
from pytest_dcp._engine.io.digests import digest_of_value
class Own:
    def __init__(self): self.names = {"a", "b", "c", "d"}; self.me = self
value = ({"x", "y", "z", "w"}, frozenset("abcdef"), Counter("hello"), deque("ab"), Own(),
         np.arange(3), torch.ones(2), {("k", 1): {"p", "q", "r"}}, print, Own)
print(digest_of_value(value))
"""


def test_digests_are_the_same_in_processes_that_hash_strings_otherwise() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert found != {b"0\n"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.arange(3), np.arange(3.0)),
        (np.arange(3), np.array([0, 1, 3])),
        (np.arange(4), np.arange(4).reshape(2, 2)),
        ((torch.ones(2),), (torch.zeros(2),)),
        ((torch.ones(2),), (torch.ones(2, 1),)),
        ([1, [2]], [[1], 2]),
        (["ab", "c"], ["a", "bc"]),
        (np.float32(1), np.float64(1)),
        ([1], (1,)),
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        (0, None),
        (1, -1),
        ((1 << 60) - 1, 1 << 60),
        (1 << 61, 0),
        (5, struct.unpack("<d", struct.pack("<q", 5))[0]),
        (OSError, ValueError),
    ],
    ids=repr,
)
def test_values_that_differ_a_little_have_other_digests(one: Any, other: Any) -> None:
    assert digest_of_value(one) != digest_of_value(other)


def test_a_value_that_cannot_be_walked_is_not_compared() -> None:
    assert digest_of_value(threading.Lock()) == NOT_COMPARED
    assert digest_of_value((torch.ones(2, device="meta"),)) == NOT_COMPARED


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[::3, 1:],
        lambda t: t[:, 0],
        lambda t: t.reshape(-1)[::7],
        lambda t: t[5, 5],
        lambda t: t.to(torch.float64)[:, 7],
    ],
)
@pytest.mark.parametrize("start", [0, 8, 4096])
def test_a_sum_is_of_the_row_major_data_for_any_strides(view: Any, start: int) -> None:
    tensor = view(torch.arange(64 * 100, dtype=torch.float32).reshape(64, 100) % 251)
    data = tensor.contiguous().numpy().tobytes()
    start = min(start, len(data) // tensor.itemsize * tensor.itemsize)
    for nbytes in (len(data) - start, min(SAMPLE_BYTES, len(data) - start)):
        flat = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        assert sum_of_tensor(tensor, start, nbytes) == sum_of_tensor(flat, start, nbytes)
        assert sum_of_tensor(tensor, start, nbytes) != NOT_COMPARED


def test_blocks_and_outlines_find_the_first_difference() -> None:
    one = torch.zeros(100_000, dtype=torch.int16)
    other = one.clone()
    other[70_000] = 1
    assert first_difference(block_sums(one), block_sums(other)) == 140_000 // 65_536
    before = outline({"a": [1, 2], "b": (torch.arange(3), "x")})
    after = outline({"a": [1, 2], "b": (torch.tensor([0, 1, 5]), "x")})
    at = first_difference(before, after)
    assert at is not None
    assert [before[at][:2], after[at][:2]] == [("['b'][0][2]", "2"), ("['b'][0][2]", "5")]
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1], [1]) is None


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=6, unique=True), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_a_rank_that_differs_is_found_among_equal_ones(
    groups: list[list[int]], random: Any
) -> None:
    """Each rank holds some of six groups, a row each; one copy of one group is changed."""
    held = [np.array(some, dtype=np.int64) for some in groups]
    count = np.bincount(np.concatenate([*held, [0] * 0]).astype(np.int64), minlength=6)
    nbytes = np.array([-1, -1, 8, 8, 80_000, 0], dtype=np.int64)
    names = tuple("abcdef")
    replicas = Replicas(held, count, nbytes, names, np.arange(6))
    checks = replicas.choose_rows("check", seed=1)
    compared = {g for g in range(6) if count[g] > 1 and nbytes[g]}
    if checks is None:
        assert not (count > 1).any()
        return
    assert {int(g) for c, own in zip(checks, held, strict=True) for g in own[c.rows]} == compared
    sums: list[Any] = [
        np.array([own[row] + 1 for row in c.rows], dtype=np.uint64)
        for c, own in zip(checks, held, strict=True)
    ]
    assert replicas.find_differing(checks, sums) == []
    if not compared:
        return
    odd = random.choice(sorted(compared))
    holders = [rank for rank, own in enumerate(held) if odd in own]
    rank = random.choice(holders)
    sums[rank][checks[rank].rows.tolist().index(held[rank].tolist().index(odd))] = 99
    (found,) = replicas.find_differing(checks, sums)
    assert found.fqn == names[odd]
    assert set(found.members) == set(holders)
    assert sorted(map(tuple, found.camps())) == sorted(
        {(rank,), tuple(other for other in holders if other != rank)} - {()}
    )
    sums[rank] = None
    assert replicas.find_differing(checks, sums) == []


def test_ranks_are_named_by_ranges() -> None:
    assert some_ranks_text([3]) == "rank 3"
    assert some_ranks_text([0, 1, 2, 5]) == "ranks 0-2, 5"
    assert some_ranks_text(list(range(0, 40, 2))).endswith("14, ...")
