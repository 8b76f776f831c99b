"""The hash by which equal blocks are found, and a block's hash and checksums in one pass.

BLAKE3 if the package `blake3` is installed, else SHA-256, which takes two to four times as long.
Both give 32 bytes, and no collision of either is known. The index of a step names its function. A
step that refers to another hashes with that one's function, so that they compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from pytest_dcp._engine.format.catalog import BLOCK_BYTES
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.io.block_sums import BlockSums
from pytest_dcp._engine.io.tensor_memory import is_flat, pieces

PIECE_BYTES = 1 << 20
"""Bytes that are summed and hashed at a time: they stay in the second-level cache meanwhile."""

Data = torch.Tensor | bytes


class Hash(Protocol):
    """A hash being computed, as `hashlib` has them."""

    def update(self, data: Any, /) -> Any:
        """Append bytes."""

    def digest(self) -> bytes:
        """The hash of the bytes so far."""


def _hash_makers() -> dict[str, Callable[[], Hash]]:
    makers: dict[str, Callable[[], Hash]] = {}
    try:
        from blake3 import blake3
    except ImportError:
        pass
    else:
        makers["blake3"] = blake3
    makers["sha256"] = hashlib.sha256
    return makers


HASH_MAKERS = _hash_makers()
"""The functions that this process has, by name; the best first."""
BEST_HASH = next(iter(HASH_MAKERS))


def hash_block(data: Data, hash_name: str, copy_bytes: int = PIECE_BYTES) -> bytes:
    """The hash of a block. copy_bytes: as `sum_and_hash`."""
    running = HASH_MAKERS[hash_name]()
    for piece in _pieces(data, copy_bytes):
        running.update(piece)
    return running.digest()


def first_sum(data: Data) -> int:
    """The CRC-32 of the block's first `BLOCK_BYTES`, or of all if it is shorter."""
    crc, missing = 0, BLOCK_BYTES
    for piece in _pieces(data, BLOCK_BYTES):
        # A strided tensor comes in pieces of whole rows, which may be shorter.
        crc = crc32(piece[:missing], crc)
        missing -= min(missing, len(piece))
        if not missing:
            break
    return crc


def sum_and_hash(
    data: Data, hash_name: str, copy_bytes: int = PIECE_BYTES
) -> tuple[list[int], bytes]:
    """The checksums of a block, as `EntryPlaces.sums` has them, and its hash.

    copy_bytes: of a tensor outside flat CPU memory, copied at a time.

    >>> sums, digest = sum_and_hash(b"abc", "sha256")
    >>> hex(sums[0]), digest.hex()[:8]
    ('0x352441c2', 'ba7816bf')
    """
    running, sums = HASH_MAKERS[hash_name](), BlockSums()
    for piece in _pieces(data, copy_bytes):
        sums.update(piece)
        running.update(piece)
    return sums.finish(), running.digest()


def _pieces(data: Data, nbytes: int) -> Iterable[memoryview]:
    if isinstance(data, torch.Tensor):
        # Only a tensor that must be copied is worth pieces that do not fit the cache.
        return pieces(data, min(nbytes, PIECE_BYTES) if is_flat(data) else nbytes)
    view = memoryview(data)
    return (view[at : at + nbytes] for at in range(0, len(view), nbytes))
