"""Values between ranks arrive as sent; all else is refused, and no code is run."""

from __future__ import annotations

import collections
import enum
import json
import pathlib
import pickle
import struct
import threading
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from pytest_dcp._engine.coordinate import wire
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter
from pytest_dcp._engine.verbs.wire_classes import allows_pickles
from pytest_dcp.checkpoint.default_planner import DefaultSavePlanner

texts = st.text(st.characters(codec=None), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
keys = texts | st.integers(-(2**62), 2**62) | st.tuples(texts, st.integers(0, 9))
values = st.recursive(
    scalars | st.binary(max_size=9) | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.sets(keys, max_size=3)
        | st.frozensets(keys, max_size=3)
    ),
    max_leaves=12,
)
paths = st.dictionaries(
    texts, st.lists(texts | st.integers(-99, 2**70), max_size=3).map(tuple), max_size=40
)


def sent(value: Any, **how: Any) -> Any:
    """The value on another rank."""
    return wire.unpack([bytes(segment) for segment in wire.pack(value, **how)], **how)


def shape_of(value: Any) -> Any:
    """The value with the types of all that it holds."""
    if isinstance(value, dict):
        return type(value), [(shape_of(k), shape_of(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [shape_of(v) for v in value]
    if isinstance(value, set | frozenset):
        return type(value), value
    return type(value), repr(value)


@given(values)
def test_plain_values_arrive_as_they_were(value: Any) -> None:
    assert shape_of(sent(value)) == shape_of(value)


@given(paths)
def test_a_planners_paths_arrive_as_they_were(value: Any) -> None:
    assert shape_of(sent(value)) == shape_of(value)


class Level(enum.IntEnum):
    ONE = 1


class Word(str):
    pass


SOME = [
    float("nan"),
    -0.0,
    torch.float8_e4m3fn,
    torch.strided,
    torch.preserve_format,
    torch.Size((2, 3)),
    torch.Size(()),
    pathlib.Path("/a/b"),
    pathlib.PurePosixPath("a"),
    collections.OrderedDict(b=1, a=[2]),
    bytearray(b"xy"),
    np.float32(0.5),
    np.int64(-3),
    WriteItemType.SHARD,
    MetadataIndex("w", (1, 2), 3),
    TensorProperties(torch.bfloat16),
    SavePlan([], planner_data={"a": ("b", 0)}, storage_data=("x",)),
    "\ud83d\ude00 and \U0001f600",
]


@pytest.mark.parametrize("value", SOME, ids=repr)
def test_other_values_that_plans_hold_arrive_as_they_were(value: Any) -> None:
    assert shape_of(sent(value)) == shape_of(value)
    assert shape_of(sent({"in": [value]})) == shape_of({"in": [value]})


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.ones((2, 3), ">f4")),
        np.arange(9)[::2],
        np.array(7, np.int16),
        np.zeros((0, 4)),
        np.array([True, False]),
        np.array([1 + 2j]),
    ],
)
def test_arrays_arrive_as_they_were(array: Any) -> None:
    copy = sent(array)
    assert (copy.dtype, copy.shape) == (array.dtype, array.shape)
    assert copy.flags.f_contiguous == array.flags.f_contiguous or not array.flags.forc
    assert np.array_equal(copy, array)


def test_attributes_that_were_set_on_a_plan_arrive_with_it() -> None:
    plan = SavePlan([])
    vars(plan)["more"] = {"a": 1}
    assert vars(sent(plan))["more"] == {"a": 1}
    assert wire.pack(SavePlan([])) != wire.pack(plan)


def test_words_and_numbers_of_a_class_arrive_as_equal_plain_ones() -> None:
    copy = sent({Word("w"): Level.ONE})
    assert shape_of(copy) == shape_of({"w": 1})


@dataclass(frozen=True)
class OwnPlan(SavePlan):
    mine: Any = None


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (threading.Lock(), "a _thread.lock"),
        (object(), "a object"),
        ({"deep": [OwnPlan([])]}, "a test_wire.OwnPlan"),
        (np.array([object()]), "a numpy.ndarray"),
        (np.array(["2020"], "M8"), "a numpy.ndarray"),
        (print, "a builtin_function_or_method"),
        (int, "<class 'int'>"),
        (torch.ones(1), "a torch.Tensor"),
    ],
)
def test_a_value_that_is_no_plain_data_is_refused_by_name(value: Any, name: str) -> None:
    with pytest.raises(TypeError, match="cannot be sent to another rank") as caught:
        wire.pack(value)
    assert name in str(caught.value)
    assert "pickles_between_ranks" in str(caught.value)


def test_a_value_nested_too_deeply_is_refused_in_words() -> None:
    deep: Any = ()
    for _ in range(100_000):
        deep = (deep,)
    with pytest.raises(TypeError, match="nested too deeply"):
        wire.pack({"a": deep})
    with pytest.raises(ValueError, match="value of another rank"):
        wire.unpack([b'["l",[' * 100_000])


def test_a_class_of_the_users_own_travels_as_a_pickle_where_that_is_allowed() -> None:
    plan = OwnPlan([], mine=np.arange(3))
    copy = sent(plan, pickles=True)
    assert isinstance(copy, OwnPlan)
    assert copy.mine.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="got a pickle, and opens none"):
        wire.unpack(wire.pack(plan, pickles=True))


def test_a_pickle_is_not_opened_in_any_place_of_a_value(capfd: pytest.CaptureFixture[str]) -> None:
    bomb = b"cbuiltins\nprint\n(S'ran'\ntR."
    for head in ('["p",0]', '["l",[1,["p",0]]]', '["d",["a"],[["p",0]]]', '["v","Index",["p",0]]'):
        with pytest.raises(ValueError, match="opens none"):
            wire.unpack([head.encode(), bomb])
    for payload in ([bomb], [b'["b"]', bomb], [pickle.dumps(print)]):
        try:
            assert wire.unpack(payload) == bomb
        except ValueError:
            continue
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("head", "segments"),
    [
        ("", []),
        ("[", []),
        ("{}", []),
        ('["?"]', []),
        ('["o","gone",[]]', []),
        ('["o","SavePlan",[1]]', []),
        ('["o","SavePlan",[1,2,3,4,{"a":1}]]', []),
        ('["o","SavePlan",[1,2,3,4,["d",["__class__"],[1]]]]', []),
        ('["o",["l",[]],[]]', []),
        ('["v","WriteItemType","GONE"]', []),
        ('["v","WriteItems",["t",[1,2]]]', []),
        ('["a","<f8",[2],"C"]', [bytes(8)]),
        ('["a","<f8",[-1],"C"]', [bytes(8)]),
        ('["a","O",[1],"C"]', [bytes(8)]),
        ('["a","f8,f8",[1],"C"]', [bytes(16)]),
        ('["a","(2,)f8",[1],"C"]', [bytes(16)]),
        ('["a","<f8",[1.0],"C"]', [bytes(8)]),
        ('["n","<f8"]', [bytes(16)]),
        ('["b"]', []),
        ('["b"]', [b"x", b"more"]),
        ('["r"]', [b"a", b"b", b"\1\0\0\0", b""][:3]),
        ('["r"]', [b"a", b"b", b"\2\0\0\0", b""]),
        ('["r"]', [b"a\nc", b"b", b"\1\0\0\0", b""]),
        ('["r"]', [b"a", b"b", b"\1\0\0\0", b"\0\0\0\0"]),
        ('["r"]', [b"a", b"b", b"\1\0\0\0", b"\7\0\0\0"]),
        ('["d",["a"],[]]', []),
        ('["d",[["l",[]]],[1]]', []),
        ('["S",["a"]]', []),
        ('["y","torch.load"]', []),
        ('["P",1]', []),
        ('["c","a",1]', []),
        ('["s",[["l",[]]]]', []),
    ],
)
def test_a_message_that_no_rank_sends_is_refused(head: str, segments: list[bytes]) -> None:
    with pytest.raises(ValueError):
        wire.unpack([head.encode(), *segments])
    with pytest.raises(ValueError, match="got no bytes"):
        wire.unpack([])


@given(st.binary(max_size=60), st.lists(st.binary(max_size=20), max_size=3))
def test_garbage_is_a_value_error(head: bytes, segments: list[bytes]) -> None:
    try:
        wire.unpack([head, *segments])
    except ValueError:
        return


nodes = st.recursive(
    scalars | st.sampled_from(list(wire._READERS)) | st.sampled_from(["Index", "SavePlan", "<f8"]),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=20,
)


@given(nodes, st.lists(st.binary(max_size=16), max_size=5))
def test_any_text_of_json_is_a_value_or_a_value_error(node: Any, segments: list[bytes]) -> None:
    head = json.dumps(node, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        wire.unpack([head, *segments])
    except ValueError:
        return


BOMBS = {
    "a segment that is named many times": [
        b'["l",[' + b",".join([b'["b"]'] * 1000) + b"]]",
        b"x" * 99,
    ],
    "empty lists": [b'["l",[' + b",".join([b"[]"] * 2**21) + b"]]"],
    "an array without bytes": [b'["a","<f8",[1099511627776],"C"]', b""],
    "ints with one hash": [
        b'["d",' + json.dumps([n * (2**61 - 1) for n in range(20_000)]).encode() + b",[]]"
    ],
    "a set of such": [
        b'["s",' + json.dumps([n * (2**61 - 1) for n in range(20_000)]).encode() + b"]"
    ],
    "tuples of such": [
        b'["d",[' + b",".join(b'["t",[%d]]' % (n * (2**61 - 1)) for n in range(20_000)) + b"],[]]"
    ],
    "paths of many parts": [b'["r"]', b"a", b"", struct.pack("<I", 2**31), b""],
    "an int of many digits": [b"1" * 1_000_000],
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_takes_much(bomb: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            wire.unpack(BOMBS[bomb])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


class OwnPlanner(DefaultSavePlanner):
    pass


class StrictPlanner(OwnPlanner):
    pickles_between_ranks = False


class OpenPlanner(DefaultSavePlanner):
    pickles_between_ranks = True


def test_pickles_are_for_planners_and_storages_of_the_users_own() -> None:
    ours: Any = FileSystemWriter("unused")
    assert not allows_pickles(DefaultSavePlanner(), ours)
    assert allows_pickles(OwnPlanner(), ours)
    assert allows_pickles(OpenPlanner(), ours)
    assert not allows_pickles(StrictPlanner(), ours)
    assert not allows_pickles(StrictPlanner(), object())
    assert not allows_pickles(torch.distributed.checkpoint.DefaultSavePlanner(), ours)
    assert allows_pickles(DefaultSavePlanner(), threading.Thread())
    own = DefaultSavePlanner()
    own.pickles_between_ranks = True  # type: ignore[attr-defined]  # set by the user
    assert allows_pickles(own, ours)
