"""The loop that runs a pickle's opcodes on a `PickleMachine`.

Enters: bytes and a `Vocabulary`. Leaves: the object at STOP; bytes after it are not read.
The rules are those of `unpickle.machine`; `opcodes` says what each opcode does.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any

from pytest_dcp._engine.unpickle.machine import (
    Callee,
    PickleMachine,
    Vocabulary,
)
from pytest_dcp._engine.unpickle.opcodes import MARKED, PLAIN, UINT32, refuse_opcode
from pytest_dcp.errors import CheckpointCorruptError
from pytest_dcp.garbage_collection import collector_paused


def run(
    data: bytes | memoryview,
    vocabulary: Vocabulary,
    unread: set[str] | None = None,
    *,
    to_the_end: bool = False,
    copy: bool = True,
) -> Any:
    """The object that the pickle at the start of `data` describes.

    unread: receives the names of classes whose objects the vocabulary does not read.
    to_the_end: whether the pickle must be all of `data`.
    copy: False works on the memoryview itself, whose bytes must not change meanwhile. A copy is
        faster to read opcode by opcode; a view saves memory if the values are large.

    The cyclic garbage collector is off meanwhile: it would visit every new object many times.

    Raises:
        CheckpointCorruptError: or a subclass, as the module docstring says; `offset` is the
        opcode's.
    """
    machine = PickleMachine(bytes(data) if copy else data, vocabulary)
    with collector_paused():
        found = _interpret(machine, to_the_end)
    if unread is not None:
        unread |= machine.unread
    return found


def _interpret(machine: PickleMachine, to_the_end: bool = False) -> Any:
    """The loop: opcodes that make up nine tenths of a `.metadata` inline, the others by table.

    It is one function because a call for each opcode doubled its time. `stack` holds the objects
    after the last MARK, so that nothing reaches below it; `outer` holds the stacks of the MARKs
    before.
    """
    data, memo = machine.data, machine.memo
    stack: list[Any] = []
    outer: list[list[Any]] = []
    push, memoize = stack.append, memo.append
    pos = start = 0
    plain, marked, uint32 = PLAIN, MARKED, UINT32.unpack_from
    try:
        while True:
            start = pos
            op = data[pos]
            pos += 1
            if op == _MEMOIZE:
                memoize(stack[-1])
            elif op in _GETS:
                value = memo[data[pos] if op == _BINGET else uint32(data, pos)[0]]
                pos += 1 if op == _BINGET else 4
                if type(value) is Callee and value.records is not None:
                    behind = value.records(machine, stack, start)
                    if behind != start:
                        pos = behind
                        continue
                push(value)
            elif op == _BININT1:
                push(data[pos])
                pos += 1
            elif op == _MARK:
                outer.append(stack)
                stack = []
                push = stack.append
            elif op == _TUPLE1:
                stack[-1] = (stack[-1],)
            elif op == _TUPLE2:
                last = stack.pop()
                stack[-1] = (stack[-1], last)
            elif op == _EMPTY_DICT:
                push({})
            elif op == _EMPTY_TUPLE:
                push(())
            elif (handle := plain[op]) is not None:
                pos = handle(machine, stack, pos)
            elif (finish := marked[op]) is not None:
                items, stack = stack, outer.pop()
                push = stack.append
                finish(machine, stack, items)
            elif op == _STOP:
                if to_the_end:
                    _check_end(data, pos)
                return stack.pop()
            else:
                refuse_opcode(op)
    except (IndexError, struct.error):
        raise CheckpointCorruptError(
            "expected a whole pickle, got one that ends early or uses values it never stored",
            offset=start,
        ) from None
    except CheckpointCorruptError as error:
        raise type(error)(error.reason, offset=start) from None


def _check_end(data: bytes | memoryview, pos: int) -> None:
    if pos != len(data):
        raise CheckpointCorruptError(
            f"expected the pickle's STOP at the end, got {len(data) - pos} bytes behind it"
        )


_MEMOIZE, _BINGET, _LONG_BINGET = pickle.MEMOIZE[0], pickle.BINGET[0], pickle.LONG_BINGET[0]


_GETS = (_BINGET, _LONG_BINGET)


_MARK, _STOP, _BININT1 = pickle.MARK[0], pickle.STOP[0], pickle.BININT1[0]


_TUPLE1, _TUPLE2, _EMPTY_TUPLE = pickle.TUPLE1[0], pickle.TUPLE2[0], pickle.EMPTY_TUPLE[0]


_EMPTY_DICT = pickle.EMPTY_DICT[0]
