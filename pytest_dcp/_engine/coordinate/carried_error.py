"""Pure (no I/O): an exception <-> plain data, without running a line of its class.

An exception is sent as its class's name, its arguments and its attributes. Another rank rebuilds it
if an exception class of that name is loaded there: the builtin class that it derives from makes it
(OSError sets its `errno`), then its attributes are set. Neither `__init__` nor `__reduce__` of the
class is called, and no module is imported. An exception that holds anything but plain data, or
whose text would change, is sent as text alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_dcp._engine.coordinate import wire
from pytest_dcp._engine.coordinate.error_class import HEAP_TYPE, MEMBERS
from pytest_dcp._engine.coordinate.sent_classes import record

MAX_DATA_BYTES = 1024 * 1024
"""A larger exception (it holds a tensor) is sent as text alone: every rank gets a copy."""


@dataclass(frozen=True, slots=True)
class CarriedError:
    """The parts from which an exception is rebuilt."""

    module: str
    qualname: str
    args: tuple[Any, ...]
    """Of the builtin class."""
    attributes: Mapping[str, Any]


record(CarriedError)


def carry(error: BaseException) -> CarriedError | None:
    """The data from which another rank can rebuild the exception; None if the result
    would differ.
    """
    cls = type(error)
    try:
        _, args, *state = _builtin_of(cls).__reduce__(error)
        attributes = {name: value for name, value in dict(*state).items() if name != "args"}
        segments = wire.pack((args, attributes))
        if sum(memoryview(segment).nbytes for segment in segments) > MAX_DATA_BYTES:
            return None
        carried = CarriedError(cls.__module__, cls.__qualname__, *wire.unpack(segments))
        copy = rebuild(carried)
        same = type(copy) is cls and str(copy) == str(error)
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - any class may come, with any __str__
        return None
    return carried if same else None


def rebuild(carried: CarriedError) -> BaseException | None:
    """The exception; None if its class is not loaded here, or is not an exception class."""
    cls = _loaded_class(carried.module, carried.qualname)
    if cls is None:
        return None
    builtin = _builtin_of(cls)
    error: BaseException = builtin.__new__(cls, *carried.args)
    builtin.__init__(error, *carried.args)
    for name, value in carried.attributes.items():
        _set(error, name, value)
    return error


def is_whole(carried: object) -> bool:
    """Whether this is a carried error with fields of the right types, as `carry` makes them."""
    return (
        isinstance(carried, CarriedError)
        and type(carried.module) is str
        and type(carried.qualname) is str
        and type(carried.args) is tuple
        and type(carried.attributes) is dict
        and {str}.issuperset(map(type, carried.attributes))
    )


def _builtin_of(cls: type[BaseException]) -> Any:
    """The most derived of its bases that is written in C."""
    return next(one for one in cls.__mro__ if not one.__flags__ & HEAP_TYPE)


def _loaded_class(module: str, qualname: str) -> type[BaseException] | None:
    """The class of this name, if it is loaded; imports nothing and runs no module's code."""
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        # `vars`, not getattr: a module's own __getattr__ may import modules.
        found = getattr(found, "__dict__", {}).get(name)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _set(error: BaseException, name: str, value: Any) -> None:
    """Set an attribute, bypassing the class's own `__setattr__` and properties."""
    for cls in type(error).__mro__:
        member: Any = vars(cls).get(name)
        if isinstance(member, MEMBERS) and not cls.__flags__ & HEAP_TYPE and name[:2] != "__":
            member.__set__(error, value)
            return
    vars(error)[name] = value
