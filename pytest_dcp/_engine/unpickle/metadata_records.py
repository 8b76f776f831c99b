"""Runs of equal records in a `.metadata` pickle of torch: many opcodes per step.

Such a file consists almost entirely of three repeated sequences of opcodes: one makes a tensor's
description up to its list of chunks, one a chunk, one a key and its place. Each is a regular
expression here. A record's objects go to the machine's
stack and memo as if its opcodes had run one by one, and cost the same; if a record looks different
in any way, it is left to the opcodes.

Of the values that a record memoizes, only its objects and sizes are kept. A pickle that gets
another one from the memo finds `LEFT_OUT`, which no reader accepts: `unpickle.read_metadata` then
reads the pickle again, opcode by opcode.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.unpickle.machine import PickleMachine, decoded_text
from pytest_dcp._torch_internals.checkpoint_classes import _StorageInfo

LEFT_OUT = object()

# Opcodes with their arguments; the first byte of each identifies it.
_GET = rb"(?:h.|j....)"
_INT = rb"(?:K.|M..|J....|\x8a(?:\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_TEXT = rb"\x8c(?:" + b"|".join(re.escape(bytes([n])) + rb".{%d}" % n for n in range(129)) + rb")"
_TEXT_OR_GET = rb"(" + _TEXT + rb"\x94|" + _GET + rb")"
_TUPLES = (
    *(_INT + rb"\x85", _INT * 2 + rb"\x86", _INT * 3 + rb"\x87"),
    rb"\(" + _INT + rb"{4,64}t",
)
_NUMBERS = rb"(" + rb"|".join(_TUPLES) + rb")"
"""A tuple of ints."""
_NEW = rb"\)\x81\x94\}\x94\("
"""Make an instance, and open the dict of its fields; both are memoized."""
_CALL = rb"\x94\x85\x94R\x94"
"""Call a class with the tuple as its one argument; tuple, arguments and result are memoized."""
_BUILD = rb"ub"
_BOOL = rb"[\x88\x89]"
_NEW_OF_TUPLE = rb"\)\x81\x94\("
_BUILD_OF_TUPLE = rb"t\x94b"
"""Make an instance, and set its state from a tuple; both are memoized."""
_LIST = rb"\]\x94(\(?)"
"""A list, and the mark before its items if it has several."""
_SEVERAL, _ONE = b"eub", b"aub"
"""Add the items to the list, the list to the fields, and set these."""
Named = Callable[[str], bytes]
"""The opcode that gets a class or the name of a field from the memo."""


def _chunk(get: Named) -> bytes:
    sizes = (get(name) + get("torch.Size") + _NUMBERS + _CALL for name in ("offsets", "sizes"))
    return get("class") + _NEW + b"".join(sizes) + _BUILD


def _tensor(get: Named) -> bytes:
    """The description of a tensor, up to its empty list of chunks."""
    return b"".join(
        (
            *(get("class"), _NEW, get("properties"), get("of")),
            *(_NEW_OF_TUPLE, rb"(" + _GET * 2 + _BOOL + _GET + _BOOL + rb")", _BUILD_OF_TUPLE),
            *(get("size"), get("torch.Size"), _NUMBERS, _CALL, get("chunks"), _LIST),
        )
    )


def _entry(get: Named) -> bytes:
    size = get("torch.Size") + _NUMBERS + _CALL
    return b"".join(
        (
            *(get("class"), _NEW, get("fqn"), _TEXT_OR_GET),
            *(get("index"), rb"(" + _INT + rb")"),
            *(get("offset"), rb"(?:" + size + rb"|(" + _GET + rb"))", _BUILD),
            *(get("place"), _NEW, get("relative_path"), _TEXT_OR_GET),
            *(get("offset"), rb"(" + _INT + rb")", get("length"), rb"(" + _INT + rb")"),
            *(rb"(?:" + get("transform_descriptors") + rb"(N))?", _BUILD),
        )
    )


_NOTHING = rb"(?!)"


def _learning_pattern(template: Callable[[Named], bytes]) -> re.Pattern[bytes]:
    """The record with any memo indices for its names: one group per name, the same throughout."""
    seen: set[str] = set()

    def get(name: str) -> bytes:
        group = _group(name).encode()
        if name in seen:
            return b"(?P=" + group + b")"
        seen.add(name)
        return b"(?P<" + group + b">" + _GET + b")"

    return re.compile(template(get), re.DOTALL)


def _known_pattern(
    template: Callable[[Named], bytes], found: Mapping[str, bytes]
) -> re.Pattern[bytes]:
    """The record with the names that were found; missing names are left out."""

    def get(name: str) -> bytes:
        opcode = found.get(_group(name))
        return _NOTHING if opcode is None else re.escape(opcode)

    return re.compile(template(get), re.DOTALL)


def _group(name: str) -> str:
    return name.replace(".", "_")


@dataclass(frozen=True, slots=True, eq=False)
class _RecordKind:
    """A kind of record."""

    template: Callable[[Named], bytes]
    learning: re.Pattern[bytes]
    meanings: Mapping[str, object]
    """The objects behind the names: keys of the vocabulary's globals for classes, else the names
    themselves.
    """


def _matches(machine: PickleMachine, kind: _RecordKind, start: int) -> Iterator[re.Match[bytes]]:
    """The adjacent records that begin at `start`."""
    match = _match(machine, kind, start)
    while match is not None:
        yield match
        match = machine.patterns[kind].match(machine.data, match.end())


def _match(machine: PickleMachine, kind: _RecordKind, start: int) -> re.Match[bytes] | None:
    """The record that begins at `start`, if one does."""
    pattern = machine.patterns.get(kind)
    match = pattern.match(machine.data, start) if pattern is not None else None
    if match is None:
        pattern = _learn_pattern(machine, kind, start)
        match = pattern.match(machine.data, start) if pattern is not None else None
    return match


def _learn_pattern(
    machine: PickleMachine, kind: _RecordKind, start: int
) -> re.Pattern[bytes] | None:
    """The pattern of the record that begins here, if its names are the expected ones."""
    match = kind.learning.match(machine.data, start) if machine.to_learn else None
    if match is None:
        return None
    machine.to_learn -= 1
    found = {name: opcode for name, opcode in match.groupdict().items() if opcode is not None}
    if any(
        _memo_value(machine, opcode) != _meaning(machine, kind, name)
        for name, opcode in found.items()
    ):
        return None
    pattern = machine.patterns[kind] = _known_pattern(kind.template, found)
    return pattern


def _meaning(machine: PickleMachine, kind: _RecordKind, name: str) -> object:
    meaning = kind.meanings.get(name, name)
    return machine.vocabulary.globals[meaning] if isinstance(meaning, tuple) else meaning


def chunks(machine: PickleMachine, stack: list[Any], start: int) -> int:
    """Push the chunks that begin at `start`; returns the position after them."""
    return _read_chunks(machine, start, stack, machine.memo)


def _read_chunks(machine: PickleMachine, start: int, found: list[Any], memoized: list[Any]) -> int:
    """Add the chunks that begin at `start`, and what they memoize; the position after them."""
    results, new, end = machine.results_by_opcodes, object.__new__, start
    for match in _matches(machine, _CHUNKS, start):
        numbers, more = match.groups()
        offsets = results.get(numbers) or _size(machine, numbers)
        sizes = results.get(more) or _size(machine, more)
        machine.charge(len(offsets) + len(sizes))
        chunk = new(ChunkStorageMetadata)
        fields = chunk.__dict__
        fields["offsets"], fields["sizes"] = offsets, sizes
        found.append(chunk)
        memoized += (chunk, LEFT_OUT, LEFT_OUT, LEFT_OUT, offsets, LEFT_OUT, LEFT_OUT, sizes)
        end = match.end()
    return end


def tensors(machine: PickleMachine, stack: list[Any], start: int) -> int:
    """Push the descriptions of tensors that begin at `start`, and their names but the first, which
    is before it; returns the position after them.
    """
    data, memo, results, new = (
        machine.data,
        machine.memo,
        machine.results_by_opcodes,
        object.__new__,
    )
    end = start
    while (match := _match(machine, _TENSORS, end)) is not None:
        state, numbers, mark = match.groups()
        described, properties = new(TensorStorageMetadata), new(TensorProperties)
        properties.__dict__.update(results.get(state) or _properties(machine, state))
        size = results.get(numbers) or _size(machine, numbers)
        stored: list[ChunkStorageMetadata] = []
        memoized = [described, LEFT_OUT, properties, LEFT_OUT, LEFT_OUT, LEFT_OUT, size, stored]
        behind = _read_chunks(machine, match.end(), stored, memoized)
        if data[behind : behind + 3] != (_SEVERAL if mark else _ONE):
            break
        if len(stored) != 1 and not mark:
            break
        machine.charge(len(size))
        fields = described.__dict__
        fields["properties"], fields["size"], fields["chunks"] = properties, size, stored
        stack.append(described)
        memo += memoized
        end = behind + 3
        name = _NAME.match(data, end)
        if name is not None:
            stack.append(_text(machine, name[0], memo))
            end = name.end()
    return end


def _properties(machine: PickleMachine, opcodes: bytes) -> dict[str, Any]:
    """The fields that these opcodes of a tuple set: dtype, layout, requires_grad, the encoding of
    the memory format, pin_memory.

    They may be kept: opcodes that change the memo end the reading of records.
    """
    state = [
        opcode == pickle.NEWTRUE if opcode in _BOOLS else _memo_value(machine, opcode)
        for opcode in _OPERANDS.findall(opcodes)
    ]
    properties = object.__new__(TensorProperties)
    machine.vocabulary.build[TensorProperties](properties, tuple(state))
    fields: dict[str, Any] = properties.__dict__
    machine.results_by_opcodes[opcodes] = fields
    return fields


def entries(machine: PickleMachine, stack: list[Any], start: int) -> int:
    """Push the keys and places that begin at `start`; returns the position after them."""
    memo, new, end = machine.memo, object.__new__, start
    for match in _matches(machine, _ENTRIES, start):
        fqn, hint, numbers, size, path, offset, length, none = match.groups()
        key, place = new(MetadataIndex), new(_StorageInfo)
        memoized = [key, LEFT_OUT]
        fields = key.__dict__
        fields["fqn"] = _text(machine, fqn, memoized)
        fields["index"] = _number(machine, hint)
        fields["offset"] = _where(machine, numbers, size, memoized)
        if not _is_key(fields):
            break
        memoized += (place, LEFT_OUT)
        fields = place.__dict__
        fields["relative_path"] = _text(machine, path, memoized)
        fields["offset"], fields["length"] = _number(machine, offset), _number(machine, length)
        if none is not None:
            fields["transform_descriptors"] = None
        stack += (key, place)
        memo += memoized
        end = match.end()
    return end


def _is_key(fields: Mapping[str, Any]) -> bool:
    """Whether a MetadataIndex may have these fields: the opcodes report the error."""
    fqn, hint, offset = fields["fqn"], fields["index"], fields["offset"]
    whole = type(fqn) is str and type(offset) is torch.Size
    return whole and hint >= 0 and min(offset, default=0) >= 0


# Results of opcodes. `PickleMachine.results_by_opcodes` has earlier ones: the same object is used.


def _memo_value(machine: PickleMachine, opcode: bytes) -> Any:
    return machine.memo[int.from_bytes(opcode[1:], "little")]


def _text(machine: PickleMachine, opcode: bytes, memoized: list[Any]) -> Any:
    """A new string, which is memoized, or the one in the memo."""
    if opcode[0] != _SHORT_BINUNICODE:
        return _memo_value(machine, opcode)
    text = machine.results_by_opcodes.get(opcode)
    if text is None:
        text = machine.results_by_opcodes[opcode] = decoded_text(machine, opcode[2:-1])
    memoized.append(text)
    return text


def _where(
    machine: PickleMachine, numbers: bytes | None, opcode: bytes, memoized: list[Any]
) -> Any:
    """A new size, which is memoized, or the one in the memo."""
    if numbers is None:
        return _memo_value(machine, opcode)
    size = machine.results_by_opcodes.get(numbers) or _size(machine, numbers)
    machine.charge(len(size))
    memoized += (LEFT_OUT, LEFT_OUT, size)
    return size


def _size(machine: PickleMachine, numbers: bytes) -> torch.Size:
    ints, end = [], len(numbers) - 1
    at = 1 if numbers[0] == _MARK else 0
    while at < end:
        behind = at + (_WIDTHS.get(numbers[at]) or 2 + numbers[at + 1])
        ints.append(_number(machine, numbers[at:behind]))
        at = behind
    size = machine.results_by_opcodes[numbers] = torch.Size(ints)
    return size


def _number(machine: PickleMachine, opcode: bytes) -> int:
    number: int | None = machine.results_by_opcodes.get(opcode)
    if number is None:
        op = opcode[0]
        raw = opcode[2:] if op == _LONG1 else opcode[1:]
        number = int.from_bytes(raw, "little", signed=op in (_BININT, _LONG1))
        machine.results_by_opcodes[opcode] = number
    return number


_LONG1, _BININT, _MARK = pickle.LONG1[0], pickle.BININT[0], pickle.MARK[0]
_SHORT_BINUNICODE = pickle.SHORT_BINUNICODE[0]
_BOOLS = (pickle.NEWTRUE, pickle.NEWFALSE)
_OPERANDS = re.compile(_GET + rb"|" + _BOOL, re.DOTALL)
_NAME = re.compile(_TEXT + rb"\x94", re.DOTALL)
_WIDTHS = {pickle.BININT1[0]: 2, pickle.BININT2[0]: 3, _BININT: 5}
"""Bytes of an int's opcode; LONG1 contains its length."""
_CHUNKS = _RecordKind(
    _chunk,
    _learning_pattern(_chunk),
    {"class": (ChunkStorageMetadata.__module__, ChunkStorageMetadata.__name__)}
    | {"torch_Size": ("torch", "Size")},
)
_TENSORS = _RecordKind(
    _tensor,
    _learning_pattern(_tensor),
    {"class": (TensorStorageMetadata.__module__, TensorStorageMetadata.__name__)}
    | {"of": (TensorProperties.__module__, TensorProperties.__name__)}
    | {"torch_Size": ("torch", "Size")},
)
_ENTRIES = _RecordKind(
    _entry,
    _learning_pattern(_entry),
    {"class": (MetadataIndex.__module__, MetadataIndex.__name__)}
    | {"place": (_StorageInfo.__module__, _StorageInfo.__name__), "torch_Size": ("torch", "Size")},
)
