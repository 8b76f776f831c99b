"""Fully qualified names in bulk: packed to send between ranks, and shared after that.

A thousand ranks of one job send the same thousand names. They travel as one block of bytes, and
equal blocks become one tuple again, so that a coordinator neither builds nor compares them twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

Fqns = tuple[str, ...]
TWICE = "expected each key once, got it twice"


def pack_names(fqns: Iterable[str]) -> bytes:
    """The names as bytes; surrogates and any other character survive."""
    fqns = tuple(fqns)
    text = "\n".join(fqns)
    if not _is_plain(fqns, text):
        text = "\n".join(
            json.dumps(fqn, ensure_ascii=False) if _awkward(fqn) else fqn for fqn in fqns
        )
    return text.encode("utf-8", "surrogatepass")


@lru_cache(maxsize=256)
def unpack_names(block: bytes) -> Fqns:
    """The names of `pack_names`; the same tuple for the same bytes as long as it is cached."""
    if not block:
        return ()
    lines = block.decode("utf-8", "surrogatepass").split("\n")
    if not block.startswith(b'"') and b'\n"' not in block:
        return tuple(lines)
    return tuple(json.loads(line) if line.startswith('"') else line for line in lines)


class PackedNames:
    """The names of a block, found and shown one by one without unpacking all of them.

    For blocks without names that need quotes (see `can_search`).

    >>> names = PackedNames(pack_names(["model.w", "model.b", "step"]))
    >>> len(names), names[1], names.find("step"), names.find("model")
    (3, 'model.b', 2, None)
    """

    def __init__(self, block: bytes) -> None:
        self.block = block

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Where each line ends in the block."""
        lines = np.frombuffer(self.block, np.uint8) == ord("\n")
        return np.append(np.flatnonzero(lines), len(self.block))

    @staticmethod
    def can_search(block: bytes) -> bool:
        """Whether each line of a block is a name as it is."""
        if not block or block.startswith(b'"'):
            return False
        # One character alone is found several times as fast as two.
        return b'"' not in block or b'\n"' not in block

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> str:
        """The name of a row from 0 on. Raises ValueError if it is not UTF-8."""
        start = int(self._ends[row - 1]) + 1 if row else 0
        return self.block[start : int(self._ends[row])].decode("utf-8", "surrogatepass")

    def find(self, fqn: str) -> int | None:
        """The row of a name; None if it is not there. Raises ValueError if it is there twice."""
        if _awkward(fqn):
            return None
        name = fqn.encode("utf-8", "surrogatepass")
        at = self._find_line(name, 0)
        if at is None:
            return None
        if self._find_line(name, at + len(name)) is not None:
            raise ValueError(TWICE)
        return int(np.searchsorted(self._ends, at))

    def unpack(self) -> Fqns:
        """All names. Raises ValueError if they are not UTF-8."""
        return unpack_names(self.block)

    def _find_line(self, line: bytes, start: int) -> int | None:
        """Where a whole line begins, from `start` on, which is the beginning or the end of one."""
        block, length = self.block, len(line)
        if not start and (block == line or block.startswith(line + b"\n")):
            return 0
        at = block.find(b"\n" + line + b"\n", start)
        if at >= 0:
            return at + 1
        last = len(block) - length
        return last if last > start and block.endswith(b"\n" + line) else None


def _is_plain(fqns: Fqns, text: str) -> bool:
    """Whether no name is awkward: searches of the joined text, in place of a call for each."""
    alone = text.count("\n") == len(fqns) - 1
    return alone and "" not in fqns and not text.startswith('"') and '\n"' not in text


def _awkward(fqn: str) -> bool:
    return not fqn or "\n" in fqn or fqn.startswith('"')
