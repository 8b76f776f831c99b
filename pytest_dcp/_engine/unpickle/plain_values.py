"""Plain values: the globals that their pickles name, and the check of a value as a whole.

Enters: the unchecked arguments of a call that a pickle asks for. Leaves: plain Python values,
torch's sizes, dtypes and devices.

Rule: only functions here make calls, after checking the arguments' types and charging for their
length.
"""

from __future__ import annotations

import builtins
import codecs
import io
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from pytest_dcp._engine.unpickle.interpreter import run
from pytest_dcp._engine.unpickle.machine import (
    Callee,
    EncodedText,
    PickleMachine,
    UnknownGlobalError,
    Vocabulary,
    brief,
    make_set,
)
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

MAX_DEPTH = 256
"""How deep containers may be nested. Python compares and prints nested values by recursion, and
gives up at 1,000 calls."""
MAX_LOGICAL_ITEMS = 10_000_000
"""Items of a value, counting shared ones each time: as many as printing or comparing it would
visit.
"""
MAX_DIMS = 64
"""Dimensions of a tensor: torch allows no more (c10, at::dim_bitset_size)."""
_INT64_BOUND = 1 << 63
_PIECE_BYTES = 1 << 16
_FACTORIES: tuple[type, ...] = (
    *(list, dict, set, frozenset, tuple),
    *(int, float, complex, bool, str, bytes, bytearray),
)
_ATOMS = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, bytearray, range, slice),
        *(torch.Size, torch.dtype, torch.layout, torch.device),
    }
)
_INT = frozenset({int})
_SETS = frozenset({set, frozenset})
_SEQUENCES = frozenset({list, tuple, deque})
_DICTS = frozenset({dict, OrderedDict, defaultdict, Counter})
_FREE_ITEMS = 8
_UNSEEN = (-1, 0)
_OPEN = (-2, 0)


def size_of(machine: PickleMachine, args: tuple[Any, ...]) -> torch.Size:
    """torch.Size of a tuple of at most 64 ints of 64 bits; the caller must refuse negative ones."""
    dims = args[0] if len(args) == 1 else None
    if type(dims) is not tuple or len(dims) > MAX_DIMS:
        raise CheckpointCorruptError(
            f"expected torch.Size of one tuple of at most {MAX_DIMS} ints, got {brief_all(args)}"
        )
    machine.charge(len(dims))
    if not _INT.issuperset(map(type, dims)):
        raise CheckpointCorruptError("expected torch.Size of ints, got other items")
    if dims and not (min(dims) >= -_INT64_BOUND and max(dims) < _INT64_BOUND):
        # torch.Size would accept them, and fail when it is printed or multiplied.
        raise CheckpointCorruptError("expected torch.Size of 64-bit ints, got longer ones")
    return torch.Size(dims)


def brief_all(args: tuple[Any, ...]) -> str:
    """A short text for a call's arguments."""
    if len(args) == 1 and isinstance(args[0], tuple):
        return f"a tuple of {len(args[0])}"
    more = "..." if len(args) > 4 else ""
    return f"({', '.join(brief(arg) for arg in args[:4])}{more})"


def ordered_dict(_: PickleMachine, args: tuple[Any, ...]) -> OrderedDict[Any, Any]:
    """An empty OrderedDict: its items follow."""
    if args:
        raise _unknown("collections.OrderedDict without arguments", args)
    return OrderedDict()


def _unknown(expected: str, args: tuple[Any, ...]) -> UnknownGlobalError:
    return UnknownGlobalError(f"expected {expected}, got {brief_all(args)}")


def _set_maker(kind: type[Any]) -> Callable[[PickleMachine, tuple[Any, ...]], Any]:
    def call(machine: PickleMachine, args: tuple[Any, ...]) -> Any:
        items = args[0] if len(args) == 1 else []
        if len(args) > 1 or type(items) is not list:
            raise _unknown(f"{kind.__name__} of one list", args)
        return make_set(machine, kind, items)

    return call


def _default_dict(_: PickleMachine, args: tuple[Any, ...]) -> defaultdict[Any, Any]:
    factory = args[0] if len(args) == 1 else None
    if len(args) <= 1 and factory is None:
        return defaultdict(None)
    if len(args) > 1 or type(factory) is not Callee or factory not in _FACTORY_OF:
        raise _unknown("defaultdict with a plain class as its factory", args)
    return defaultdict(_FACTORY_OF[factory])


def _encode(machine: PickleMachine, args: tuple[Any, ...]) -> bytes:
    """How protocol 2 writes bytes: `_codecs.encode(text, 'latin1')`."""
    text = args[0] if len(args) == 2 and args[1] == "latin1" else None
    try:
        if type(text) is EncodedText:
            machine.charge(len(text.utf8))
            return _latin1_of(text.utf8)
        if type(text) is str:
            machine.charge(len(text))
            return text.encode("latin1")
    except UnicodeEncodeError:
        raise CheckpointCorruptError("expected bytes as latin1 text, got other text") from None
    except UnicodeDecodeError as error:
        raise CheckpointCorruptError(f"expected a string in UTF-8, got {error.reason}") from None
    raise _unknown("_codecs.encode of a str as latin1", args)


def _latin1_of(utf8: memoryview) -> bytes:
    """The text in latin1, encoded in pieces: decoding the whole text would make another copy."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogatepass")
    out = io.BytesIO()
    for start in range(0, len(utf8), _PIECE_BYTES):
        piece = bytes(utf8[start : start + _PIECE_BYTES])
        last = start + _PIECE_BYTES >= len(utf8)
        out.write(decoder.decode(piece, last).encode("latin1"))
    # It hands out its own memory.
    return out.getvalue()


def _bytes_maker(kind: type[Any]) -> Callable[[PickleMachine, tuple[Any, ...]], Any]:
    def call(machine: PickleMachine, args: tuple[Any, ...]) -> Any:
        raw = args[0] if len(args) == 1 else b""
        if type(raw) is int:
            # A length: a few bytes could ask for any amount of memory, also in torch.load.
            raise UntrustedPickleError(f"expected {kind.__name__} of bytes, got it of a length")
        if len(args) > 1 or type(raw) is not bytes:
            raise _unknown(f"{kind.__name__} of bytes", args)
        machine.charge(len(raw))
        return kind(raw)

    return call


def _copier(kind: type[Any], sources: frozenset[type[Any]]) -> Callable[..., Any]:
    def call(machine: PickleMachine, args: tuple[Any, ...]) -> Any:
        if len(args) > 1 or (args and type(args[0]) not in sources):
            raise _unknown(f"{kind.__name__} of nothing or of a container", args)
        machine.charge(len(args[0]) if args else 1)
        return kind(*args)

    return call


def _complex(_: PickleMachine, args: tuple[Any, ...]) -> complex:
    if len(args) != 2 or type(args[0]) is not float or type(args[1]) is not float:
        raise _unknown("complex of two floats", args)
    return complex(args[0], args[1])


def _range(_: PickleMachine, args: tuple[Any, ...]) -> range:
    if not 1 <= len(args) <= 3 or any(type(arg) is not int for arg in args):
        raise _unknown("range of one to three ints", args)
    if any(abs(arg) >= _INT64_BOUND for arg in args):
        raise _unknown("range of 64-bit ints", args)
    if len(args) == 3 and args[2] == 0:
        raise CheckpointCorruptError("expected range with a step, got one of step 0")
    return range(*args)


def _slice(_: PickleMachine, args: tuple[Any, ...]) -> slice:
    if len(args) != 3 or any(arg is not None and type(arg) is not int for arg in args):
        raise _unknown("slice of three ints or None", args)
    return slice(*args)


def _device(_: PickleMachine, args: tuple[Any, ...]) -> torch.device:
    kind = args[0] if args else None
    index = args[1] if len(args) == 2 else 0
    if len(args) not in (1, 2) or type(kind) is not str or type(index) is not int:
        raise _unknown("torch.device of a name and an index", args)
    if len(kind) > 64 or not kind.isascii() or not 0 <= index < 128:
        raise CheckpointCorruptError(f"expected a device's name and index, got {brief_all(args)}")
    try:
        return torch.device(*args)
    except RuntimeError:
        raise CheckpointCorruptError(f"expected a device of torch, got {brief_all(args)}") from None


def _globals() -> Iterator[tuple[tuple[str, str], object]]:
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            yield ("torch", name), value
    yield ("torch", "Size"), Callee("torch.Size", size_of)
    yield ("torch", "device"), Callee("torch.device", _device)
    yield ("collections", "OrderedDict"), Callee("collections.OrderedDict", ordered_dict)
    yield ("collections", "defaultdict"), Callee("collections.defaultdict", _default_dict)
    yield ("_codecs", "encode"), Callee("_codecs.encode", _encode, takes_encoded_text=True)
    for name, callee in _BUILTINS.items():
        yield ("builtins", name), callee
        yield ("__builtin__", _PYTHON_2_NAMES.get(name, name)), callee


_CALLS: dict[str, Callable[[PickleMachine, tuple[Any, ...]], object]] = {
    "set": _set_maker(set),
    "frozenset": _set_maker(frozenset),
    "bytes": _bytes_maker(bytes),
    "bytearray": _bytes_maker(bytearray),
    "complex": _complex,
    "list": _copier(list, frozenset({list, tuple})),
    "dict": _copier(dict, frozenset({dict})),
    "range": _range,
    "slice": _slice,
}
_BUILTINS = {
    name: Callee(name, _CALLS.get(name)) for name in {*_CALLS, *(k.__name__ for k in _FACTORIES)}
}
_PYTHON_2_NAMES = {"range": "xrange", "int": "long", "str": "unicode"}
"""Their names in pickles of protocol 2: Lib/_compat_pickle.py."""
_FACTORY_OF: dict[Callee, type] = {
    callee: vars(builtins)[name]
    for name, callee in _BUILTINS.items()
    if name in {kind.__name__ for kind in _FACTORIES}
}
PLAIN = Vocabulary(globals=dict(_globals()), build={})


def read_value(data: bytes | memoryview) -> object:
    """The plain value a pickle describes: numbers, text, bytes, containers, torch's sizes and
    dtypes.

    Raises:
        UnknownGlobalError: it holds something else, for example tensors. CheckpointCorruptError:
        the pickle is malformed or made to exhaust its reader.
    """
    value: object = run(data, PLAIN)
    check_plain(value, "the value")
    return value


def check_plain(
    root: object,
    what: str,
    others: frozenset[type] = frozenset(),
    at_most: int = MAX_LOGICAL_ITEMS,
    records: frozenset[type] = frozenset(),
) -> None:
    """Check that every part of `root` is a plain value and that walking it is harmless. Pure (no
    I/O).

    Visits each container once, without recursion, even if it is referred to often. `what` names
    `root` in the errors. `others` are further classes of values, which are not walked, and
    `records` are classes whose fields are walked; `at_most` is the number of items, counting shared
    ones each time.

    Raises:
        UnknownGlobalError: a class by itself, or an object that is not a plain value.
        UntrustedPickleError: a container that holds itself; nesting beyond `MAX_DEPTH`; sharing
        that
            makes more than `MAX_LOGICAL_ITEMS` items.
    """
    container_sizes: dict[int, tuple[int, int]] = {}
    """By id of a container: depth and number of its items, or _OPEN while it is being walked."""
    limits = _Limits(_ATOMS | others, at_most, records)
    path = [_Visit((root,), 0, limits)]
    while True:
        visit = path[-1]
        child = visit.advance(container_sizes, what)
        if child is not None:
            if len(path) > MAX_DEPTH:
                raise UntrustedPickleError(
                    f"expected at most {MAX_DEPTH} containers within each other in {what}, got more"
                )
            container_sizes[id(child)] = _OPEN
            path.append(_Visit(_children(child, records), id(child), limits))
            continue
        path.pop()
        if not path:
            return
        container_sizes[visit.key] = (visit.depth + 1, visit.items)
        path[-1].add(container_sizes[visit.key], what)


class _Limits(NamedTuple):
    atoms: frozenset[type]
    at_most: int
    records: frozenset[type]


class _Visit:
    """A container on the path from the root to the current position of the walk."""

    __slots__ = ("depth", "items", "key", "limits", "rest")

    def __init__(self, children: Iterable[object], key: int, limits: _Limits) -> None:
        self.limits = limits
        self.rest: Iterator[Any] = iter(children)
        self.key = key
        self.depth = 0
        self.items = 0

    def add(self, part: tuple[int, int], what: str) -> None:
        self.depth = max(self.depth, part[0])
        self.items += part[1]
        if self.items > self.limits.at_most:
            raise UntrustedPickleError(
                f"expected at most {self.limits.at_most} items in {what} when shared ones count "
                "each time, got more: do not load this file"
            )
        if self.depth > MAX_DEPTH:
            raise UntrustedPickleError(
                f"expected at most {MAX_DEPTH} containers within each other in {what}, got more"
            )

    def advance(self, container_sizes: dict[int, tuple[int, int]], what: str) -> Any:
        """The next child to walk into, or None at the end; counts the children in between."""
        atoms = self.limits.atoms
        for child in self.rest:
            self.items += 1
            kind = type(child)
            if kind in atoms or (kind in _CONTAINERS and not child):
                continue
            if kind is tuple and _is_short_and_flat(child):
                self.items += len(child)
                continue
            if kind not in _CONTAINERS and kind not in self.limits.records:
                raise UnknownGlobalError(f"expected plain values in {what}, got {brief(child)}")
            part = container_sizes.get(id(child), _UNSEEN)
            if part is _UNSEEN:
                return child
            if part is _OPEN:
                raise UntrustedPickleError(
                    f"expected no cycles in {what}, got a {kind.__name__} within itself"
                )
            self.add(part, what)
        return None


def _is_short_and_flat(value: Any) -> bool:
    return len(value) <= _FREE_ITEMS and all(type(item) in _ATOMS for item in value)


def _children(container: Any, records: frozenset[type]) -> Iterable[Any]:
    """Keys and members are plain already, since `PickleMachine.check_keys` accepts nothing else."""
    children: Iterable[Any] = container
    if type(container) is SimpleNamespace or type(container) in records:
        children = vars(container).values()
    elif type(container) in _DICTS:
        children = container.values()
    return children


_CONTAINERS = _SETS | _SEQUENCES | _DICTS | {SimpleNamespace}
