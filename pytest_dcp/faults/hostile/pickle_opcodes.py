"""Pickles written opcode by opcode, including ones that no pickler emits. Pure (no I/O).

Enters: expressions, which name globals and call them. Leaves: opcodes that put the expression's
value on an unpickler's stack. The opcodes: CPython's Lib/pickletools.py; the protocol decides how
names, numbers and tuples are written, as it does in a pickler. An unpickler takes any opcode under
any protocol.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from dataclasses import dataclass
from typing import Any

PROTOCOLS = (0, 1, 2, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class Global:
    """An attribute of a module."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class PickledCall:
    """The result of a call."""

    callee: Global | PickledCall
    args: tuple[Any, ...]
    """None, ints, strings, bytes, tuples, empty dicts, globals and calls."""


def assemble_pickle(code: bytes, protocol: int) -> bytes:
    """A whole pickle whose value is the one that `code` puts on the stack."""
    head = pickle.PROTO + bytes([protocol]) if protocol >= 2 else b""
    return head + code + pickle.STOP


def code_of(value: object, protocol: int) -> bytes:
    """The opcodes of an expression. Raises TypeError for anything else."""
    if isinstance(value, PickledCall):
        return code_of(value.callee, protocol) + code_of(value.args, protocol) + pickle.REDUCE
    if isinstance(value, Global):
        return global_code(value, protocol)
    if isinstance(value, tuple):
        return tuple_code(b"".join(code_of(one, protocol) for one in value), len(value), protocol)
    if isinstance(value, str):
        return text_code(value, protocol)
    if isinstance(value, bytes):
        return _bytes_code(value, protocol)
    if value is None:
        return pickle.NONE
    if value == {} and type(value) is dict:
        return pickle.EMPTY_DICT if protocol else pickle.MARK + pickle.DICT
    if type(value) is int:
        return _int_code(value, protocol)
    raise TypeError(f"expected an expression, got {value!r:.80}")


def global_code(value: Global, protocol: int) -> bytes:
    """The opcodes of a global: as lines up to protocol 3, with strings on the stack from 4 on."""
    if protocol < 4:
        return pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode()
    names = text_code(value.module, protocol) + text_code(value.name, protocol)
    return names + pickle.STACK_GLOBAL


def tuple_code(items: bytes, count: int, protocol: int) -> bytes:
    """A tuple of `count` items, given their opcodes."""
    if protocol >= 2 and 0 < count <= 3:
        return items + (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)[count - 1]
    return pickle.MARK + items + pickle.TUPLE


def text_code(text: str, protocol: int) -> bytes:
    """A string."""
    if protocol == 0:
        plain = text.replace("\\", "\\u005c").replace("\n", "\\u000a")
        return pickle.UNICODE + plain.encode("raw-unicode-escape") + b"\n"
    raw = text.encode("utf-8", "surrogatepass")
    if protocol >= 4 and len(raw) < 256:
        return pickle.SHORT_BINUNICODE + bytes([len(raw)]) + raw
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def long_code(value: int) -> bytes:
    """An int of any size."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(raw)]) + raw


def _bytes_code(value: bytes, protocol: int) -> bytes:
    if protocol < 3:  # like picklers of protocols without an opcode for bytes
        encode = Global("_codecs", "encode")
        return code_of(PickledCall(encode, (value.decode("latin1"), "latin1")), protocol)
    return pickle.BINBYTES + struct.pack("<I", len(value)) + value


def _int_code(value: int, protocol: int) -> bytes:
    if protocol == 0:
        return pickle.INT + f"{value}\n".encode()
    if 0 <= value < 256:
        return pickle.BININT1 + bytes([value])
    return long_code(value)


def operations(data: bytes) -> list[tuple[str, Any, bytes]]:
    """The pickle's opcodes, as (name, argument, bytes), without its frames, which are optional.

    The opcodes can then be reassembled in another way.
    """
    found = [(op.name, arg, at or 0) for op, arg, at in pickletools.genops(data)]
    ends = [at for _, _, at in found[1:]] + [found[-1][2] + 1]
    return [
        (name, arg, data[at:end])
        for (name, arg, at), end in zip(found, ends, strict=True)
        if name != "FRAME"
    ]


def split(data: bytes, text: str) -> tuple[bytes, bytes, int]:
    """The pickle before and after this string, and the number of memo entries before it.

    Raises LookupError if the string is not in it.
    """
    parts = operations(data)
    for at, (_, arg, raw) in enumerate(parts):
        if arg == text and raw[:1] in _TEXTS:
            memoized = sum(name in _MEMOIZING for name, _, _ in parts[:at])
            pieces = [raw for _, _, raw in parts]
            return b"".join(pieces[:at]), b"".join(pieces[at + 1 :]), memoized
    raise LookupError(f"expected the string {text!r} in the pickle")


_TEXTS = (pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE)
_MEMOIZING = ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT")
