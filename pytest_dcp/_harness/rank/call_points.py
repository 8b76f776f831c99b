"""A point in the code of this rank at which the process ends or stops.

Enters: the name of a function, and which of its entries counts. Leaves: the announcement to the
controller, and the signal. A Python function is watched under any name, because its code is
replaced. Any other callable (`os:replace`) is replaced in the module or class that the name gives.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import signal
from collections.abc import Callable
from types import FunctionType
from typing import Any

from pytest_dcp.api import announce_death


class Point:
    """The `nth` entry of the function `at` in this process, from here until `disarm`."""

    def __init__(self, at: str, nth: int, call: str, signum: signal.Signals) -> None:
        if nth < 1:
            raise ValueError(f"{call}: nth counts entries from 1; got {nth!r}")
        self._call = call
        self._nth = nth
        self._signum = signum
        self._turns = itertools.count(1)
        self._entered = 0
        owner, name = _resolve(at)
        self.disarm = _watch(owner, name, self._enter)
        """Restore the function."""

    def describe_miss(self) -> str:
        """The calls that did not happen; empty if all did."""
        if self._entered >= self._nth:
            return ""
        return f"{self._call}: entered {self._entered} times, expected {self._nth}"

    def _enter(self) -> None:
        turn = next(self._turns)  # atomic: threads may enter together
        self._entered = max(turn, self._entered)
        if turn == self._nth:
            announce_death(f"{self._call}, entry {turn}")
            signal.raise_signal(self._signum)  # to this thread: it goes no further


def _resolve(at: str) -> tuple[Any, str]:
    """The module or class that holds the function, and the function's name in it."""
    module_name, colon, path = at.partition(":")
    if not (module_name and colon and path):
        raise ValueError(f"a point is written 'package.module:Qualified.name'; got {at!r}")
    try:
        owner: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ValueError(f"{at!r}: there is no module {error.name!r}") from None
    *parents, name = path.split(".")
    for part in parents:
        owner = _member(owner, part, at)
    if not callable(_member(owner, name, at)):
        raise ValueError(f"{at!r} is no function: it is {getattr(owner, name)!r}")  # noqa: TRY004 - a wrong name, not a wrong argument
    return owner, name


def _member(owner: Any, name: str, at: str) -> Any:
    if not hasattr(owner, name):
        near = difflib.get_close_matches(name, dir(owner))
        hint = f"; there are {', '.join(near)}" if near else ""
        raise ValueError(f"{at!r}: {owner.__name__} has no {name!r}{hint}")
    return getattr(owner, name)


def _watch(owner: Any, name: str, enter: Callable[[], None]) -> Callable[[], None]:
    """Have `enter` called before each call. Returns a function that undoes that."""
    found = getattr(owner, name)
    function = getattr(found, "__func__", found)  # of a class method
    if isinstance(function, FunctionType):
        return _watch_code(function, enter)

    def entered(*args: Any, **kwargs: Any) -> Any:
        enter()
        return found(*args, **kwargs)

    setattr(owner, name, entered)
    return lambda: setattr(owner, name, found)


def _watch_code(function: FunctionType, enter: Callable[[], None]) -> Callable[[], None]:
    code = function.__code__
    inner = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    inner.__kwdefaults__ = function.__kwdefaults__

    def entered(*args: Any, **kwargs: Any) -> Any:
        enter()
        return inner(*args, **kwargs)

    # The function keeps its own closure, which new code must fit: so `entered` goes in as a
    # constant, and the closure's names stay, unused.
    shell = _shell.__code__
    constants = tuple(entered if constant == "inside" else constant for constant in shell.co_consts)
    function.__code__ = shell.replace(
        co_consts=constants, co_freevars=code.co_freevars, co_name=code.co_name
    )

    def restore() -> None:
        function.__code__ = code

    return restore


def _shell(*args: Any, **kwargs: Any) -> Any:
    inside: Any = "inside"
    return inside(*args, **kwargs)
