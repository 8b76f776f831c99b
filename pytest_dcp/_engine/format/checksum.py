"""CRC-32, the checksum of everything in a checkpoint, and its comparison.

The fastest library installed computes it: isal, some ten times faster than zlib, or else zlib. The
package installs isal where it has wheels. The values are the same.

Which checksum covers what:

    manifest, and pickle for torch    the trailer of `.metadata`: `format.metadata_trailer`
    pages of a large manifest         the table behind the pickle: `format.page_table`
    blocks of a tensor's data         the manifest's `sums`: written by `io.write_files`, checked by
                                      `io.checked_ranges`
    an entry as torch reads it        its zip directory: `format.entry`, `format.zip_archive`
"""

from __future__ import annotations

from pytest_dcp.errors import CheckpointCorruptError

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["check_crc", "crc32"]


def check_crc(what: str, part: memoryview, expected: int, start: int, before: int = 0) -> None:
    """Check that the bytes have the expected checksum.

    what: their name in the error. start: their offset in the file. before: the checksum of the
    bytes before them, if the expected one covers these too.

    Raises CheckpointCorruptError with the offset if they differ.
    """
    actual = crc32(part, before)
    if actual != expected:
        raise CheckpointCorruptError(
            f"expected CRC-32 {expected:#010x} of {what} ({len(part)} bytes), got {actual:#010x}: "
            "the file is damaged",
            offset=start,
        )
