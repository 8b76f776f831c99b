"""How much memory the description of a checkpoint may take while it is read. Pure (no I/O).

A description says where tensors lie: `.metadata`, the header of a safetensors file, the index of a
Hugging Face folder. Neither its size nor that of a compressed value shows how much memory reading
it takes: a sparse file of 2 GiB occupies a few blocks, 3 bytes of JSON make a list of 64 bytes, 1
KiB of zstd expands to 1 MiB. So the memory is estimated before it is allocated, and compared with
the bytes that are really stored:

    limit = 64 MiB + 20 bytes for each byte stored

Honest descriptions take 1 byte (a manifest) to 11 bytes (safetensors headers of scalars) of memory
per byte stored. `max_decoded_bytes` of the storage reader raises the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_dcp.errors import CheckpointCorruptError

FREE_BYTES = 64 << 20
"""Memory allowed for a description of any size."""
BYTES_PER_STORED_BYTE = 20
"""About twice the memory that an honest description needs at most."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The most memory that reading one description may take."""

    at_most_bytes: int | None = None
    """None: in proportion to the bytes stored, as the module says."""

    def __post_init__(self) -> None:
        if self.at_most_bytes is not None and self.at_most_bytes <= 0:
            raise ValueError(
                f"max_decoded_bytes must be a positive number of bytes, got {self.at_most_bytes}"
            )

    def of(self, stored_bytes: int) -> int:
        """The limit for a description that occupies this many bytes of storage."""
        if self.at_most_bytes is not None:
            return self.at_most_bytes
        return FREE_BYTES + BYTES_PER_STORED_BYTE * stored_bytes

    def check(self, what: str, needed_bytes: int, stored_bytes: int) -> None:
        """Raise CheckpointCorruptError if reading `what` needs more than the limit."""
        limit = self.of(stored_bytes)
        if needed_bytes > limit:
            raise CheckpointCorruptError(
                f"expected {what} that takes at most {limit} bytes of memory, since {stored_bytes} "
                f"bytes are stored, got one that takes {needed_bytes}: do not load this file, or "
                "raise max_decoded_bytes of the storage reader if you trust it"
            )


DEFAULT_LIMIT = MemoryLimit()


def estimate_json_bytes(text: bytes | memoryview) -> int:
    """An upper estimate of the memory that `json.loads` takes for this text, from the tokens that
    make objects.

    Sizes are those of CPython on 64 bits: a list of one item takes 88 bytes, a dict of one 232, a
    string 49 and its characters, an int 28 to 32, and each a slot of 8 in its container. Tokens
    within strings count too, so names with many brackets or commas are overestimated.
    """
    count = bytes(text).count
    lists, dicts, pairs = count(b"["), count(b"{"), count(b":")
    strings, items = count(b'"') // 2, count(b",")
    return 64 * lists + 240 * dicts + 64 * pairs + 56 * strings + 40 * items + 2 * len(text)
