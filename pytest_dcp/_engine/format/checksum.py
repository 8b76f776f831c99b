"""CRC-32, by the fastest means there is: isal's, some ten times faster than zlib's, or zlib's.

isal is installed with the package where there are wheels of it. The values are the same.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
