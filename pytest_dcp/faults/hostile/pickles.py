"""Checkpoints with code in their pickles, and pickles that grow: every way in, in every place.

Enters: a folder with a good checkpoint of your own. Leaves: one `Hostile` after the other. Their
code creates a canary, a file or folder at a path of your choice, and does nothing else: if it
exists after a load, code of the checkpoint ran. A bomb takes more than 2 GiB once it is unpickled.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from pytest_dcp.faults.hostile.folders import Hostile
from pytest_dcp.faults.hostile.gadgets import gadgets
from pytest_dcp.faults.hostile.metadata import Good, move_entry, with_pickle
from pytest_dcp.faults.hostile.nodes import Content, Node, NoNode
from pytest_dcp.faults.hostile.pickle_opcodes import (
    Global,
    assemble_pickle,
    global_code,
    long_code,
    split,
)

BOMB_BYTES = 1 << 31
"""Minimum memory that a bomb takes."""
_HOLE = "here is the hostile part"
_FILE = "hostile.distcp"

Nodes = Mapping[str, Node]


def malicious_pickles(
    folder: str | os.PathLike[str], canary: str | os.PathLike[str]
) -> Iterator[Hostile]:
    """Checkpoints that make the canary when they are read: gadgets x protocols x places.

    canary: a free path of at most 100 characters below an existing folder.
    """
    good = Good.of(Path(folder).absolute())
    found = gadgets(os.fspath(canary))
    for place, carry in _whole(good).items():
        for gadget in found:
            for protocol in gadget.protocols:
                nodes = carry(assemble_pickle(gadget.code(protocol, 0), protocol))
                name = f"{gadget.name}, protocol {protocol}, as {place}"
                yield Hostile(name, gadget.harm, good.folder, nodes)
    for place in PARTS:
        for protocol in PART_PROTOCOLS:
            head, tail, memoized = _split_metadata(good, place, protocol)
            for gadget in found:
                if protocol in gadget.protocols and not gadget.is_whole:
                    data = head + gadget.code(protocol, memoized) + tail
                    name = f"{gadget.name}, protocol {protocol}, in {place}"
                    yield Hostile(name, gadget.harm, good.folder, {".metadata": Content(data)})


def memory_bombs(folder: str | os.PathLike[str]) -> Iterator[Hostile]:
    """Checkpoints of about 100 KiB whose pickles take gigabytes, and call only functions that copy
    data.

    A list of allowed globals does not stop them.
    """
    good = Good.of(Path(folder).absolute())
    for place, carry in _whole(good).items():
        for name, code in BOMBS.items():
            harm = f"takes {BOMB_BYTES} bytes or more"
            yield Hostile(f"{name} as {place}", harm, good.folder, carry(assemble_pickle(code, 4)))


# ---- places


def _whole(good: Good) -> dict[str, Callable[[bytes], Nodes]]:
    """Functions that put a whole pickle into a checkpoint, by its place there."""
    found: dict[str, Callable[[bytes], Nodes]] = {
        ".metadata": lambda data: {".metadata": Content(data)},
        "the metadata of rank 0": lambda data: {
            ".metadata": NoNode(),
            "__0.metadata": Content(data),
        },
        "the pickle of a tensor": _as_entry(good, good.tensor),
    }
    if good.has("value"):
        found["the pickle of a value"] = _as_entry(good, good.value)
        found["the bare bytes of a value"] = partial(_replace_entry, good, good.value)
    return found


def _as_entry(good: Good, fqn: str) -> Callable[[bytes], Nodes]:
    entry = good.entry(fqn)
    return lambda data: _replace_entry(good, fqn, with_pickle(entry, data))


def _replace_entry(good: Good, fqn: str, entry: bytes) -> Nodes:
    """Replace the key's first entry by another one, in its own file."""
    metadata = good.copy()
    move_entry(metadata, fqn, _FILE, len(entry))
    return {".metadata": Content(pickle.dumps(metadata)), _FILE: Content(entry)}


PARTS = ("planner_data", "the version", "a tensor's properties", "a file's name", "a key")
"""Places in an otherwise good `.metadata`."""
PART_PROTOCOLS = (2, 4)
"""Protocols in which parts are written; the others have no distinct opcodes for them."""


def _split_metadata(good: Good, place: str, protocol: int) -> tuple[bytes, bytes, int]:
    """The metadata's pickle before and after one of its parts, and the size of its memo there."""
    metadata = good.copy()
    entries = metadata.state_dict_metadata
    if place == "planner_data":
        metadata.planner_data = _HOLE
    elif place == "the version":
        metadata.version = _HOLE
    elif place == "a tensor's properties":
        entries[good.tensor].properties = _HOLE  # type: ignore[union-attr]  # no tensor's
    elif place == "a file's name":
        move_entry(metadata, good.tensor, _HOLE, 1)
    else:
        entries[_HOLE] = entries.pop(good.tensor)
    return split(pickle.dumps(metadata, protocol), _HOLE)


# ---- bombs


def _repeat_call(module: str, name: str, args: bytes, each_bytes: int) -> bytes:
    """A list of the results of a repeated call, each of `each_bytes` bytes."""
    head = global_code(Global(module, name), 2) + b"q\0" + args + b"q\1" + b"]("
    return head + b"h\0h\1R" * (BOMB_BYTES // each_bytes + 1) + b"e"


def _text(nbytes: int) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", nbytes) + b"x" * nbytes


def _numbers(count: int) -> bytes:
    return pickle.MARK + b"".join(b"M" + struct.pack("<H", at) for at in range(count))


_ENCODED = _text(1 << 17) + b"\x8c\x06latin1\x86"
_LIST = b"]" + _numbers(1 << 14) + b"e\x85"

BOMBS = {
    "a bytearray of a length": b"cbuiltins\nbytearray\n" + long_code(BOMB_BYTES) + b"\x85R",
    "a list of a range": (
        b"cbuiltins\nlist\ncbuiltins\nrange\n" + long_code(BOMB_BYTES) + b"\x85R\x85R"
    ),
    "one text encoded again and again": _repeat_call("_codecs", "encode", _ENCODED, 1 << 17),
    "one list as a size again and again": _repeat_call("torch", "Size", _LIST, 1 << 17),
    "one list as a set again and again": _repeat_call("builtins", "set", _LIST, 1 << 19),
    "a far memo entry": b"Nr\xff\xff\xff\x7f",
    "a far memo entry, in letters": b"Np2147483647\n",
    "a bytearray that is said to follow": b"\x96" + struct.pack("<Q", 1 << 36),
    "bytes that are said to follow": b"\x8e" + struct.pack("<Q", 1 << 36),
}
"""Opcodes, by the value they create."""
