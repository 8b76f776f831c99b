"""Damage at rest: each function makes the damage it names; the generators cover all of them."""

from __future__ import annotations

import pytest

from pytest_dcp.faults.damage import (
    every_bit,
    every_sector,
    every_truncation,
    fill_sector,
    flip_bit,
    swap_sectors,
    truncate,
)

DATA = bytes(range(256)) * 5
"""Two sectors of 512 bytes and a half."""


@pytest.mark.parametrize("offset", [0, 1, 700, len(DATA) - 1])
def test_a_flipped_bit_is_the_only_difference(offset: int) -> None:
    for bit in range(8):
        damaged = flip_bit(DATA, offset, bit)
        assert int.from_bytes(damaged, "little") ^ int.from_bytes(DATA, "little") == 1 << (
            8 * offset + bit
        )


def test_every_bit_is_flipped_once() -> None:
    found = [int.from_bytes(damaged.data, "little") for damaged in every_bit(b"\x00\x00\x00")]
    assert found == [1 << bit for bit in range(24)]
    assert [one.what for one in every_bit(b"ab", 9)] == [
        "bit 0 of byte 0 flipped", "bit 1 of byte 1 flipped",
    ]  # fmt: skip
    assert list(every_bit(b"")) == []


def test_every_shorter_length_comes_once() -> None:
    assert [damaged.data for damaged in every_truncation(b"abc")] == [b"", b"a", b"ab"]
    assert truncate(b"abc", -1) == b"ab"


@pytest.mark.parametrize("size", [512, 4096, 100])
def test_every_sector_is_filled_and_swapped(size: int) -> None:
    found = {damaged.what: damaged.data for damaged in every_sector(DATA, (b"\0", b"ab"), size)}
    sectors = -(-len(DATA) // size)
    assert len(found) == 2 * sectors + max(len(DATA) // size - 1, 0)
    for what, data in found.items():
        assert len(data) == len(DATA)
        changed = [n for n in range(len(DATA)) if data[n] != DATA[n]]
        first = int(what.split()[1]) * size
        assert all(first <= n < first + 2 * size for n in changed)


def test_a_filled_sector_is_full_of_its_filler() -> None:
    assert fill_sector(b"abcdef", 1, b"xyz", 4) == b"abcdxy"


def test_swapped_sectors_are_in_each_others_place() -> None:
    assert swap_sectors(b"aabbccd", 2, 0, 2) == b"ccbbaad"
    assert swap_sectors(b"aabb", 1, 1, 2) == b"aabb"


def test_bytes_past_the_end_cannot_be_damaged() -> None:
    with pytest.raises(IndexError, match="byte 3 of 3 bytes"):
        flip_bit(b"abc", 3)
    with pytest.raises(IndexError, match="sector 1 of 3 bytes"):
        fill_sector(b"abc", 1)
    with pytest.raises(IndexError, match="no whole sectors 0 and 1 of 2"):
        swap_sectors(b"abc", 0, 1, 2)
