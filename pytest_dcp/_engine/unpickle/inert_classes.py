"""Inert values of numpy and of the standard library, as a pickle may make them.

Enters: the arguments of calls that a pickle asks for, unchecked. Leaves: arrays and
scalars of plain dtypes, dates, paths, decimals, byte streams and similar: values that can be made
and used without running code that the file chose. Each is made here, by a function that has checked
the arguments' types and charged for their length; nothing is looked up by name. CPython 3.10 to
3.14 and numpy 1 and 2 write these forms at protocol 2.
"""

from __future__ import annotations

import array
import datetime
import decimal
import fractions
import io
import math
import pathlib
import types
import uuid
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pytest_dcp._engine.unpickle.machine import Callee, PickleMachine, UnknownGlobalError, brief
from pytest_dcp.errors import CheckpointCorruptError

MAX_DIGITS = 1024
"""Characters of a decimal or fraction: longer ones take quadratic time to read."""
MAX_ARRAY_DIMS = 32
"""numpy 1's limit; numpy 2 allows 64."""
_PLAIN_KINDS = "biufcSUMm"
_MOMENT_UNITS = frozenset(
    ["Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns", "ps", "fs", "as", "generic"]
)
_Args = tuple[Any, ...]


def _refusal(expected: str, args: object) -> UnknownGlobalError:
    text = ", ".join(map(brief, args[:4])) if isinstance(args, tuple) else brief(args)
    return UnknownGlobalError(f"expected {expected}, got ({text})")


# ---- numpy


def _dtype(_: PickleMachine, args: _Args) -> np.dtype[Any]:
    """`numpy.dtype(text, align, copy)`: a new object, whose state follows."""
    text = args[0] if args else None
    if type(text) is not str or not 2 <= len(text) <= 12 or text[0] not in _PLAIN_KINDS:
        raise _refusal("a plain dtype of numpy", args)
    if not text[1:].isdigit() or any(type(arg) not in (bool, int) for arg in args[1:]):
        raise _refusal("a plain dtype of numpy", args)
    try:
        return np.dtype(text, False, True)
    except (TypeError, ValueError):
        raise _refusal("a plain dtype of numpy", args) from None


def _build_dtype(target: Any, state: object) -> None:
    """The byte order, and the unit of a moment: (version, order, None, None, None, ...).

    Sets numpy's own state for that order and unit, so that no size can change.
    """
    if type(state) is not tuple or not 8 <= len(state) <= 9 or state[2:5] != (None, None, None):
        raise _refusal("a plain dtype of numpy", state)
    if state[1] not in ("<", ">", "|", "="):
        raise _refusal("a byte order", state[1])
    text = f"{target.kind}8[{_unit(state)}]" if target.kind in "Mm" else target.str
    target.__setstate__(np.dtype(text).newbyteorder(state[1]).__reduce__()[2])


def _unit(state: _Args) -> str:
    """The unit of a moment or a duration: state[8] is (None, (b'ns', 1, 1, 1))."""
    metadata = state[8] if len(state) == 9 else None
    unit = metadata[1] if type(metadata) is tuple and len(metadata) == 2 else None
    if type(unit) is not tuple or len(unit) != 4 or type(unit[0]) is not bytes:
        raise _refusal("the unit of a moment", metadata)
    name, many = unit[0].decode("latin1"), unit[1]
    if name not in _MOMENT_UNITS or type(many) is not int or not 1 <= many < 1 << 31:
        raise _refusal("the unit of a moment", unit)
    return name if many == 1 or name == "generic" else f"{many}{name}"


def _reconstruct(machine: PickleMachine, args: _Args) -> np.ndarray[Any, Any]:
    """`_reconstruct(numpy.ndarray, (0,), b'b')`: an empty array, which its state fills."""
    if len(args) != 3 or args[0] is not _NDARRAY or args[1] != (0,) or args[2] != b"b":
        raise _refusal("a plain array of numpy", args)
    machine.charge(_ARRAY_COST)
    return np.empty((0,), np.int8)


def _build_array(target: Any, state: object) -> None:
    """(version, shape, dtype, whether in Fortran's order, bytes)."""
    if type(state) is not tuple or len(state) != 5 or not isinstance(state[2], np.dtype):
        raise _refusal("a plain array of numpy", state)
    _, shape, dtype, fortran, data = state
    if type(data) is not bytes or type(fortran) is not bool:
        raise _refusal("the bytes of a plain array", state)
    _check_shape(shape, dtype, data)
    try:
        target.__setstate__((1, shape, dtype, fortran, data))
    except (ValueError, TypeError, MemoryError):
        raise CheckpointCorruptError(f"expected an array, got shape {shape!r:.80}") from None


def _check_shape(shape: object, dtype: np.dtype[Any], data: bytes) -> None:
    sizes = shape if type(shape) is tuple and len(shape) <= MAX_ARRAY_DIMS else None
    if sizes is None or any(type(n) is not int or not 0 <= n < 1 << 48 for n in sizes):
        raise CheckpointCorruptError(f"expected the shape of an array, got {brief(shape)}")
    if math.prod(sizes) * dtype.itemsize != len(data):
        raise CheckpointCorruptError(
            f"expected {math.prod(sizes) * dtype.itemsize} bytes of an array, got {len(data)}"
        )


def _scalar(machine: PickleMachine, args: _Args) -> Any:
    if len(args) != 2 or not isinstance(args[0], np.dtype) or type(args[1]) is not bytes:
        raise _refusal("a plain number of numpy", args)
    machine.charge(len(args[1]))
    _check_shape((), args[0], args[1])
    if not args[0].itemsize:
        return np.empty((), args[0])[()]
    return np.frombuffer(args[1], args[0])[0]


_ARRAY_COST = 32
"""An empty array takes 112 bytes."""
_NDARRAY = Callee("numpy.ndarray")


# ---- the standard library


def _moment(kind: type[Any], nbytes: int) -> Callable[[PickleMachine, _Args], Any]:
    """date, time and datetime: packed bytes, and a timezone."""

    def call(_: PickleMachine, args: _Args) -> Any:
        zone = args[1] if len(args) == 2 else None
        packed = args[0] if 1 <= len(args) <= 2 else None
        if type(packed) is not bytes or len(packed) != nbytes:
            raise _refusal(f"a {kind.__name__} of {nbytes} bytes", args)
        if zone is not None and (kind is datetime.date or type(zone) is not datetime.timezone):
            raise _refusal(f"a {kind.__name__} with a fixed offset from UTC", args)
        try:
            return kind(packed) if zone is None else kind(packed, zone)
        except (TypeError, ValueError):
            raise CheckpointCorruptError(f"expected a {kind.__name__}, got {packed!r}") from None

    return call


def _of_ints(kind: type[Any], count: int) -> Callable[[PickleMachine, _Args], Any]:
    def call(_: PickleMachine, args: _Args) -> Any:
        if len(args) != count or any(
            type(arg) is not int or arg.bit_length() > 8 * MAX_DIGITS for arg in args
        ):
            raise _refusal(f"{kind.__name__} of {count} ints", args)
        return _make(kind, args)

    return call


def _of_text(kind: type[Any]) -> Callable[[PickleMachine, _Args], Any]:
    def call(_: PickleMachine, args: _Args) -> Any:
        if len(args) != 1 or type(args[0]) is not str or len(args[0]) > MAX_DIGITS:
            raise _refusal(f"{kind.__name__} of at most {MAX_DIGITS} characters", args)
        return _make(kind, args)

    return call


def _make(kind: type[Any], args: _Args) -> Any:
    try:
        return kind(*args)
    except (ValueError, ArithmeticError, TypeError):
        raise CheckpointCorruptError(f"expected a {kind.__name__}, got {brief(args[0])}") from None


def _fraction(machine: PickleMachine, args: _Args) -> Any:
    make = _of_text if len(args) == 1 else lambda kind: _of_ints(kind, 2)
    text = args[0] if len(args) == 1 else ""
    if "e" in str(text)[:MAX_DIGITS].lower():
        raise _refusal("a fraction of digits", args)  # an exponent asks for any number of them
    return make(fractions.Fraction)(machine, args)


def _timezone(_: PickleMachine, args: _Args) -> datetime.timezone:
    well_formed = len(args) == 1 or (len(args) == 2 and type(args[1]) is str)
    if not well_formed or type(args[0]) is not datetime.timedelta:
        raise _refusal("a timezone of an offset", args)
    zone: datetime.timezone = _make(datetime.timezone, args)
    return zone


def _path(name: str) -> Callable[[PickleMachine, _Args], Any]:
    kind = getattr(pathlib, name)

    def call(machine: PickleMachine, args: _Args) -> Any:
        if any(type(part) is not str for part in args):
            raise _refusal(f"pathlib.{name} of strings", args)
        machine.charge(sum(map(len, args)) + len(args))
        try:
            return kind(*args)
        except NotImplementedError:  # the other system's own paths
            raise _refusal(f"paths of this system (not pathlib.{name})", args) from None

    return call


def _counter(machine: PickleMachine, args: _Args) -> Counter[Any]:
    if len(args) > 1 or (args and type(args[0]) is not dict):
        raise _refusal("collections.Counter of a dict", args)
    machine.charge(len(args[0]) if args else 1)
    counter: Counter[Any] = Counter()
    dict.update(counter, args[0] if args else {})
    return counter


def _deque(machine: PickleMachine, args: _Args) -> deque[Any]:
    items, length = (*args, None, None)[:2] if len(args) <= 2 else (None, "")
    if items is not None and items != ():
        raise _refusal("collections.deque without items", args)
    if length is not None and (type(length) is not int or not 0 <= length < 1 << 62):
        raise _refusal("collections.deque of a length", args)
    machine.charge(_DEQUE_COST)
    return deque(maxlen=length)


_DEQUE_COST = 64
"""An empty deque takes 760 bytes."""


def _typed_array(machine: PickleMachine, args: _Args) -> array.array[Any]:
    """`array.array(code, list)`: how protocol 2 writes it."""
    if len(args) != 2 or type(args[0]) is not str or type(args[1]) is not list:
        raise _refusal("array.array of a list", args)
    if args[0] not in tuple("bBhHiIlLqQfd"):
        raise _refusal("array.array of numbers", args)
    machine.charge(8 * len(args[1]))
    try:
        return array.array(args[0], args[1])
    except (TypeError, OverflowError):
        raise CheckpointCorruptError("expected numbers of an array.array, got others") from None


def _layout(_: PickleMachine, args: _Args) -> Any:
    found = _LAYOUTS.get(args[0]) if len(args) == 1 and type(args[0]) is str else None
    if found is None:
        raise _refusal("a layout of torch", args)
    return found


_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}


# ---- after the object: BUILD


def _build_bytes_io(target: Any, state: object) -> None:
    if type(state) is not tuple or len(state) != 3 or type(state[0]) is not bytes or state[2]:
        raise _refusal("the bytes and position of an io.BytesIO", state)
    _check_position(state[1])
    target.__setstate__((state[0], state[1], None))


def _build_string_io(target: Any, state: object) -> None:
    if type(state) is not tuple or len(state) != 4 or type(state[0]) is not str or state[3]:
        raise _refusal("the text and position of an io.StringIO", state)
    if state[1] not in (None, "", "\n", "\r", "\r\n"):
        raise _refusal("a line end", state[1])
    _check_position(state[2])
    target.__setstate__((*state[:3], None))


def _check_position(position: object) -> None:
    if type(position) is not int or not 0 <= position < 1 << 62:
        raise CheckpointCorruptError(f"expected a position in a stream, got {brief(position)}")


def _build_uuid(target: Any, state: object) -> None:
    number = state.get("int") if type(state) is dict else None
    if type(number) is not int or not 0 <= number < 1 << 128:
        raise _refusal("a UUID of 128 bits", state)
    object.__setattr__(target, "int", number)
    object.__setattr__(target, "is_safe", uuid.SafeUUID.unknown)


def _build_attributes(target: Any, state: object) -> None:
    if type(state) is not dict or any(type(name) is not str for name in state):
        raise _refusal("attributes by name", state)
    target.__dict__.update(state)


BUILD: dict[type, Callable[[Any, object], None]] = {
    **{type(np.dtype(code)): _build_dtype for code in "?bhilqBHILQefdgFDGSUMm"},
    np.ndarray: _build_array,
    io.BytesIO: _build_bytes_io,
    io.StringIO: _build_string_io,
    uuid.UUID: _build_uuid,
    types.SimpleNamespace: _build_attributes,
    OrderedDict: _build_attributes,
}
KEYS: frozenset[type] = frozenset(
    {
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
        *(decimal.Decimal, fractions.Fraction, uuid.UUID, complex, range),
        *(pathlib.PurePosixPath, pathlib.PosixPath, pathlib.PureWindowsPath),
        *(np.bool_, np.str_, np.bytes_, np.float16, np.float32, np.float64),
        *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
        *(torch.dtype, torch.device, torch.layout, torch.Size),
    }
)
"""Values that may be dict keys: their hashes take no longer than their own length."""


def _simple_namespace(_: PickleMachine, args: _Args) -> types.SimpleNamespace:
    if args:
        raise _refusal("types.SimpleNamespace without arguments", args)
    return types.SimpleNamespace()


def inert_globals() -> Iterator[tuple[tuple[str, str], object]]:
    """Each (module, name) and its meaning."""
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        yield (module, "_reconstruct"), Callee("numpy's _reconstruct", _reconstruct)
        yield (module, "scalar"), Callee("numpy's scalar", _scalar)
    yield ("numpy", "ndarray"), _NDARRAY
    yield ("numpy", "dtype"), Callee("numpy.dtype", _dtype)
    for kind, nbytes in ((datetime.date, 4), (datetime.time, 6), (datetime.datetime, 10)):
        yield ("datetime", kind.__name__), Callee(kind.__name__, _moment(kind, nbytes))
    timedelta = Callee("datetime.timedelta", _of_ints(datetime.timedelta, 3))
    yield ("datetime", "timedelta"), timedelta
    yield ("datetime", "timezone"), Callee("datetime.timezone", _timezone)
    yield ("decimal", "Decimal"), Callee("decimal.Decimal", _of_text(decimal.Decimal))
    yield ("fractions", "Fraction"), Callee("fractions.Fraction", _fraction)
    for name in _PATHS:
        for module in ("pathlib", "pathlib._local"):
            yield (module, name), Callee(f"pathlib.{name}", _path(name))
    for stream in (io.BytesIO, io.StringIO):
        for module in ("_io", "io"):
            yield (module, stream.__name__), Callee(f"io.{stream.__name__}", new=stream)
    yield ("uuid", "UUID"), Callee("uuid.UUID", new=lambda: object.__new__(uuid.UUID))
    yield ("types", "SimpleNamespace"), Callee("types.SimpleNamespace", _simple_namespace)
    yield ("collections", "Counter"), Callee("collections.Counter", _counter)
    yield ("collections", "deque"), Callee("collections.deque", _deque)
    yield ("array", "array"), Callee("array.array", _typed_array)
    yield ("torch.serialization", "_get_layout"), Callee("torch's layout", _layout)
    for module in ("builtins", "__builtin__"):
        yield (module, "Ellipsis"), ...
        yield (module, "NotImplemented"), NotImplemented
    for name, value in vars(torch).items():
        if isinstance(value, torch.qscheme | torch.memory_format):
            yield ("torch", name), value


_PATHS = (
    *("PurePath", "PurePosixPath", "PureWindowsPath"),
    *("Path", "PosixPath", "WindowsPath"),
)
