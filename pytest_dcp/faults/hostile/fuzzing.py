"""Fuzzed metadata: `.metadata` files changed at random, following their structure.

Enters: the bytes of a good `.metadata` file, by torch or by this engine (it is unpickled), and
seeds. Leaves: for each seed one changed file, the same in every run. Pure (no I/O).

A pickle is changed opcode by opcode or field by field; the manifest of this engine in its header or
in its columns, and then its lengths and checksums are recomputed, so that the change passes the
first checks. The file's layout is described in `pytest_dcp._engine.format.metadata_file`.
"""

from __future__ import annotations

import json
import pickle
import random
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pytest_dcp.faults.damage import Damaged
from pytest_dcp.faults.hostile.metadata import HOSTILE_NAMES, LAST
from pytest_dcp.faults.hostile.pickle_opcodes import (
    Global,
    code_of,
    global_code,
    operations,
    text_code,
)

NUMBERS = (
    *(0, 1, 2, 7, 63, 64, 65, 255, 256, 4096, 65535, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    *(1 << 32, 1 << 40, 1 << 62, LAST, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 200),
    *(-1, -2, -255, -(1 << 31), -(1 << 63), -(1 << 64)),
)
"""Numbers at the limits where arithmetic goes wrong."""
TEXTS = (*HOSTILE_NAMES[:-1], "x", "fqn", "strided", "torch.int8", "a.b.c", "\0", "9" * 5000)
GLOBALS = (
    *(Global("torch", name) for name in ("Size", "device", "float32", "Tensor", "FloatStorage")),
    *(Global("builtins", name) for name in ("set", "range", "bytearray", "list", "eval", "int")),
    *(Global("collections", name) for name in ("OrderedDict", "defaultdict", "deque")),
    *(
        Global("torch.distributed.checkpoint.metadata", name)
        for name in ("Metadata", "MetadataIndex", "TensorProperties", "ChunkStorageMetadata")
    ),
    *(Global("pathlib", "PosixPath"), Global("_codecs", "encode"), Global("os", "mkdir")),
    *(Global("torch.serialization", "_get_layout"), Global("copyreg", "_reconstructor")),
)
_TRAILER = struct.Struct("<8sIIQQQI")
_TRAILER_BYTES = _TRAILER.size + 4
_MAGIC = b"\x89DCPend\n"
_HEAD_BYTES = 16
"""Of the manifest: its magic, and the length of the header."""
_ALIGNMENT = 64


def fuzzed_metadata(metadata: bytes, seeds: Iterable[int]) -> Iterator[Damaged]:
    """One changed file for each seed. The good file is unpickled, so it must be trusted."""
    parts = _Parts.of(metadata)
    ways = [*_WAYS_OF_PICKLES, *(_WAYS_OF_MANIFESTS if parts.header else ())]
    for seed in seeds:
        chance = random.Random(seed)
        what, change = chance.choice(ways)
        yield Damaged(f"seed {seed}: {what}", change(parts, chance))


@dataclass(frozen=True, slots=True)
class _Parts:
    """A good file, taken apart."""

    pickles: tuple[bytes, ...]
    """The same Metadata in several protocols."""
    codes: tuple[tuple[tuple[str, Any, bytes], ...], ...]
    """The opcodes of each."""
    stock: bytes
    """The pickle as it is in the file."""
    header: dict[str, Any]
    """Of the manifest; empty in a file by torch."""
    columns: bytes
    """The bytes after the header, from the next multiple of 8 on."""

    @classmethod
    def of(cls, data: bytes) -> _Parts:
        value = pickle.loads(data)
        pickles = tuple(pickle.dumps(value, protocol) for protocol in (2, 4, 4, 5))
        codes = tuple(tuple(operations(one)) for one in pickles)
        if data[-_TRAILER_BYTES:][: len(_MAGIC)] != _MAGIC:
            return cls(pickles, codes, data, {}, b"")
        numbers = _TRAILER.unpack_from(data, len(data) - _TRAILER_BYTES)
        start, length, stock_length = numbers[3:6]
        manifest = data[start : start + length]
        (header_length,) = struct.unpack_from("<Q", manifest, _HEAD_BYTES - 8)
        end = _HEAD_BYTES + header_length
        header = json.loads(manifest[_HEAD_BYTES:end])
        return cls(pickles, codes, data[:stock_length], header, manifest[end + -end % 8 :])


# ---- pickles


def _changed_code(parts: _Parts, chance: random.Random) -> bytes:
    code = list(chance.choice(parts.codes))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        at = chance.randrange(1, len(code))
        chance.choice(_CHANGES)(code, at, chance, parts)
    data = b"".join(raw for _, _, raw in code)
    return data if data.endswith(pickle.STOP) else data + pickle.STOP


_Code = list[tuple[str, Any, bytes]]


def _drop(code: _Code, at: int, chance: random.Random, parts: _Parts) -> None:
    if len(code) > 8:
        del code[at : at + chance.choice((1, 1, 1, 2, 5))]
    code.append(("STOP", None, pickle.STOP))


def _double(code: _Code, at: int, chance: random.Random, parts: _Parts) -> None:
    run = code[at : at + chance.choice((1, 1, 2, 8, 30))]
    code[at:at] = run * chance.choice((1, 1, 2, 50))


def _move(code: _Code, at: int, chance: random.Random, parts: _Parts) -> None:
    other = chance.randrange(1, len(code))
    code[at % len(code)], code[other] = code[other], code[at % len(code)]


def _splice(code: _Code, at: int, chance: random.Random, parts: _Parts) -> None:
    other = chance.choice(parts.codes)
    start = chance.randrange(1, len(other))
    code[at : at + chance.choice((0, 1, 5))] = other[start : start + chance.choice((1, 3, 10, 40))]


def _insert(code: _Code, at: int, chance: random.Random, parts: _Parts) -> None:
    code.insert(at, ("", None, _any_code(chance)))


def _replace(code: _Code, at: int, chance: random.Random, parts: _Parts) -> None:
    """Replace the argument by another of its kind, or the opcode if it has none."""
    name, arg, _ = code[at % len(code)]
    if "GET" in name or "PUT" in name:
        index = chance.choice((0, 1, chance.randrange(64), 255))
        raw = (pickle.BINGET if "GET" in name else pickle.BINPUT) + bytes([index])
    elif name == "GLOBAL" or name == "STACK_GLOBAL":
        raw = global_code(chance.choice(GLOBALS), chance.choice((2, 4)))
    elif isinstance(arg, str):
        raw = text_code(chance.choice(TEXTS), 4)
    elif isinstance(arg, int):
        raw = code_of(chance.choice(NUMBERS), 4)
    else:
        raw = _any_code(chance)
    code[at % len(code)] = (name, arg, raw)


def _any_code(chance: random.Random) -> bytes:
    return chance.choice(
        (
            lambda: code_of(chance.choice(NUMBERS), 4),
            lambda: text_code(chance.choice(TEXTS), 4),
            lambda: global_code(chance.choice(GLOBALS), chance.choice((2, 4))),
            lambda: pickle.BINGET + bytes([chance.randrange(64)]),
            lambda: chance.choice(_BARE),
            lambda: chance.choice(_BARE),
            lambda: chance.randbytes(chance.randrange(1, 4)),
        )
    )()


_BARE = [
    bytes([code])
    for code in b"(.012NQRabdelost}])\x81\x82\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"
]
_CHANGES = (_drop, _double, _move, _splice, _insert, _replace, _replace, _replace)


def _changed_fields(parts: _Parts, chance: random.Random) -> bytes:
    metadata = pickle.loads(parts.pickles[1])
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice(list(_fields(metadata)))(chance)
    return pickle.dumps(metadata, chance.choice((2, 4)))


_Change = Callable[[random.Random], None]


def _fields(value: Any) -> Iterator[_Change]:
    """For each field, key and item below: a function that gives it another value."""
    if isinstance(value, dict):
        for key, inner in list(value.items()):
            yield from (partial(_set_item, value, key, inner), partial(_rename, value, key))
            yield from _fields(key)
            yield from _fields(inner)
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield partial(_set_item, value, at, inner)
            yield from _fields(inner)
        yield partial(_stretch, value)
    elif hasattr(value, "__dict__") and not isinstance(value, torch.Size):
        for name, inner in list(vars(value).items()):
            yield partial(_set_field, value, name, inner)
            yield from _fields(inner)


def _set_item(owner: Any, key: Any, inner: Any, chance: random.Random) -> None:
    owner[key] = _other(inner, chance)


def _rename(owner: dict[Any, Any], key: Any, chance: random.Random) -> None:
    # Leave the key out if another change gave it another hash.
    owner[_other(key, chance)] = owner.pop(key, None)


def _stretch(owner: list[Any], chance: random.Random) -> None:
    owner[:] = owner * chance.choice((0, 2, 100))


def _set_field(owner: Any, name: str, inner: Any, chance: random.Random) -> None:
    object.__setattr__(owner, name, _other(inner, chance))


def _other(value: Any, chance: random.Random) -> Any:
    """Usually another value of its type."""
    if isinstance(value, torch.memory_format):  # other values are not pickled at all
        return chance.choice((torch.contiguous_format, torch.channels_last))
    if chance.random() < 0.1:
        return chance.choice((None, "x", 7, 1.5, True, (), torch.Size([3]), torch.int8, b"x"))
    if isinstance(value, torch.Size):
        return _other_size(list(value), chance)
    if isinstance(value, bool) or value is None:
        return chance.choice((True, False, None))
    if isinstance(value, int):
        return chance.choice(NUMBERS)
    if isinstance(value, str):
        return chance.choice(TEXTS)
    if isinstance(value, torch.dtype):
        return chance.choice((torch.int8, torch.float64, torch.bool, torch.qint8, torch.uint16))
    return value


def _other_size(sizes: list[int], chance: random.Random) -> Any:
    if sizes and chance.random() < 0.7:
        # torch.Size holds 64 bits.
        fitting = [number for number in NUMBERS if -LAST <= number <= LAST]
        sizes[chance.randrange(len(sizes))] = chance.choice(fitting)
    else:
        sizes = [*sizes, 1] if chance.random() < 0.5 else sizes[:-1]
    return torch.Size(sizes)


# ---- manifests


def _changed_header(parts: _Parts, chance: random.Random) -> bytes:
    header = json.loads(json.dumps(parts.header))
    for _ in range(chance.choice((1, 1, 2, 4))):
        changes = list(_fields(header))
        if changes:  # not if the change before left nothing
            chance.choice(changes)(chance)
    text = json.dumps(header, default=str, skipkeys=True)
    return _file(parts.stock, text.encode(), parts.columns)


def _changed_columns(parts: _Parts, chance: random.Random) -> bytes:
    columns = bytearray(parts.columns)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        width = chance.choice((1, 4, 8, 8))
        at = chance.randrange(0, len(columns) - width + 1, width)
        old = int.from_bytes(columns[at : at + width], "little")
        new = chance.choice((old + 1, old - 1, old ^ 1 << chance.randrange(64), *NUMBERS))
        columns[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
    return _file(parts.stock, json.dumps(parts.header).encode(), bytes(columns))


def _changed_rows(parts: _Parts, chance: random.Random) -> bytes:
    """Counts and columns made longer or shorter, sometimes by the same number."""
    header = json.loads(json.dumps(parts.header))
    columns, rows = bytearray(parts.columns), chance.choice((1, 2, 4, 8))
    for name in chance.sample(sorted(header["counts"]), chance.choice((0, 1, 1, 2))):
        header["counts"][name] += chance.choice((rows, -rows, 1, -1))
    at = chance.randrange(0, len(columns) + 1, 8)
    if chance.random() < 0.5:
        columns[at:at] = columns[at : at + 8 * rows]
    else:
        del columns[at : at + 8 * rows]
    return _file(parts.stock, json.dumps(header).encode(), bytes(columns))


def _file(stock: bytes, header: bytes, columns: bytes) -> bytes:
    """The whole file made of these parts, with true lengths and checksums."""
    gap = bytes(-len(stock) % _ALIGNMENT)
    head = b"\x89DCPcat\n" + struct.pack("<Q", len(header)) + header
    manifest = head + bytes(-len(head) % 8) + columns
    numbers = (len(stock) + len(gap), len(manifest), len(stock), zlib.crc32(stock))
    body = _TRAILER.pack(_MAGIC, 1, zlib.crc32(manifest), *numbers)
    return stock + gap + manifest + body + struct.pack("<I", zlib.crc32(body))


def _changed_stock(parts: _Parts, chance: random.Random) -> bytes:
    """A manifest that refers to an entry in the pickle, which is changed."""
    header = json.loads(json.dumps(parts.header))
    header["said"][chance.choice(sorted(header["said"]))] = ["pickle"]
    change = chance.choice((_changed_code, _changed_fields))
    return _file(change(parts, chance), json.dumps(header).encode(), parts.columns)


def _changed_bytes(parts: _Parts, chance: random.Random) -> bytes:
    """Any bytes of the whole file changed, without correcting checksums."""
    data = bytearray(_file(parts.stock, json.dumps(parts.header).encode(), parts.columns))
    for _ in range(chance.choice((1, 1, 3))):
        at = chance.randrange(len(data))
        data[at : at + chance.choice((0, 1, 4))] = chance.randbytes(chance.choice((0, 1, 4)))
    return bytes(data)


_WAYS_OF_PICKLES = 2 * (("opcodes", _changed_code), ("fields", _changed_fields))
_WAYS_OF_MANIFESTS = (
    *(("header", _changed_header), ("columns", _changed_columns), ("rows", _changed_rows)),
    *(("pickle behind the manifest", _changed_stock), ("bytes", _changed_bytes)),
)
