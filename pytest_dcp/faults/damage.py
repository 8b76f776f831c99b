"""Damage at rest: changes by disks, people and other saves to files that are not being written.

Pure (no I/O). The generators enumerate a whole class of damage, one `Damaged` after another, so
that a test can try it all.

>>> for damaged in every_truncation(b"abc"):
...     print(damaged.what, damaged.data)
cut to 0 bytes b''
cut to 1 bytes b'a'
cut to 2 bytes b'ab'
>>> flip_bit(b"a", 0, bit=1), fill_sector(b"abcd", 1, filler=b"-", size=2)
(b'c', b'ab--')
>>> swap_sectors(b"abcdef", 0, 2, size=2)
b'efcdab'
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SECTOR_BYTES = 512
"""The smallest unit that disks write; newer disks write 4096 bytes, eight of these."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """One damaged content."""

    what: str
    """For the message of a test: "bit 3 of byte 17 flipped"."""
    data: bytes


def flip_bit(data: bytes, offset: int, bit: int = 0) -> bytes:
    """The bytes with one bit flipped. Raises IndexError if it lies outside of them."""
    if not 0 <= offset < len(data):
        raise IndexError(f"byte {offset} of {len(data)} bytes cannot be flipped")
    return data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]


def truncate(data: bytes, nbytes: int) -> bytes:
    """The first `nbytes` bytes; a negative number cuts that many off the end."""
    return data[:nbytes]


def fill_sector(data: bytes, number: int, filler: bytes = b"\0", size: int = SECTOR_BYTES) -> bytes:
    """The bytes with one sector, or the part of it that exists, filled with `filler`."""
    start = number * size
    length = min(size, len(data) - start)
    if length <= 0:
        raise IndexError(f"sector {number} of {len(data)} bytes does not exist")
    return data[:start] + (filler * length)[:length] + data[start + length :]


def swap_sectors(data: bytes, one: int, other: int, size: int = SECTOR_BYTES) -> bytes:
    """The bytes with two whole sectors swapped."""
    low, high = sorted((one, other))
    if low < 0 or (high + 1) * size > len(data):
        raise IndexError(f"{len(data)} bytes have no whole sectors {one} and {other} of {size}")
    first, second = data[low * size : (low + 1) * size], data[high * size : (high + 1) * size]
    middle = data[(low + 1) * size : high * size]
    if low == high:
        return data
    return data[: low * size] + second + middle + first + data[(high + 1) * size :]


def every_bit(data: bytes, step: int = 1) -> Iterator[Damaged]:
    """The bytes with each bit in turn turned over; with `step`, every `step`-th bit.

    A prime step gives every position in a byte its turn.
    """
    for number in range(0, len(data) * 8, step):
        offset, bit = divmod(number, 8)
        yield Damaged(f"bit {bit} of byte {offset} flipped", flip_bit(data, offset, bit))


def every_truncation(data: bytes, step: int = 1) -> Iterator[Damaged]:
    """The bytes truncated to each shorter length."""
    for nbytes in range(0, len(data), step):
        yield Damaged(f"cut to {nbytes} bytes", truncate(data, nbytes))


def every_sector(
    data: bytes, fillers: tuple[bytes, ...] = (b"\0", b"\xff"), size: int = SECTOR_BYTES
) -> Iterator[Damaged]:
    """The bytes with each sector filled with each filler, and with each two neighbours swapped."""
    for number in range(-(-len(data) // size)):
        for filler in fillers:
            what = f"sector {number} full of {filler!r}"
            yield Damaged(what, fill_sector(data, number, filler, size))
    for number in range(len(data) // size - 1):
        what = f"sectors {number} and {number + 1} swapped"
        yield Damaged(what, swap_sectors(data, number, number + 1, size))
