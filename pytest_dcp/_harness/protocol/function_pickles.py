"""Functions and values sent between processes with cloudpickle: closures and lambdas too.

Beyond cloudpickle: code keeps its file name, where newer versions of cloudpickle write
`<dynamic-code>`, so that tracebacks and stacks in ranks show where a function was written; and an
error names the object that cannot be pickled, with the path to it.
"""

from __future__ import annotations

import collections
import inspect
import io
import pickle
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import cloudpickle

from pytest_dcp.errors import WorldError

DEPTH = 5
"""How deep to search nested functions for an object that cannot be pickled."""


def dumps(value: object) -> bytes:
    """The pickled value. Raises any exception of the value's own reduction."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


def load_from_rank(payload: bytes, rank: int, what: str) -> Any:
    """Unpickle a rank's value; `what` describes it for people.

    Loading can run any code of the rank: the test's own, which runs as the same user. Raises
    `WorldError` naming the rank if that fails.
    """
    try:
        return pickle.loads(payload)
    except Exception as error:  # noqa: BLE001 - the value's own code: any error
        is_of_values_own_code = error.__traceback__ is not None and error.__traceback__.tb_next
        raise WorldError(
            f"{what} of rank {rank} cannot be unpickled here: {type(error).__name__}: {error}"
        ) from (error if is_of_values_own_code else None)


def dump_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bytes:
    """A pickled call, for `cloudpickle.loads`. Raises TypeError naming the object that cannot be
    pickled.
    """
    __tracebackhide__ = True
    try:
        return dumps((function, args, kwargs))
    except Exception as error:  # noqa: BLE001 - user code reduces its own objects: any error
        text = f"{type(error).__name__}: {error}"
        found = next(_culprits(_parts_of_call(function, args, kwargs), DEPTH), None)
    where = found or "it cannot be pickled"
    raise TypeError(f"{_describe(function)} cannot be sent to the ranks: {where} ({text})")


def _code_with_file(code: types.CodeType) -> tuple[Any, ...]:
    make, args = _REDUCE_CODE(code)
    return _make_code, (make, args, code.co_filename)


def _make_code(
    make: Callable[..., types.CodeType], args: tuple[Any, ...], file: str
) -> types.CodeType:
    return make(*args).replace(co_filename=file)


_REDUCE_CODE: Any = cloudpickle.Pickler.dispatch_table[types.CodeType]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle ships no types
    dispatch_table: ClassVar[Any] = collections.ChainMap(
        {types.CodeType: _code_with_file}, cloudpickle.Pickler.dispatch_table
    )


Parts = Iterator[tuple[str, object]]
"""(relation to the whole, value) of each part."""


def _parts_of_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Parts:
    yield "", function
    yield from ((f"argument {number}", value) for number, value in enumerate(args, 1))
    yield from ((f"argument {name!r}", value) for name, value in kwargs.items())


def _culprits(parts: Parts, depth: int) -> Iterator[str]:
    """For each part that cannot be pickled, the path to its smallest unpicklable part."""
    for name, value in parts:
        if _is_pickled(value):
            continue
        inner = next(_culprits(_parts_of(value), depth - 1), None) if depth else None
        if inner is not None:
            yield f"{name}, {inner}" if name else inner
        elif name:
            yield f"{name} is a {type(value).__module__}.{type(value).__qualname__}"


def _parts_of(value: object) -> Parts:
    """A function's closure, globals and defaults; a container's items."""
    if isinstance(value, types.MethodType):
        yield "its object", value.__self__
        value = value.__func__
    if isinstance(value, types.FunctionType):
        names = inspect.getclosurevars(value)
        yield from ((f"closure variable {name!r}", one) for name, one in names.nonlocals.items())
        yield from ((f"global {name!r}", one) for name, one in names.globals.items())
        yield from (("a default", one) for one in value.__defaults__ or ())
    elif isinstance(value, dict):
        yield from ((f"the value of {key!r}", one) for key, one in value.items())
    elif isinstance(value, list | tuple):
        yield from ((f"element {number}", one) for number, one in enumerate(value))
    elif hasattr(value, "__dict__"):
        yield from ((f"attribute {name!r}", one) for name, one in vars(value).items())


def _is_pickled(value: object) -> bool:
    try:
        dumps(value)
    except Exception:  # noqa: BLE001 - see `dump_call`
        return False
    return True


def _describe(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", None) or repr(function)
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else name
