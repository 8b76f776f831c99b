"""Large manifests: opened without their chunks, right or refused whatever is read of them."""

from __future__ import annotations

import contextlib
import copy
import pickle
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray

from pytest_dcp._engine.format import manifest_columns, metadata_file, paged_catalog
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.catalog_selection import select_keys
from pytest_dcp._engine.format.paged_catalog import PagedIndex, PagedManifest, select_part
from pytest_dcp._engine.plan.index import Index
from pytest_dcp.errors import CheckpointCorruptError
from support.catalogs import Sample, same, samples
from support.forks import forked
from support.paged_catalogs import (
    CHUNKS,
    KEYS,
    PAGE,
    FileInMemory,
    add_table,
    encode_paged,
    many_chunks,
)

TRUTH = many_chunks()
DATA = encode_paged(TRUTH)
KEYS_OF_MOST = KEYS // 3
ALL_KEYS = range(len(TRUTH.index))


def opened(data: bytes | bytearray = DATA) -> Catalog:
    return manifest_of(FileInMemory(data)).catalog()


def manifest_of(file: FileInMemory) -> PagedManifest:
    manifest = file.open()
    assert manifest is not None
    manifest.file = ".metadata"
    return manifest


def part_of(catalog: Catalog, key: int) -> Catalog:
    return select_part(catalog, np.array([key]))


def is_right(part: Catalog, key: int) -> bool:
    expected = select_keys(TRUTH, np.array([key]))
    return same(part, expected)


def bounds(data: bytes) -> tuple[int, int, int]:
    """Where the pickle, with the table, ends, and the manifest begins and ends."""
    start, length, stock = struct.unpack_from("<QQQ", data, len(data) - 32)
    return stock, start, start + length


def test_the_whole_catalog_equals_the_written_one() -> None:
    assert same(opened(), TRUTH)
    assert same(metadata_file.decode(DATA), TRUTH)
    metadata_file.verify_pickle(DATA)


@given(samples())
def test_any_catalog_is_the_same_by_pages_as_a_whole(sample: Sample) -> None:
    data = encode_paged(sample.catalog)
    file = FileInMemory(data)
    manifest = file.open()
    whole = metadata_file.decode(data)
    if manifest is None:
        assert whole.places.transforms or b'["pickle"]' in data
        return
    catalog = manifest.catalog()
    with patch.object(paged_catalog, "WHOLE_FROM_PART", 2.0):
        for key, fqn in enumerate(whole.index.fqns):
            assert catalog.index.find_row(fqn) == key
            assert same(part_of(catalog, key), select_keys(whole, np.array([key])))
    assert same(catalog, whole)


def test_torch_reads_the_pickle_before_the_table() -> None:
    stock = pickle.loads(DATA)
    assert stock.state_dict_metadata == dict(TRUTH.metadata().state_dict_metadata)


def test_a_file_without_a_table_is_left_to_the_other_reader() -> None:
    assert FileInMemory(WITHOUT_TABLE).open() is None
    assert FileInMemory(add_table(WITHOUT_TABLE)).open() is not None
    assert FileInMemory(pickle.dumps(TRUTH.metadata())).open() is None


@pytest.mark.parametrize("key", ALL_KEYS)
def test_a_part_is_that_of_the_whole_catalog(key: int) -> None:
    assert is_right(part_of(opened(), key), key)


def test_several_keys_in_any_order_are_one_part() -> None:
    keys = np.array([7, KEYS, 0, KEYS + 1])
    assert same(select_part(opened(), keys), select_keys(TRUTH, keys))


def test_opening_and_a_part_read_few_pages() -> None:
    file = FileInMemory(DATA)
    catalog = manifest_of(file).catalog()
    _, start, end = bounds(DATA)
    in_opening = file.bytes_read
    assert in_opening < (end - start) / 20
    part_of(catalog, 3)
    columns = 9
    assert file.bytes_read - in_opening <= 2 * columns * PAGE
    once = file.bytes_read
    part_of(catalog, 3)
    assert file.bytes_read == once


def test_a_quarter_of_the_pages_leads_to_all() -> None:
    file, completed = FileInMemory(DATA), []
    manifest = manifest_of(file)
    manifest.on_complete = lambda: completed.append(True)
    catalog = manifest.catalog()
    for key in ALL_KEYS:
        assert is_right(part_of(catalog, key), key)
    assert completed == [True]
    _, start, end = bounds(DATA)
    assert file.bytes_read < 2 * (end - start)


def test_keys_of_most_chunks_are_read_with_all() -> None:
    completed = []
    manifest = manifest_of(FileInMemory(DATA))
    manifest.on_complete = lambda: completed.append(True)
    keys = np.arange(KEYS_OF_MOST)
    assert same(select_part(manifest.catalog(), keys), select_keys(TRUTH, keys))
    assert completed


def test_copies_have_their_columns() -> None:
    for made in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        catalog = opened()
        index = made(catalog.index)
        assert type(index) is Index
        assert same(replace(catalog, index=index, places=made(catalog.places)), TRUTH)
    catalog = opened()
    other = replace(catalog.index, size=catalog.index.size + 1)
    assert (other.offset == TRUTH.index.offset).all()
    changed = replace(catalog, index=other)
    assert (part_of(changed, 3).index.size == TRUTH.index.size[3] + 1).all()


def test_other_attributes_are_missing_as_usual() -> None:
    index = opened().index
    assert isinstance(index, PagedIndex)
    assert not hasattr(index, "start")
    assert not hasattr(index, "nothing")


def test_threads_read_the_parts_that_they_ask_for() -> None:
    catalog = opened()
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda key: part_of(catalog, key), [*ALL_KEYS] * 3))
    assert all(is_right(part, key) for part, key in zip(parts, [*ALL_KEYS] * 3, strict=True))


def test_the_end_of_the_last_chunk_of_a_page_lies_on_the_next() -> None:
    """A chunk's sums end where those of the next one begin: one row more is read of this column."""
    key = 5
    _, start, _ = bounds(DATA)
    at = DATA.index(TRUTH.places.first_sum.tobytes()) - start + (key + 1) * CHUNKS * 8
    names = (*TRUTH.index.fqns[:-1], "n" * (len("nothing") + -at % PAGE))
    moved = replace(TRUTH, index=replace(TRUTH.index, fqns=names))
    data = encode_paged(moved)
    _, start, _ = bounds(data)
    again = data.index(TRUTH.places.first_sum.tobytes()) - start + (key + 1) * CHUNKS * 8
    assert again % PAGE == 0
    assert is_right(part_of(opened(data), key), key)


def test_a_forked_process_reads_though_a_thread_of_its_parent_was_reading() -> None:
    manifest = manifest_of(FileInMemory(DATA))
    catalog = manifest.catalog()
    before = part_of(catalog, 1)
    with manifest._one_at_a_time():
        assert forked(lambda begin: is_right(part_of(catalog, 5), 5), limit_s=60)
    assert same(part_of(catalog, 1), before)


def test_a_forked_process_does_not_write_into_the_pages_of_its_parent() -> None:
    file = FileInMemory(bytearray(DATA))
    manifest = manifest_of(file)

    def read_other_bytes(begin: Callable[[str], None]) -> bool:
        file.data = bytes(len(DATA))
        with pytest.raises(CheckpointCorruptError):
            part_of(manifest.catalog(), 5)
        return True

    assert manifest._pages is not None
    view = manifest._pages.view
    before = bytes(view)
    assert forked(read_other_bytes, limit_s=60)
    assert bytes(view) == before


# ---- damage


def test_a_byte_changed_before_the_manifest_changes_no_value() -> None:
    """It is refused, or nothing looks at it but `verify_pickle`."""
    stock, start, _ = bounds(DATA)
    table = len(DATA[: DATA.rindex(b".", 0, stock - 100)])
    assert DATA[stock - 8 : stock] == b"\x89DCPpag\n"
    for at in range(max(table - 5, 0), start):
        changed = bytearray(DATA)
        changed[at] ^= 1 << at % 8
        try:
            manifest = FileInMemory(changed).open()
        except CheckpointCorruptError:
            continue
        assert at < stock, "the zeros behind the table are checked"
        if manifest is None:
            assert stock - 8 <= at < stock, "only a damaged magic hides the table"
            assert same(metadata_file.decode(changed), TRUTH)
        else:
            assert is_right(part_of(manifest.catalog(), at % KEYS_OF_MOST), at % KEYS_OF_MOST)
        with pytest.raises(CheckpointCorruptError):
            metadata_file.verify_pickle(changed)


def test_a_damaged_page_is_named_when_it_is_touched() -> None:
    """And keys that lie on other pages can still be read."""
    _, start, end = bounds(DATA)
    pages = -(-(end - start) // PAGE)
    refused_openings, readable = 0, []
    for number in range(0, pages, 2):
        low = start + number * PAGE
        at = low + (min(PAGE, end - low) * 5) // 7
        changed = bytearray(DATA)
        changed[at] ^= 16
        try:
            catalog = opened(changed)
        except CheckpointCorruptError as error:
            check_names_page(error, number, low)
            refused_openings += 1
            continue
        whole_keys = []
        for key in ALL_KEYS:
            try:
                assert is_right(part_of(catalog, key), key)
                whole_keys.append(key)
            except CheckpointCorruptError as error:
                check_names_page(error, number, low, ".metadata")
        readable.append(len(whole_keys))
        with pytest.raises(CheckpointCorruptError, match="of the manifest") as found:
            _ = catalog.index.offset
        assert found.value.file == ".metadata"
    assert refused_openings <= 2, "the header, the keys and the paths"
    # Each other page has chunks of some keys, a whole column's at most.
    assert 0 < min(readable) <= max(readable) < len(ALL_KEYS)
    assert sum(readable) > len(readable) * len(ALL_KEYS) * 2 // 3


def check_names_page(
    error: CheckpointCorruptError, number: int, low: int, file: str | None = None
) -> None:
    assert f"page {number} of the manifest" in error.reason
    assert (error.offset, error.file) == (low, file)


def test_a_damaged_manifest_is_read_as_a_whole_only_once() -> None:
    _, start, end = bounds(DATA)
    changed = bytearray(DATA)
    changed[(start + end) // 2] ^= 1
    file = FileInMemory(changed)
    catalog = manifest_of(file).catalog()
    right = 0
    for key in ALL_KEYS:
        with contextlib.suppress(CheckpointCorruptError):
            right += is_right(part_of(catalog, key), key)
    assert right > len(ALL_KEYS) // 2
    assert file.bytes_read < 3 * (end - start)


def test_a_file_cut_off_after_it_was_opened_is_an_error() -> None:
    file = FileInMemory(DATA)
    catalog = manifest_of(file).catalog()
    _, start, end = bounds(DATA)
    file.data = DATA[: start + (end - start) // 2]
    with pytest.raises(CheckpointCorruptError, match="cut off"):
        part_of(catalog, KEYS - 1)
    with pytest.raises(CheckpointCorruptError, match="CRC-32"):
        _ = catalog.places.sums


def test_a_file_written_over_after_it_was_opened_is_an_error() -> None:
    file = FileInMemory(DATA)
    catalog = manifest_of(file).catalog()
    places = replace(TRUTH.places, start=TRUTH.places.start + 8)
    file.data = encode_paged(replace(TRUTH, places=places))
    assert len(file.data) == len(DATA)
    with pytest.raises(CheckpointCorruptError, match="page"):
        part_of(catalog, KEYS - 1)


# ---- hostile files: checksums are right, numbers are wrong


WITHOUT_TABLE = b"".join(metadata_file.encode(TRUTH))


def encode_hostile(catalog: Catalog) -> bytes:
    """A file with the manifest of a catalog that breaks rules, and an honest pickle."""
    return add_table(WITHOUT_TABLE, manifest_columns.encode(catalog))


def changed_at(column: NDArray[Any], row: int, value: int) -> NDArray[Any]:
    changed = column.copy()
    changed[row] = value
    return changed


HUGE = (1 << 63) - 1
ROW = 3 * CHUNKS + 7  # the eighth chunk of the fourth key


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("index", "offset", -1),
        ("index", "offset", HUGE),
        ("index", "shape", 99),
        ("places", "file", 2),
        ("places", "start", -5),
        ("places", "length", HUGE),
        ("places", "data_start", 5),
        ("places", "data_nbytes", 17),
        ("places", "first_sum", 0),
        ("places", "first_sum", -1),
        ("places", "first_sum", HUGE),
        ("places", "first_sum", -HUGE - 1),
    ],
)
def test_a_wrong_number_is_refused_with_its_key(table: str, column: str, value: int) -> None:
    source: Any = getattr(TRUTH, table)
    bad = replace(source, **{column: changed_at(getattr(source, column), ROW, value)})
    hostile = replace(TRUTH, **{table: bad})
    catalog = opened(encode_hostile(hostile))
    for key in (0, 1, 2, 4, 5):
        assert is_right(part_of(catalog, key), key)
    with pytest.raises(CheckpointCorruptError) as found:
        part_of(catalog, 3)
    assert found.value.entry == "layers.3.weight"
    with pytest.raises(CheckpointCorruptError):
        _ = catalog.places.file


@pytest.mark.parametrize("shift", [-(1 << 20), 1 << 40, HUGE // 2, 1 - HUGE])
def test_sums_outside_of_the_column_are_refused(shift: int) -> None:
    first_sum = TRUTH.places.first_sum.copy()
    first_sum[3 * CHUNKS : 4 * CHUNKS + 1] += shift
    first_sum[0] = 0
    hostile = replace(TRUTH, places=replace(TRUTH.places, first_sum=first_sum))
    with pytest.raises(CheckpointCorruptError, match="first sums of its chunks") as found:
        part_of(opened(encode_hostile(hostile)), 3)
    assert found.value.entry == "layers.3.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda index: replace(index, first=changed_at(index.first, 3, HUGE)),
        lambda index: replace(index, first=changed_at(index.first, 3, -1)),
        lambda index: replace(index, ndim=changed_at(index.ndim, 3, 3)),
        lambda index: replace(index, property_of=changed_at(index.property_of, 3, 1)),
        lambda index: replace(index, fqns=('"', "", *index.fqns[2:-1], '"')),
        lambda index: replace(index, fqns=index.fqns[1:]),
    ],
)
def test_wrong_keys_are_refused_at_the_opening(change: Callable[[Index], Index]) -> None:
    with pytest.raises(CheckpointCorruptError):
        opened(encode_hostile(replace(TRUTH, index=change(TRUTH.index))))


def test_too_few_names_are_refused_at_the_opening() -> None:
    index = replace(TRUTH.index, fqns=TRUTH.index.fqns[1:])
    hostile = encode_hostile(replace(TRUTH, index=index, planner_data=None))
    with pytest.raises(CheckpointCorruptError, match=f"{KEYS + 1} names for {KEYS + 2} keys"):
        opened(hostile)


@pytest.mark.parametrize("rows", [(0, 1), (0, KEYS + 1), (7, 8), (3, KEYS)])
def test_a_name_that_is_there_twice_is_refused_when_it_is_touched(rows: tuple[int, int]) -> None:
    fqns = list(TRUTH.index.fqns)
    fqns[rows[1]] = twice = fqns[rows[0]]
    hostile = encode_hostile(replace(TRUTH, index=replace(TRUTH.index, fqns=tuple(fqns))))
    index = opened(hostile).index
    assert index.find_row("layers.20.weight") == 20
    for touch in (
        lambda index: index.find_row(twice),
        lambda index: index.fqns,
        lambda index: index.row_of,
    ):
        with pytest.raises(CheckpointCorruptError, match="once, got it twice") as found:
            touch(opened(hostile).index)
        assert (found.value.entry, found.value.file) == (twice, ".metadata")


def test_names_that_are_no_utf8_are_refused_when_they_are_touched() -> None:
    data = bytearray(manifest_columns.encode(TRUTH))
    data[data.index(b"layers.7.weight")] = 0xFF
    hostile = add_table(WITHOUT_TABLE, bytes(data))
    assert is_right(part_of(opened(hostile), 3), 3)
    with pytest.raises(CheckpointCorruptError, match="expected a name"):
        part_of(opened(hostile), 7)
    with pytest.raises(CheckpointCorruptError, match="expected names"):
        _ = opened(hostile).index.fqns
    with pytest.raises(CheckpointCorruptError, match="expected a name"):
        dict(opened(hostile).planner_data)


def test_a_path_that_does_not_fit_its_name_is_refused_when_it_is_used() -> None:
    data = bytearray(manifest_columns.encode(TRUTH))
    at = data.index(b"layers.7.weight")
    data[at : at + 15] = b"layers_7.weight"
    catalog = opened(add_table(WITHOUT_TABLE, bytes(data)))
    assert catalog.planner_data["layers.3.weight"] == ("layers", 3, "weight")
    with pytest.raises(CheckpointCorruptError, match="a form of 2 words"):
        catalog.planner_data["layers_7.weight"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a\0b"])
def test_a_data_file_outside_of_the_folder_is_refused_at_the_opening(name: str) -> None:
    places = replace(TRUTH.places, files=("__0_0.distcp", name))
    with pytest.raises(CheckpointCorruptError, match="inside the checkpoint's folder"):
        opened(encode_hostile(replace(TRUTH, places=places)))


def test_sums_of_pages_that_do_not_fit_the_manifest_are_refused() -> None:
    """Though table and trailer are consistent in themselves, as only malice can make them."""
    stock, start, end = bounds(DATA)
    changed = bytearray(DATA)
    length = 4 * -(-(end - start) // PAGE) + 16
    sums = slice(stock - length, stock - 16)
    changed[sums] = bytes(len(changed[sums]))
    struct.pack_into("<I", changed, stock - 12, zlib.crc32(changed[stock - length : stock - 12]))
    with pytest.raises(CheckpointCorruptError, match="page 0 of the manifest"):
        opened(changed)


def test_transforms_and_foreign_data_are_left_to_the_other_reader() -> None:
    with_transforms = replace(TRUTH.places, transforms={3: ("zstd",)})
    assert FileInMemory(encode_paged(replace(TRUTH, places=with_transforms))).open() is None
    assert FileInMemory(encode_paged(replace(TRUTH, planner_data={"x": [1.5]}))).open() is None
    assert FileInMemory(encode_paged(replace(TRUTH, further={"plans": [1]}))).open() is None
