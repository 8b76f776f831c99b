"""The page table: the sums of pages, and what damage to it looks like."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.format import page_table
from pytest_dcp._engine.format.page_table import FOOT_BYTES, PageTable
from pytest_dcp.errors import CheckpointCorruptError

PAGE = page_table.LEAST_PAGE_BYTES


@given(st.integers(1, 3 * PAGE + 1), st.integers(0, 255))
def test_each_page_is_checked_by_its_own_sum(length: int, byte: int) -> None:
    manifest = bytes((byte + n) % 256 for n in range(length))
    table = PageTable.of(manifest, PAGE)
    assert table.sums == tuple(zlib.crc32(manifest[: n + PAGE]) for n in range(0, length, PAGE))
    for number, start in enumerate(range(0, length, PAGE)):
        page = bytearray(manifest[start : start + PAGE])
        table.check_page(number, memoryview(page), start)
        page[len(page) // 2] ^= 1
        with pytest.raises(CheckpointCorruptError, match=f"page {number} of the manifest") as found:
            table.check_page(number, memoryview(page), start)
        assert found.value.offset == start


def test_a_packed_table_is_unpacked_again() -> None:
    table = PageTable.of(bytes(3 * PAGE - 1), PAGE)
    packed = memoryview(table.pack())
    assert len(packed) == page_table.packed_length(3 * PAGE - 1, PAGE)
    length = page_table.length_in_foot(packed[-FOOT_BYTES:], len(packed), 3 * PAGE - 1)
    assert length == len(packed)
    assert PageTable.unpack(packed, 3 * PAGE - 1, len(packed)) == table


def test_a_changed_bit_of_the_table_is_noticed_unless_it_hides_the_table() -> None:
    manifest_bytes = 3 * PAGE - 1
    packed = PageTable.of(bytes(manifest_bytes), PAGE).pack()
    hidden = noticed = 0
    for at in range(8 * len(packed)):
        changed = bytearray(packed)
        changed[at // 8] ^= 1 << at % 8
        view = memoryview(changed)
        try:
            length = page_table.length_in_foot(view[-FOOT_BYTES:], len(view), manifest_bytes)
            if length is None:
                hidden += 1
                continue
            PageTable.unpack(view[len(view) - length :], manifest_bytes, len(view))
        except CheckpointCorruptError:
            noticed += 1
    assert noticed + hidden == 8 * len(packed)
    assert hidden == 8 * len(page_table.MAGIC)


@pytest.mark.parametrize("page_bytes", [0, 1, 64, PAGE - 1])
def test_a_table_of_tiny_pages_is_refused(page_bytes: int) -> None:
    foot = struct.pack("<II8s", page_bytes, 0, page_table.MAGIC)
    with pytest.raises(CheckpointCorruptError, match=f"got pages of {page_bytes}"):
        page_table.length_in_foot(memoryview(foot), 1 << 40, 1 << 30)


def test_a_table_longer_than_the_bytes_before_its_end_is_refused() -> None:
    foot = struct.pack("<II8s", PAGE, 0, page_table.MAGIC)
    with pytest.raises(CheckpointCorruptError, match="lies in the 100 bytes before"):
        page_table.length_in_foot(memoryview(foot), 100, 1 << 30)


def test_a_short_manifest_has_no_table() -> None:
    short = page_table.TABLE_FROM_BYTES - 1
    assert page_table.make_table(bytes(short)) is None
    assert page_table.table_bytes(short) == 0
    table = page_table.make_table(bytes(short + 1))
    assert table is not None
    assert len(table.pack()) == page_table.table_bytes(short + 1)
