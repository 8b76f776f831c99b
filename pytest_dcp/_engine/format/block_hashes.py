"""Strong hashes of the blocks of a checkpoint, as its `.metadata` holds them. Pure (no I/O).

A block is the data of one chunk: a tensor's elements in row-major order, or the entry of a value.
Equal hashes of equal lengths mean equal bytes, so a later step of a run can refer to a block
of an earlier one (see `steps.incremental_writer`).

They are one more attribute of the Metadata, a dict of plain values. So they become part of the
checkpoint with its one rename, lie under its checksums, and are nothing to torch or to a reader
that does not know them:

    hash         the function's name, see `steps.block_hash`
    save         the save's id: a copy of the attribute in another checkpoint is not valid there
    since_full   incremental saves since one that was written in full; 0: this one was
    digests      32 bytes for each chunk, in the index's order; zeros: the chunk has no hash

>>> hashes = BlockHashes("sha256", "5f1d", 2, np.ones((3, DIGEST_BYTES), np.uint8))
>>> attribute = hashes.to_attribute()
>>> sorted(attribute), len(attribute["digests"])
(['digests', 'hash', 'save', 'since_full'], 96)
>>> BlockHashes.from_attribute(attribute, "5f1d", 3).since_full
2
>>> BlockHashes.from_attribute(attribute, "77aa", 3) is None  # it was copied from another save
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.format.catalog import Catalog

ATTRIBUTE = "pytest_dcp_block_hashes"
DIGEST_BYTES = 32
"""Of SHA-256 and BLAKE3."""
MAX_NAME_LENGTH = 32


@dataclass(frozen=True, slots=True, eq=False)
class BlockHashes:
    """The strong hashes of one checkpoint."""

    hash_name: str
    save_id: str
    since_full: int
    """Incremental saves since one that was written in full; 0: this one was."""
    digests: NDArray[np.uint8]
    """(chunks, DIGEST_BYTES); a row of zeros: the chunk has no hash."""

    def to_attribute(self) -> dict[str, Any]:
        """The value of the attribute."""
        return {
            "hash": self.hash_name,
            "save": self.save_id,
            "since_full": self.since_full,
            "digests": self.digests.tobytes(),
        }

    @staticmethod
    def from_attribute(value: Any, save_id: str | None, chunks: int) -> BlockHashes | None:
        """Inverse of `to_attribute`; None for anything else than hashes of this save.

        chunks: rows of the index.
        """
        if type(value) is not dict or value.keys() != {"hash", "save", "since_full", "digests"}:
            return None
        name, save, since_full, digests = (
            value[key] for key in ("hash", "save", "since_full", "digests")
        )
        if type(name) is not str or len(name) > MAX_NAME_LENGTH or save != save_id:
            return None
        if type(since_full) is not int or since_full < 0:
            return None
        if type(digests) is not bytes or len(digests) != chunks * DIGEST_BYTES:
            return None
        table = np.frombuffer(digests, dtype=np.uint8).reshape(chunks, DIGEST_BYTES)
        return BlockHashes(name, str(save), since_full, table)

    @staticmethod
    def of_catalog(catalog: Catalog) -> BlockHashes | None:
        """The hashes of a checkpoint; None if it was saved without them."""
        meta = catalog.storage_meta
        return BlockHashes.from_attribute(
            catalog.further.get(ATTRIBUTE),
            None if meta is None else meta.save_id,
            len(catalog.index.offset),
        )
