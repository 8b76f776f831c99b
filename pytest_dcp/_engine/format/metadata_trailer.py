"""The trailer of a `.metadata` file: where pickle and manifest are, and the checksums of both.

48 bytes at the file's end, all numbers little-endian:

    magic             8
    format version    u4
    manifest          CRC-32 u4, offset u8, length u8
    pickle            length u8, CRC-32 u4
    trailer           CRC-32 u4 of the 44 bytes before it

Pure (no I/O). `metadata_file` describes the whole file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pytest_dcp._engine.format.checksum import check_crc, crc32
from pytest_dcp.errors import CheckpointCorruptError

MAGIC = b"\x89DCPend\n"
"""Like PNG's: it is not text, and any conversion of line ends damages it."""
FORMAT_VERSION = 1
BODY = struct.Struct("<8sIIQQQI")
_CRC = struct.Struct("<I")
TRAILER_BYTES = BODY.size + _CRC.size
ALIGNMENT = 64
"""Columns then start at multiples of 8 in memory when the file is mapped."""


@dataclass(frozen=True, slots=True)
class Trailer:
    """See the module for the bytes; offsets and lengths count from the file's start."""

    manifest_crc: int
    manifest_start: int
    manifest_length: int
    pickle_length: int
    pickle_crc: int

    def pack(self) -> bytes:
        """The 48 bytes."""
        body = BODY.pack(
            *(MAGIC, FORMAT_VERSION, self.manifest_crc, self.manifest_start),
            *(self.manifest_length, self.pickle_length, self.pickle_crc),
        )
        return body + _CRC.pack(crc32(body))


def read_trailer(tail: memoryview, at: int) -> Trailer:
    """The trailer in the file's last bytes, which begin at `at`."""
    body = tail[: BODY.size]
    check_crc("the trailer", body, _CRC.unpack_from(tail, BODY.size)[0], at)
    _, version, *numbers = BODY.unpack(body)
    if version != FORMAT_VERSION:
        raise CheckpointCorruptError(
            f"expected format version {FORMAT_VERSION}, got {version}: read it with the version of "
            "pytest-dcp that wrote it, or remove the file's end from the manifest on",
            offset=at,
        )
    return Trailer(*numbers)


def check_parts(trailer: Trailer, at: int) -> None:
    """Check that pickle, zeros, manifest and trailer make up the whole file."""
    length, start = trailer.pickle_length, trailer.manifest_start
    follow = start == length + -length % ALIGNMENT and start + trailer.manifest_length == at
    if not follow or start > at:
        raise CheckpointCorruptError(
            f"expected a pickle, zeros and a manifest that end at {at}, got a pickle of {length} "
            f"bytes and a manifest of {trailer.manifest_length} at {start}",
            offset=at,
        )


def check_gap(gap: memoryview, start: int) -> None:
    """Check that the bytes between pickle and manifest, from `start` on, are zeros."""
    if any(gap):
        raise CheckpointCorruptError("expected zeros between pickle and manifest", offset=start)
