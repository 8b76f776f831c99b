"""A lazy dict or list behaves as a real one, in every method and in C code."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Collection
from typing import Any

import pytest

from pytest_dcp._engine.plan.lazy_containers import LazyDict, LazyList

ITEMS = {"b": [1], "a": [2], "c": [3]}


class Letters(LazyDict[str, list[int]]):
    """ITEMS, made when asked for."""

    __slots__ = ("made",)

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def lazy_keys(self) -> Collection[str]:
        return ITEMS.keys()

    def make_value(self, key: str) -> list[int]:
        found = list(ITEMS[key])
        self.made.append(key)
        return found


class Numbers(LazyList[list[int]]):
    """Three lists, made when asked for."""

    __slots__ = ("made",)

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def lazy_len(self) -> int:
        return 3

    def make_item(self, at: int) -> list[int]:
        self.made.append(at)
        return [at]


def plain() -> dict[str, list[int]]:
    return copy.deepcopy(ITEMS)


def merge_in_place(d: dict[str, Any]) -> Any:
    d |= {"z": 1, "a": 2}
    return d


DICT_USES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict()": dict,
    "list()": list,
    "len": len,
    "iter": lambda d: list(iter(d)),
    "reversed": lambda d: list(reversed(d)),
    "unpacked": lambda d: {**d},
    "as keywords": lambda d: dict(**d),
    "in": lambda d: ("a" in d, "x" in d, 3 in d),
    "get": lambda d: (d.get("a"), d.get("x"), d.get("x", 5)),
    "item": lambda d: d["a"],
    "keys": lambda d: (list(d.keys()), d.keys() & {"a", "x"}, "a" in d.keys()),  # noqa: SIM118
    "values": lambda d: list(d.values()),
    "items": lambda d: list(d.items()),
    "copy": lambda d: d.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
    "repr": repr,
    "equal": lambda d: (d == ITEMS, d != ITEMS, d == ITEMS, d == {}, d == 3),
    "or": lambda d: (d | {"z": 1}, {"z": 1} | d),
    "or in place": merge_in_place,
    "set": lambda d: d.__setitem__("z", 1),
    "set old": lambda d: d.__setitem__("a", 1),
    "delete": lambda d: d.__delitem__("a"),
    "pop": lambda d: (d.pop("a"), d.pop("a", 7)),
    "popitem": lambda d: d.popitem(),
    "clear": lambda d: d.clear(),
    "setdefault": lambda d: (d.setdefault("a", 1), d.setdefault("z", 2)),
    "update": lambda d: d.update({"a": 1}, z=2),
    "update another": lambda d: {"z": 1, "a": 0}.update(d),
    "sorted": sorted,
    "json": json.dumps,
    "is a dict": lambda d: isinstance(d, dict),
    "changed in place": lambda d: d["a"].append(9),
    "changed while it is walked": lambda d: [d.__setitem__(k, v) for k, v in d.items()],
}


@pytest.mark.parametrize("looked", ["at nothing", "at one", "at all"])
@pytest.mark.parametrize("use", DICT_USES)
def test_a_lazy_dict_is_used_as_a_dict(use: str, looked: str) -> None:
    expected, lazy = plain(), Letters()
    if looked == "at one":
        assert lazy["a"] == [2]
    elif looked == "at all":
        assert lazy == expected
    if use == "json":
        # Its C code takes a dict for empty whose own memory is: see `PathTable`.
        lazy.make_all()
    assert DICT_USES[use](lazy) == DICT_USES[use](expected)
    assert dict(lazy) == expected
    assert list(lazy) == list(expected)
    with pytest.raises(KeyError):
        lazy["no such key"]
    with pytest.raises(KeyError):
        del lazy["no such key"]
    with pytest.raises(KeyError):
        lazy.pop("no such key")


def test_a_lazy_dict_makes_only_the_values_looked_at_and_keeps_them() -> None:
    lazy = Letters()
    assert len(lazy) == 3
    assert "b" in lazy
    assert list(lazy) == ["b", "a", "c"]
    assert lazy.made == []
    assert lazy["a"] is lazy["a"]
    assert lazy.get("a") is lazy["a"]
    assert lazy.made == ["a"]
    assert list(lazy.made_items()) == [("a", [2])]


def assign_slice(x: list[Any]) -> None:
    x[1:] = [5, 6, 7]


def grow(x: list[Any]) -> Any:
    x += [4]
    return x


LIST_USES: dict[str, Callable[[list[Any]], Any]] = {
    "list()": list,
    "tuple()": tuple,
    "len": len,
    "iter": lambda x: list(iter(x)),
    "reversed": lambda x: list(reversed(x)),
    "unpacked": lambda x: [0, *x],
    "in": lambda x: ([1] in x, 3 in x),
    "items": lambda x: (x[0], x[-1], x[1:], x[::-1]),
    "copy": lambda x: x.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "repr": repr,
    "equal": lambda x: (x == [[0], [1], [2]], x != [], x == [[0], [1], [2]], x == 3),
    "order": lambda x: (x < [[5]], x <= x, x > [], x >= [[9]]),
    "add": lambda x: (x + [3], [3] + x, x + x),  # noqa: RUF005 - under test
    "times": lambda x: (x * 2, 2 * x),
    "count": lambda x: x.count([1]),
    "index": lambda x: (x.index([1]), x.index([1], 1, 3)),
    "sorted": sorted,
    "max": max,
    "sum": lambda x: sum(x, []),  # noqa: RUF017 - under test
    "extend another": lambda x: [0].extend(x),
    "slice of another": lambda x: [0].__setitem__(slice(0, 1), x),
    "append": lambda x: x.append(9),
    "extend": lambda x: x.extend([8, 9]),
    "insert": lambda x: x.insert(1, 9),
    "grow": grow,
    "pop": lambda x: (x.pop(), x.pop(0)),
    "remove": lambda x: x.remove([1]),
    "reverse": lambda x: x.reverse(),
    "sort": lambda x: x.sort(key=lambda item: -item[0]),
    "clear": lambda x: x.clear(),
    "set": lambda x: x.__setitem__(0, 5),
    "set slice": assign_slice,
    "delete": lambda x: x.__delitem__(0),
    "delete slice": lambda x: x.__delitem__(slice(1, 3)),
    "times in place": lambda x: x.__imul__(2),
    "is a list": lambda x: isinstance(x, list),
    "changed in place": lambda x: x[1].append(9),
}


@pytest.mark.parametrize("looked", ["at nothing", "at one", "at all"])
@pytest.mark.parametrize("use", LIST_USES)
def test_a_lazy_list_is_used_as_a_list(use: str, looked: str) -> None:
    expected: list[Any] = [[0], [1], [2]]
    lazy: Any = Numbers()
    if looked == "at one":
        assert lazy[1] == [1]
    elif looked == "at all":
        lazy.make_all()
    assert LIST_USES[use](lazy) == LIST_USES[use](expected)
    assert list(lazy) == expected
    assert len(lazy) == len(expected)
    with pytest.raises(IndexError):
        lazy[99]


def test_a_lazy_list_makes_only_the_values_looked_at_and_keeps_them() -> None:
    lazy = Numbers()
    assert len(lazy) == 3
    assert lazy[-1] is lazy[2]
    assert lazy.made == [2]
    assert list(lazy.made_items()) == [(2, [2])]
