"""Fully qualified names in bulk: packed to send between ranks, and shared after that.

A thousand ranks of one job send the same thousand names. They travel as one block of bytes, and
equal blocks become one tuple again, so that a coordinator neither builds nor compares them twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache

Fqns = tuple[str, ...]


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


def _is_plain(fqns: Fqns, text: str) -> bool:
    """Whether no name is awkward: searches of the joined text, in place of a call for each."""
    alone = text.count("\n") == len(fqns) - 1
    return alone and "" not in fqns and not text.startswith('"') and '\n"' not in text


def _awkward(fqn: str) -> bool:
    return not fqn or "\n" in fqn or fqn.startswith('"')
