"""The effect of each pickle opcode on a `PickleMachine`: the handlers, and their tables by opcode.

The rules are those of `unpickle.machine`. The format: CPython's Lib/pickletools.py. Opcodes of
protocols 0 and 1 that protocol 2 replaced, and opcodes that no pickler emits for data (DUP, EXT,
INST, OBJ ...), are refused. The ten that stand most often in checkpoints (MEMOIZE, BINGET,
LONG_BINGET, BININT1, MARK, TUPLE1, TUPLE2, EMPTY_TUPLE, EMPTY_DICT, STOP) are in
`interpreter._interpret` instead, for speed.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NoReturn

from pytest_dcp._engine.unpickle.machine import (
    LONG_TEXT_BYTES,
    Callee,
    EncodedText,
    PickleMachine,
    UnknownGlobalError,
    brief,
    decoded_text,
    make_set,
)
from pytest_dcp._engine.unpickle.unread_fields import UnreadObject
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

_NAME_LIMIT = 256
"""Bytes of a global's module or name."""
_EMPTY_SET_COST = 8
"""An empty set takes 232 bytes; the two bytes that picklers spend on it cover this charge."""
_FREE_FIELDS = 8
_FIELD_COST = 2
_DICTS = frozenset({dict, OrderedDict, defaultdict})


def refuse_opcode(op: int) -> NoReturn:
    raise UntrustedPickleError(
        f"expected the opcodes that picklers of protocols 2 to 5 emit for data, got {bytes([op])!r}"
    )


# ---- opcodes without a mark: (machine, stack, position behind the opcode) -> next position


def _take(data: bytes | memoryview, pos: int, length: int) -> bytes | memoryview:
    if not 0 <= length <= len(data) - pos:
        raise CheckpointCorruptError(
            f"expected an item within the {len(data) - pos} bytes left, got one of {length} bytes"
        )
    return data[pos : pos + length]


def _sized_handler(
    width: struct.Struct, make: Callable[[PickleMachine, bytes | memoryview], object]
) -> Callable[[PickleMachine, list[Any], int], int]:
    """The handler of an opcode followed by a length of that width, and as many bytes."""
    unpack, skip = width.unpack_from, width.size

    def handle(machine: PickleMachine, stack: list[Any], pos: int) -> int:
        begin = pos + skip
        raw = _take(machine.data, begin, unpack(machine.data, pos)[0])
        stack.append(make(machine, raw))
        return begin + len(raw)

    return handle


def _text_handler(
    width: struct.Struct,
) -> Callable[[PickleMachine, list[Any], int], int]:
    """Like `_sized_handler` for text; long text that will become bytes is not decoded."""
    unpack, skip = width.unpack_from, width.size

    def handle(machine: PickleMachine, stack: list[Any], pos: int) -> int:
        begin = pos + skip
        length = unpack(machine.data, pos)[0]
        if length < LONG_TEXT_BYTES or not (stack and _encodes(stack[-1])):
            raw = _take(machine.data, begin, length)
            stack.append(decoded_text(machine, raw))
        else:
            stack.append(EncodedText(memoryview(_take(memoryview(machine.data), begin, length))))
        return begin + length  # type: ignore[no-any-return]  # struct's

    return handle


def _encodes(callee: object) -> bool:
    return type(callee) is Callee and callee.takes_encoded_text


def _long(_: PickleMachine, raw: bytes | memoryview) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _scalar(layout: struct.Struct) -> Callable[[PickleMachine, list[Any], int], int]:
    unpack, skip = layout.unpack_from, layout.size

    def handle(machine: PickleMachine, stack: list[Any], pos: int) -> int:
        stack.append(unpack(machine.data, pos)[0])
        return pos + skip

    return handle


def _constant(value: object) -> Callable[[PickleMachine, list[Any], int], int]:
    def handle(_: PickleMachine, stack: list[Any], pos: int) -> int:
        stack.append(value)
        return pos

    return handle


def _empty_list(_: PickleMachine, stack: list[Any], pos: int) -> int:
    stack.append([])
    return pos


def _empty_set(machine: PickleMachine, stack: list[Any], pos: int) -> int:
    machine.charge(_EMPTY_SET_COST)
    stack.append(set())
    return pos


def _tuple3(_: PickleMachine, stack: list[Any], pos: int) -> int:
    last, middle = stack.pop(), stack.pop()
    stack[-1] = (stack[-1], middle, last)
    return pos


def _put(layout: struct.Struct) -> Callable[[PickleMachine, list[Any], int], int]:
    unpack, skip = layout.unpack_from, layout.size

    def handle(machine: PickleMachine, stack: list[Any], pos: int) -> int:
        index, memo = unpack(machine.data, pos)[0], machine.memo
        if index == len(memo):
            memo.append(stack[-1])
        elif index < len(memo):
            memo[index] = stack[-1]
            # Cached facts about the memo may no longer hold.
            machine.patterns, machine.to_learn = {}, 0
        else:
            raise UntrustedPickleError(
                f"expected a memo without gaps, got entry {index} after {len(memo)} of them"
            )
        return pos + skip

    return handle


def _append(_: PickleMachine, stack: list[Any], pos: int) -> int:
    _appends(_, stack, [stack.pop()])
    return pos


def _setitem(machine: PickleMachine, stack: list[Any], pos: int) -> int:
    value, key = stack.pop(), stack.pop()
    _setitems(machine, stack, [key, value])
    return pos


def _proto(machine: PickleMachine, _: list[Any], pos: int) -> int:
    if machine.data[pos] > pickle.HIGHEST_PROTOCOL:
        raise UntrustedPickleError(
            f"expected a pickle of protocol 2 to {pickle.HIGHEST_PROTOCOL}, got protocol "
            f"{machine.data[pos]}: read it with a newer Python"
        )
    return pos + 1


def _frame(machine: PickleMachine, _: list[Any], pos: int) -> int:
    length = _UINT64.unpack_from(machine.data, pos)[0]
    remaining_bytes = len(machine.data) - pos - _UINT64.size
    if length > remaining_bytes:
        raise CheckpointCorruptError(
            f"expected a frame within the {remaining_bytes} bytes left, got one of {length} bytes"
        )
    return pos + _UINT64.size


def _global(machine: PickleMachine, stack: list[Any], pos: int) -> int:
    names = []
    for _ in range(2):
        name, end, _ = bytes(machine.data[pos : pos + _NAME_LIMIT]).partition(b"\n")
        if not end:
            raise CheckpointCorruptError(
                f"expected a global's name of a line of at most {_NAME_LIMIT} bytes, got no end"
            )
        names.append(decoded_text(machine, name))
        pos += len(name) + 1
    stack.append(_find(machine, names[0], names[1]))
    return pos


def _stack_global(machine: PickleMachine, stack: list[Any], pos: int) -> int:
    name, module = stack.pop(), stack.pop()
    if type(name) is not str or type(module) is not str:
        raise CheckpointCorruptError(
            f"expected a global's module and name, got {brief(module)} and {brief(name)}"
        )
    stack.append(_find(machine, module, name))
    return pos


def _find(machine: PickleMachine, module: str, name: str) -> object:
    found = machine.vocabulary.globals.get((module, name), machine)
    if found is not machine:
        return found
    keeps_unread = machine.vocabulary.keeps_unread
    if keeps_unread is None or not keeps_unread(module, name):
        raise UnknownGlobalError(
            f"class or function {brief(f'{module[:80]}.{name[:80]}')} is not loaded by default"
        )
    return machine.keep_aside(f"{module}.{name}")


def _newobj(machine: PickleMachine, stack: list[Any], pos: int) -> int:
    args, callee = stack.pop(), stack[-1]
    if type(callee) is UnreadObject:
        stack[-1] = machine.keep_aside(callee.class_name)
        return pos
    if type(callee) is Callee and callee.new_of is not None and type(args) is tuple:
        stack[-1] = callee.new_of(machine, args)
        return pos
    if type(callee) is not Callee or callee.new is None or type(args) is not tuple or args:
        raise UnknownGlobalError(
            f"expected a class that checkpoints hold, made without arguments, got {brief(callee)} "
            f"with {brief(args)}"
        )
    stack[-1] = callee.new()
    return pos


def _reduce(machine: PickleMachine, stack: list[Any], pos: int) -> int:
    args, callee = stack.pop(), stack[-1]
    if type(callee) is UnreadObject:
        stack[-1] = machine.keep_aside(callee.class_name)
        return pos
    if type(callee) is not Callee or callee.call is None or type(args) is not tuple:
        raise UnknownGlobalError(
            f"expected a call that checkpoints hold, got {brief(callee)} with {brief(args)}"
        )
    try:
        stack[-1] = callee.call(machine, args)
    except UnknownGlobalError:
        if all(type(arg) is not UnreadObject for arg in args):
            raise
        stack[-1] = machine.keep_aside(callee.name)
    return pos


def _newobj_with_keywords(machine: PickleMachine, stack: list[Any], pos: int) -> int:
    stack.pop()
    if type(stack[-2]) is not UnreadObject:
        refuse_opcode(pickle.NEWOBJ_EX[0])
    return _newobj(machine, stack, pos)


def _build(machine: PickleMachine, stack: list[Any], pos: int) -> int:
    state, target = stack.pop(), stack[-1]
    if type(target) is UnreadObject:
        return pos
    if type(state) is dict and len(state) > _FREE_FIELDS:
        # A pickle may give the same state to many objects, each of which keeps its own dict.
        machine.charge(_FIELD_COST * len(state))
    build = machine.vocabulary.build.get(type(target))
    if build is None:
        raise UnknownGlobalError(
            f"expected fields for an object that checkpoints hold, got some for {brief(target)}"
        )
    build(target, state)
    return pos


def _persistent(machine: PickleMachine, stack: list[Any], pos: int) -> int:
    load = machine.vocabulary.persistent
    if load is None:
        raise UnknownGlobalError("expected a value without tensors, got one that refers to storage")
    stack[-1] = load(stack[-1])
    return pos


# ---- opcodes that take all since the last mark: (machine, stack below the mark, items)


def _tuple(_: PickleMachine, stack: list[Any], items: list[Any]) -> None:
    stack.append(tuple(items))


def _list_of(stack: list[Any]) -> list[Any] | deque[Any]:
    target: list[Any] | deque[Any] = stack[-1]
    if type(target) is not list and type(target) is not deque:
        raise UnknownGlobalError(f"expected a list to append to, got {brief(target)}")
    return target


def _appends(_: PickleMachine, stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not UnreadObject:
        _list_of(stack).extend(items)


def _setitems(machine: PickleMachine, stack: list[Any], items: list[Any]) -> None:
    target, keys = stack[-1], items[::2]
    if type(target) is UnreadObject:
        return
    if type(target) not in _DICTS:
        raise UnknownGlobalError(f"expected a dict to set items of, got {brief(target)}")
    if len(items) % 2:
        raise CheckpointCorruptError("expected a value for every key, got an odd number of items")
    machine.check_keys(target, keys)
    target.update(zip(keys, items[1::2], strict=True))


def _additems(machine: PickleMachine, stack: list[Any], items: list[Any]) -> None:
    target = stack[-1]
    if type(target) is UnreadObject:
        return
    if type(target) is not set:
        raise UnknownGlobalError(f"expected a set to add to, got {brief(target)}")
    machine.check_keys(target, items)
    target.update(items)


def _frozenset(machine: PickleMachine, stack: list[Any], items: list[Any]) -> None:
    stack.append(make_set(machine, frozenset, items))


_UINT8, _UINT16, UINT32, _UINT64 = (struct.Struct(f) for f in ("<B", "<H", "<I", "<Q"))
_INT32, _FLOAT64 = struct.Struct("<i"), struct.Struct(">d")


_PLAIN_BY_OPCODE: dict[bytes, Callable[[PickleMachine, list[Any], int], int]] = {
    pickle.PROTO: _proto,
    pickle.FRAME: _frame,
    pickle.NONE: _constant(None),
    pickle.NEWTRUE: _constant(True),
    pickle.NEWFALSE: _constant(False),
    pickle.BININT: _scalar(_INT32),
    pickle.BININT2: _scalar(_UINT16),
    pickle.BINFLOAT: _scalar(_FLOAT64),
    pickle.LONG1: _sized_handler(_UINT8, _long),
    pickle.LONG4: _sized_handler(_INT32, _long),
    pickle.SHORT_BINUNICODE: _sized_handler(_UINT8, decoded_text),
    pickle.BINUNICODE: _text_handler(UINT32),
    pickle.BINUNICODE8: _text_handler(_UINT64),
    pickle.SHORT_BINBYTES: _sized_handler(_UINT8, lambda _, raw: bytes(raw)),
    pickle.BINBYTES: _sized_handler(UINT32, lambda _, raw: bytes(raw)),
    pickle.BINBYTES8: _sized_handler(_UINT64, lambda _, raw: bytes(raw)),
    pickle.BYTEARRAY8: _sized_handler(_UINT64, lambda _, raw: bytearray(raw)),
    pickle.EMPTY_LIST: _empty_list,
    pickle.EMPTY_SET: _empty_set,
    pickle.TUPLE3: _tuple3,
    pickle.BINPUT: _put(_UINT8),
    pickle.LONG_BINPUT: _put(UINT32),
    pickle.APPEND: _append,
    pickle.SETITEM: _setitem,
    pickle.GLOBAL: _global,
    pickle.STACK_GLOBAL: _stack_global,
    pickle.NEWOBJ: _newobj,
    pickle.NEWOBJ_EX: _newobj_with_keywords,
    pickle.REDUCE: _reduce,
    pickle.BUILD: _build,
    pickle.BINPERSID: _persistent,
}
_MARKED_BY_OPCODE: dict[bytes, Callable[[PickleMachine, list[Any], list[Any]], None]] = {
    pickle.TUPLE: _tuple,
    pickle.APPENDS: _appends,
    pickle.SETITEMS: _setitems,
    pickle.ADDITEMS: _additems,
    pickle.FROZENSET: _frozenset,
}
PLAIN = [_PLAIN_BY_OPCODE.get(bytes([op])) for op in range(256)]
MARKED = [_MARKED_BY_OPCODE.get(bytes([op])) for op in range(256)]
