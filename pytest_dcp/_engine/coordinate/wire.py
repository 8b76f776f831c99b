"""A value <-> the segments of bytes that carry it between ranks, as plain data. Pure (no I/O).

Nothing here can run the sender's code. A value becomes a head and segments:

    head      JSON. Numbers, strings, booleans and null are themselves; everything else is an array
              whose first item is a tag, the name of its kind: ["t", [1, 2]] is a tuple
    segments  the memory of arrays and bytes, uncopied, in the order in which the head names them

so that a plan of 10,000 tensors is a few columns and one short head. Example: `(1, b"xy")` is the
head `["t",[1,["b"]]]` and the segment `xy`.

These values can be sent: Python's plain values and containers, numpy arrays and scalars of numbers,
torch's dtypes, layouts and sizes, paths, and objects of classes that were registered by `record`
(their fields, by name; `__init__` is not called) or by `convert`. Anything else raises a TypeError
on the sender that names it. If the class of the sender's planner or storage is the user's own (see
`verbs.wire_classes`), such objects are sent as pickles; a receiver opens these only if its own
planner or storage is the user's, too.

Reading is bounded: each segment is used once, and a text is refused before it is parsed if the
objects that it describes would take more than FREE_BYTES and BYTES_PER_STORED_BYTE for each of its
bytes (as for descriptions of checkpoints, see `format.memory_limit`).
"""

from __future__ import annotations

import collections
import json
import math
import pathlib
import pickle
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import numpy as np
import torch

from pytest_dcp._engine.coordinate.payload import Payload, Segment
from pytest_dcp._engine.coordinate.sent_classes import (
    CONVERSIONS,
    KINDS_BY_NAME,
    MAKERS,
    SENT_KINDS,
    SHOWN,
)
from pytest_dcp._engine.format.memory_limit import (
    BYTES_PER_STORED_BYTE,
    FREE_BYTES,
    estimate_json_bytes,
)

Node = Any
"""A part of the head: a scalar of JSON, or a list of a tag and its arguments."""

NUMBERS = frozenset("biufc")
"""Kinds of numpy dtypes whose bytes are values, and nothing else."""
SCALARS = frozenset((str, int, float, bool, type(None)))
_TEXT = frozenset((str,))
_PATH_PARTS = frozenset((str, int))
_COLUMN = np.dtype("<u4")
PLAIN_BASES: tuple[type[Any], ...] = (str, int, float, bytes)
"""Objects of subclasses of these, such as a StrEnum's, are sent as the equal base value."""
KEY_BITS = 63
"""Limit of an int in a key: an attacker could choose longer ones with one hash, which makes dicts
quadratic."""
MANY = 16
"""A dict of tuples with this many entries or more is sent as columns."""


def pack(value: object, *, pickles: bool = False) -> list[Segment]:
    """The head of a value and its segments; they alias the value's memory until they are sent.

    pickles: whether objects of unknown classes may be sent as pickles.

    Raises TypeError, naming the first object that cannot be sent.
    """
    encoder = _Encoder(pickles)
    try:
        node = encoder.node(value)
        text = json.dumps(node, ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise TypeError(
            f"a {type(value).__name__} is nested too deeply to be sent to another rank"
        ) from None
    return [text.encode("utf-8", "surrogatepass"), *encoder.segments]


def unpack(payload: Payload, *, pickles: bool = False) -> Any:
    """The value of `pack`; its arrays lie in the segments.

    pickles: whether to open pickles: they can run any code.

    Raises ValueError for anything that `pack` does not make, and for pickles unless allowed.
    """
    if not payload:
        raise ValueError("expected a value, got no bytes")
    decoder = _Decoder(payload[1:], pickles)
    try:
        value = decoder.value(_parse(bytes(payload[0])))
    except (TypeError, LookupError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"expected a value of another rank, got {error!r:.200}") from None
    decoder.check_end()
    return value


def _parse(text: bytes) -> Any:
    needed, limit = estimate_json_bytes(text), FREE_BYTES + BYTES_PER_STORED_BYTE * len(text)
    if needed > limit:
        raise ValueError(
            f"expected a value that takes at most {limit} bytes of memory, since its text has "
            f"{len(text)}, got one that takes {needed}"
        )
    try:
        return json.loads(text.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        raise ValueError(f"expected a value of another rank, got {text[:20]!r} ...") from None


# ---- writing


class _Encoder:
    def __init__(self, pickles: bool) -> None:
        self.segments: list[Segment] = []
        self._pickles = pickles

    def node(self, value: Any) -> Node:
        kind = type(value)
        if kind in SCALARS:
            return value
        write = _WRITERS.get(kind)
        if write is not None:
            return write(self, value)
        if kind in SENT_KINDS:
            name, sent_class = SENT_KINDS[kind]
            return ["o", name, self.nodes(sent_class.parts(value))]
        if kind in CONVERSIONS:
            name, to = CONVERSIONS[kind]
            return ["v", name, self.node(to(value))] if name else self.node(to(value))
        if isinstance(value, np.generic) and value.dtype.kind in NUMBERS:
            self.segments.append(value.tobytes())
            return ["n", value.dtype.str]
        return self._other(value)

    def nodes(self, values: Any) -> list[Node]:
        """The nodes of some values."""
        if SCALARS.issuperset(map(type, values)):
            return list(values)
        return [self.node(value) for value in values]

    def mapping(self, value: dict[Any, Any]) -> Node:
        columns = _columns_of(value) if len(value) >= MANY else None
        if columns is not None:
            self.segments.extend(columns)
            return ["r"]
        return ["d", self.nodes(value), self.nodes(value.values())]

    def array(self, value: np.ndarray[Any, Any]) -> Node:
        if value.dtype.kind not in NUMBERS:
            return self._other(value)
        order = "C"
        if not value.flags.c_contiguous:
            order = "F" if value.flags.f_contiguous else "C"
            value = value.T if order == "F" else np.ascontiguousarray(value)
        shape = list(value.shape)
        self.segments.append(value.reshape(-1).view(np.uint8).data if value.size else b"")
        return ["a", value.dtype.str, shape, order]

    def block(self, tag: str, value: Segment) -> Node:
        self.segments.append(value)
        return [tag]

    def _other(self, value: Any) -> Node:
        if not self._pickles:
            for base in PLAIN_BASES:
                if isinstance(value, base):
                    return self.node(base(value))
            what = repr(value)[:SHOWN] if isinstance(value, type) else f"a {_name_of(type(value))}"
            raise TypeError(
                f"{what} cannot be sent to another rank: ranks send each other plain data, "
                "and pickles only for planners and storages of a class of your own, which may say "
                "so with pickles_between_ranks = True"
            )
        buffers: list[pickle.PickleBuffer] = []
        self.segments.append(pickle.dumps(value, protocol=5, buffer_callback=buffers.append))
        self.segments.extend(buffer.raw() for buffer in buffers)
        return ["p", len(buffers)]


def _columns_of(value: dict[Any, Any]) -> list[Segment] | None:
    """A dict of names to tuples of names and positions, as a planner's paths are.

    It becomes four columns, written and read without a loop over the names: the keys, a line each;
    the parts of all tuples, a line each; the tuples' lengths; which parts are ints. None for other
    dicts.
    """
    rows = list(value.values())
    if set(map(type, rows)) != {tuple} or not _TEXT.issuperset(map(type, value)):
        return None
    parts = list(chain.from_iterable(rows))
    kinds = set(map(type, parts))
    ints: list[int] = []
    if not kinds <= _TEXT:
        if not kinds <= _PATH_PARTS:
            return None
        ints = [at for at, part in enumerate(parts) if type(part) is int]
        parts = list(map(str, parts))
    keys = "\n".join(value)
    text = "\n".join(parts)
    if keys.count("\n") != len(value) - 1 or text.count("\n") != max(0, len(parts) - 1):
        return None
    numbers = [np.array(some, _COLUMN).tobytes() for some in (list(map(len, rows)), ints)]
    return [*(some.encode("utf-8", "surrogatepass") for some in (keys, text)), *numbers]


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")


_Writer = Callable[[_Encoder, Any], Node]


def _sequence(tag: str) -> _Writer:
    return lambda encoder, value: [tag, encoder.nodes(value)]


def _bytes(tag: str) -> _Writer:
    return lambda encoder, value: encoder.block(tag, value)


_WRITERS: dict[type, _Writer] = {
    list: _sequence("l"),
    tuple: _sequence("t"),
    set: _sequence("s"),
    frozenset: _sequence("f"),
    torch.Size: _sequence("S"),
    collections.OrderedDict: lambda encoder, value: ["O", encoder.mapping(value)],
    dict: _Encoder.mapping,
    bytes: _bytes("b"),
    bytearray: _bytes("B"),
    np.ndarray: _Encoder.array,
    complex: lambda _, value: ["c", value.real, value.imag],
    torch.dtype: lambda _, value: ["y", str(value)],
    torch.layout: lambda _, value: ["y", str(value)],
    torch.memory_format: lambda _, value: ["y", str(value)],
    pathlib.PosixPath: lambda _, value: ["P", str(value)],
    pathlib.PurePosixPath: lambda _, value: ["Q", str(value)],
}


# ---- reading


class _Decoder:
    def __init__(self, segments: Payload, pickles: bool) -> None:
        self._segments: Iterator[Segment] = iter(segments)
        self._pickles = pickles

    def value(self, node: Node) -> Any:
        if type(node) is not list:
            if type(node) in SCALARS:
                return node
            raise ValueError(f"expected a value, got {node!r:.{SHOWN}}")
        tag, *rest = node
        return _READERS[tag](self, *rest)

    def values(self, nodes: Any) -> list[Any]:
        if type(nodes) is not list:
            raise ValueError(f"expected a list, got {nodes!r:.{SHOWN}}")
        if SCALARS.issuperset(map(type, nodes)):
            return nodes
        return [self.value(node) for node in nodes]

    def segment(self) -> Segment:
        """The next segment: each is used once, so that a head cannot name one many times."""
        for segment in self._segments:
            return segment
        raise ValueError("expected a segment for each value that has one, got fewer")

    def check_end(self) -> None:
        """Raise if segments are left over."""
        for _ in self._segments:
            raise ValueError("expected a segment for each value that has one, got more")

    def mapping(self, keys: Any, values: Any) -> dict[Any, Any]:
        return dict(zip(_keys(self.values(keys)), self.values(values), strict=True))

    def columns(self) -> dict[Any, Any]:
        return dict(zip(*_rows_of(*(bytes(self.segment()) for _ in range(4))), strict=True))

    def ordered(self, node: Node) -> collections.OrderedDict[Any, Any]:
        return collections.OrderedDict(_check_kind(self.value(node), dict))

    def array(self, name: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
        dtype, segment = _dtype(name), memoryview(self.segment())
        if not all(type(n) is int and n >= 0 for n in _check_kind(shape, list)):
            raise ValueError(f"expected a shape, got {shape!r:.{SHOWN}}")
        if segment.nbytes != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"expected {shape} of {dtype}, got {segment.nbytes} bytes")
        if not segment.nbytes:
            found = np.empty(shape, dtype)
        else:
            found = np.frombuffer(segment, dtype).reshape(shape)
        return found.T if order == "F" else found

    def number(self, name: Any) -> Any:
        (found,) = np.frombuffer(self.segment(), _dtype(name))
        return found

    def record(self, name: Any, parts: Any) -> Any:
        return KINDS_BY_NAME[name].make(self.values(parts))

    def converted(self, name: Any, node: Node) -> Any:
        return MAKERS[name](self.value(node))

    def pickled(self, count: Any) -> Any:
        if not self._pickles:
            raise ValueError(
                "got a pickle, and opens none: its planner and storage are the engine's own, or "
                "say pickles_between_ranks = False"
            )
        data = self.segment()
        return pickle.loads(data, buffers=[self.segment() for _ in range(_check_kind(count, int))])


def _keys(values: list[Any]) -> list[Any]:
    """The values, after a check that none is or holds an int that is too long."""
    if not {str}.issuperset(map(type, values)):
        for value in values:
            if type(value) is int and value.bit_length() > KEY_BITS:
                raise ValueError(f"expected keys of at most {KEY_BITS} bits, got a longer int")
            if type(value) in (tuple, frozenset):
                _keys(list(value))
    return values


def _check_kind(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected a {kind.__name__}, got {value!r:.{SHOWN}}")
    return value


def _dtype(name: Any) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(_check_kind(name, str))
    if dtype.kind not in NUMBERS:
        raise ValueError(f"expected a dtype of numbers, got {dtype}")
    return dtype


@lru_cache(maxsize=4)  # Few, because the plans of large states take much memory.
def _rows_of(
    keys: bytes, text: bytes, lengths: bytes, ints: bytes
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """The keys and tuples of `_columns_of`; cached, so ranks with the same bytes share objects."""
    counts = np.frombuffer(lengths, _COLUMN)
    total = int(counts.sum())
    parts: list[Any] = text.decode("utf-8", "surrogatepass").split("\n") if total else []
    names = keys.decode("utf-8", "surrogatepass").split("\n")
    if len(parts) != total or len(names) != len(counts):
        raise ValueError(f"expected {total} parts of {len(counts)} paths, got {len(parts)}")
    for at in np.frombuffer(ints, _COLUMN).tolist():
        parts[at] = int(parts[at])
    items = iter(parts)
    return names, [tuple(islice(items, count)) for count in counts.tolist()]


_TORCH = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format)
}
_Reader = Callable[..., Any]
_READERS: dict[str, _Reader] = {
    "l": lambda decoder, nodes: decoder.values(nodes),
    "t": lambda decoder, nodes: tuple(decoder.values(nodes)),
    "s": lambda decoder, nodes: set(_keys(decoder.values(nodes))),
    "f": lambda decoder, nodes: frozenset(_keys(decoder.values(nodes))),
    "S": lambda decoder, nodes: torch.Size(decoder.values(nodes)),
    "d": _Decoder.mapping,
    "r": _Decoder.columns,
    "O": _Decoder.ordered,
    "b": lambda decoder: bytes(decoder.segment()),
    "B": lambda decoder: bytearray(decoder.segment()),
    "a": _Decoder.array,
    "n": _Decoder.number,
    "c": lambda _, real, imag: complex(real, imag),
    "y": lambda _, name: _TORCH[name],
    "P": lambda _, text: pathlib.PosixPath(_check_kind(text, str)),
    "Q": lambda _, text: pathlib.PurePosixPath(_check_kind(text, str)),
    "o": _Decoder.record,
    "v": _Decoder.converted,
    "p": _Decoder.pickled,
}
