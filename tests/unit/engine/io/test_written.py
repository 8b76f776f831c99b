import io
import pickle
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.format.catalog import EntryPlaces, index_key
from pytest_dcp._engine.format.python_values import encode_value
from pytest_dcp._engine.format.write_results import (
    WriteColumns,
    WriteResults,
    places_of,
    whole_places_of,
)
from pytest_dcp._engine.io import block_sums as block_sums_module
from pytest_dcp._engine.io import write_files as write
from pytest_dcp._engine.io.block_sums import block_sums
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.local_file import LocalOut
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.write_files import (
    FileJob,
    Settings,
    WriteRequest,
    balance_by_bytes,
    write_files,
)
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.save import concatenate_tables
from pytest_dcp.errors import PlanError
from support.tilings import fewer, shapes, shard_item, value_item

BLOCK = 16


@st.composite
def saves(draw) -> tuple[list[WriteItem], list]:
    """Items and the data of each: tensors in any memory, values."""
    items, data = [], []
    for n in range(draw(st.integers(0, 5))):
        if not draw(st.integers(0, 2)):
            items.append(value_item(f"v{n}"))
            data.append(encode_value(draw(st.lists(st.text(max_size=9)))))
            continue
        size = draw(shapes(max_dims=3, max_side=6))
        dtype = draw(st.sampled_from([torch.float32, torch.int8, torch.float64]))
        tensor = (torch.arange(torch.Size(size).numel()) % 100).to(dtype).reshape(size)
        if draw(st.booleans()) and size:
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        items.append(shard_item(f"w{n}", size, ((0,) * len(size), size), dtype))
        data.append(tensor)
    return items, data


def written_to(folder: Path, items: list, data: list, files: int = 1, threads: int = 1):
    """The items' table with hints, their index, where they went, and who watched."""
    (table,), index = concatenate_tables([WriteItems.of(items)])
    jobs = [
        FileJob(f"f{n}", rows) for n, rows in enumerate(balance_by_bytes(table.size_bytes(), files))
    ]
    watcher = Observer("save")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in [("BLOCK_BYTES", BLOCK), ("PIECE_BYTES", 24), ("WRITE_BYTES", 100)]:
            patch.setattr(write, name, value)
        patch.setattr(block_sums_module, "BLOCK_BYTES", BLOCK)
        settings = Settings(sync=False, threads=threads, copy_ahead_bytes=20)
        written = write_files(
            WriteRequest(Folder(LocalDisk(), folder), jobs, data.__getitem__, settings, watcher)
        )
    return table, index, written, watcher


@given(saves(), st.integers(1, 3), st.integers(1, 3))
@fewer(4)
def test_every_entry_is_one_that_torch_loads_with_the_sums_of_its_data(save, files, threads):
    items, data = save
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, _, written, watcher = written_to(folder, items, data, files, threads)
        contents = {file: (folder / file).read_bytes() for file in written.files}
    used = dict.fromkeys(contents, 0)
    for row in np.lexsort((written.start, written.file)).tolist():
        file = written.files[written.file[row]]
        start, length = int(written.start[row]), int(written.length[row])
        assert start == used[file]
        used[file] += length
        entry = contents[file][start : start + length]
        low = int(written.data_start[row])
        stored = contents[file][low : low + int(written.data_nbytes[row])]
        if isinstance(data[row], torch.Tensor):
            found = torch.load(io.BytesIO(entry), weights_only=True)
            assert found.dtype == data[row].dtype
            assert torch.equal(found, data[row])
            assert stored == data[row].contiguous().numpy().tobytes()
        else:
            assert entry == stored == data[row]
        sums = written.sums[written.first_sum[row] : written.first_sum[row + 1]].tolist()
        expected = [crc32(stored[: at + BLOCK]) for at in range(0, len(stored), BLOCK)]
        # Sums of values are taken in one go, in blocks of the same size.
        assert sums == expected
    assert used == {file: len(content) for file, content in contents.items()}
    assert watcher.done_bytes == sum(d.nbytes for d in data if isinstance(d, torch.Tensor))


@pytest.mark.parametrize("step", [1 << 19, 1 << 20])
def test_writes_end_with_pages_though_a_planner_uses_memory_again(step, tmp_path, monkeypatch):
    ends: list[int] = []
    real = LocalOut.write

    def noted(self, buffers):
        ends.append((ends or [0])[-1] + sum(map(len, buffers)))
        real(self, buffers)

    monkeypatch.setattr(LocalOut, "write", noted)
    monkeypatch.setattr(write, "WRITE_BYTES", 1 << 19)
    monkeypatch.setattr(write, "HUGE_FROM_BYTES", 1 << 24)
    monkeypatch.setattr(write, "HUGE_PAGE_BYTES", 1 << 20)
    monkeypatch.setattr(write, "PIECE_BYTES", 1 << 18)
    counts = [300_000, 5, 70_000, 40_000, 1, 150_000]
    items = [shard_item(f"w{n}", (count,), ((0,), (count,))) for n, count in enumerate(counts)]
    (table,), _ = concatenate_tables([WriteItems.of(items)])
    scratch = torch.empty(max(counts))

    def source(row: int) -> torch.Tensor:
        scratch.fill_(row + 1)
        return scratch[: counts[row]]

    job = FileJob("f", range(len(items)), 1 << 24 if step == 1 << 20 else 0)
    watcher = Observer("save")
    written = write_files(
        WriteRequest(Folder(LocalDisk(), tmp_path), [job], source, Settings(sync=False), watcher)
    )
    content = (tmp_path / "f").read_bytes()
    for row, count in enumerate(counts):
        low = int(written.data_start[row])
        stored = np.frombuffer(content, np.float32, count, low)
        assert (stored == row + 1).all()
    assert ends[-1] == len(content) > len(table)
    assert len(ends) == len(content) // step + 1
    assert [end % step for end in ends[:-1]] == [0] * (len(ends) - 1)
    assert watcher.done_bytes == 4 * sum(counts)


def test_the_end_of_a_large_value_does_not_hold_all_of_it(tmp_path):
    items = [value_item("a"), value_item("b"), value_item("c")]
    (table,), _ = concatenate_tables([WriteItems.of(items)])
    sizes = [5 << 20, 100, 5 << 20]
    job = FileJob("f", range(len(table)))
    tracemalloc.start()
    try:
        write_files(
            WriteRequest(
                Folder(LocalDisk(), tmp_path),
                [job],
                lambda row: bytes(sizes[row]),
                Settings(sync=False),
                Observer("save"),
            ),
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sizes[0] <= peak < sizes[0] + 2 * write.WRITE_BYTES


@given(saves(), st.integers(1, 3))
@fewer(4)
def test_results_look_like_a_list_of_those_of_torch(save, files):
    items, data = save
    with tempfile.TemporaryDirectory() as folder:
        table, _, written, _ = written_to(Path(folder), items, data, files)
    results = WriteResults(table, written)
    expected = [
        WriteResult(
            item.index,
            int(written.length[row]),
            _StorageInfo(
                written.files[written.file[row]], int(written.start[row]), int(written.length[row])
            ),
        )
        for row, item in enumerate(items)
    ]
    assert list(results) == expected
    assert len(results) == len(expected)
    assert results[::-1] == expected[::-1]
    assert [results[n] for n in range(-len(expected), 0)] == expected
    assert list(WriteResults(items, written)) == expected
    assert list(pickle.loads(pickle.dumps(results))) == expected


@given(saves(), st.integers(1, 3), st.data())
@fewer(4)
def test_places_are_where_each_rank_says_that_its_items_are(save, ranks, data):
    items, values = save
    owner = [data.draw(st.integers(0, ranks - 1)) for _ in items]
    parts = [[n for n, rank in enumerate(owner) if rank == at] for at in range(ranks)]
    tables, index = concatenate_tables([WriteItems.of([items[n] for n in rows]) for rows in parts])
    results, expected = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for rank, (rows, table) in enumerate(zip(parts, tables, strict=True)):
            _, _, written, _ = written_to(Path(folder), list(table), [values[n] for n in rows])
            written = replace(written, files=tuple(f"__{rank}_{file}" for file in written.files))
            results.append(WriteResults(table, written))
            expected |= {result.index: result.storage_data for result in results[-1]}
    for form in (results, [list(part) for part in results]):
        places = places_of(index, form)
        for row in range(len(index.offset)):
            info = expected[index_key(index, row)]
            assert places.files[places.file[row]] == info.relative_path
            assert (places.start[row], places.length[row]) == (info.offset, info.length)
    places = places_of(index, results)
    sums = {
        key: part.written.sums[part.written.first_sum[n] : part.written.first_sum[n + 1]].tolist()
        for part in results
        for n, key in enumerate(result.index for result in part)
    }
    for row in range(len(index.offset)):
        mine = places.sums[places.first_sum[row] : places.first_sum[row + 1]].tolist()
        assert mine == sums[index_key(index, row)]


def results_of(items: list[WriteItem], hints: bool = True) -> WriteResults:
    table = concatenate_tables([WriteItems.of(items)])[0][0] if hints else WriteItems.of(items)
    count = len(items)
    column = np.arange(count, dtype=np.int64)
    written = WriteColumns(
        files=("f",),
        file=np.zeros(count, np.int32),
        start=column,
        length=column + 1,
        data_start=column,
        data_nbytes=column,
        first_sum=np.zeros(count + 1, np.int64),
        sums=np.zeros(0, np.uint32),
    )
    return WriteResults(table, written)


def halves(fqn: str) -> list[WriteItem]:
    return [shard_item(fqn, (4,), box) for box in [((0,), (2,)), ((2,), (2,))]]


def test_wrong_hints_are_corrected_by_the_offsets():
    items = halves("w")
    _, index = concatenate_tables([WriteItems.of(items)])
    results = results_of(items)
    turned = results.items.take(np.array([0, 1]), np.array([1, 0]))
    places = places_of(index, [WriteResults(turned, results.written)])
    assert places.start.tolist() == [0, 1]


def test_an_item_that_was_not_written_has_no_place():
    items = halves("w")
    _, index = concatenate_tables([WriteItems.of(items)])
    places = places_of(index, [results_of(items[1:], hints=False)])
    assert places.file.tolist() == [-1, 0]
    assert places.start.tolist() == [-1, 0]


@pytest.mark.parametrize("form", [lambda part: part, list])
def test_an_item_that_two_ranks_wrote_is_named(form):
    items = halves("w")
    _, index = concatenate_tables([WriteItems.of(items)])
    parts = [results_of(items), results_of(items[1:], hints=False)]
    with pytest.raises(PlanError, match=r"'w'.*\[2\].*written twice"):
        places_of(index, [form(part) for part in parts])


def test_an_item_that_one_rank_wrote_twice_is_named():
    _, index = concatenate_tables([WriteItems.of(halves("a") + halves("w"))])
    twice = [*halves("a"), halves("w")[1], halves("w")[1]]
    with pytest.raises(PlanError, match=r"'w'.*written twice"):
        places_of(index, [results_of(twice, hints=False)])


@pytest.mark.parametrize("form", [lambda part: part, list])
def test_an_item_missing_in_the_metadata_is_named(form):
    _, index = concatenate_tables([WriteItems.of(halves("w"))])
    strangers = [
        [shard_item("other", (4,), ((0,), (4,)))],
        [shard_item("w", (4,), ((1,), (2,)))],
    ]
    for items in strangers:
        with pytest.raises(PlanError, match="not in the metadata"):
            places_of(index, [form(results_of(items, hints=False))])


def test_an_item_missing_in_metadata_without_keys_is_named():
    with pytest.raises(PlanError, match="not in the metadata"):
        places_of(Index.of({}), [results_of(halves("w"))])


def test_an_item_that_no_rank_wrote_is_named():
    _, index = concatenate_tables([WriteItems.of(halves("a") + halves("w"))])
    results = results_of([*halves("a"), halves("w")[0]], hints=False)
    assert (places_of(index, [results]).file < 0).sum() == 1
    with pytest.raises(PlanError, match=r"1 item\(s\) .* by no rank, .*'w'.*\[2\]"):
        whole_places_of(index, [results])
    whole = [results, results_of(halves("w")[1:], hints=False)]
    assert (whole_places_of(index, whole).file >= 0).all()


def test_nothing_written_has_no_places():
    _, index = concatenate_tables([WriteItems.of([])])
    places = places_of(index, [results_of([]), []])
    assert len(places.file) == 0
    assert isinstance(places, EntryPlaces)


@given(st.lists(st.integers(0, 99), max_size=9), st.integers(0, 4))
@fewer(2)
def test_groups_of_rows_are_balanced_and_in_order(sizes, bins):
    groups = balance_by_bytes(np.array(sizes, dtype=np.int64), bins)
    assert sorted(row for group in groups for row in group) == list(range(len(sizes)))
    assert all(group == sorted(group) for group in groups)
    assert len(groups) <= max(bins, 1)
    loads = [sum(sizes[row] for row in group) for group in groups]
    assert max(loads) <= sum(sizes) / max(bins, 1) + max(sizes, default=0)


@given(st.binary(max_size=99))
@fewer(2)
def test_block_sums_are_those_of_all_that_came_before(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sums_module, "BLOCK_BYTES", BLOCK)
        expected = [crc32(data[: at + BLOCK]) for at in range(0, len(data), BLOCK)]
        assert block_sums(data) == expected


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failing_source_is_raised_from_whichever_thread(tmp_path, threads):
    def source(row: int) -> torch.Tensor:
        if row == 3:
            raise ValueError("no such tensor")
        return torch.ones(4)

    jobs = [FileJob(f"f{n}", [2 * n, 2 * n + 1]) for n in range(2)]
    with pytest.raises(ValueError, match="no such tensor"):
        write_files(
            WriteRequest(
                Folder(LocalDisk(), tmp_path),
                jobs,
                source,
                Settings(False, threads),
                Observer("save"),
            )
        )


@pytest.mark.parametrize("sync", [True, False])
def test_only_files_that_are_synced_are_brought_to_the_medium_early(sync, tmp_path, monkeypatch):
    offsets: list[int] = []

    def note(fd: int, offset: int, nbytes: int, *, wait: bool) -> bool:
        offsets.append(offset)
        return True

    monkeypatch.setattr(operating_system, "write_early", note)
    nbytes = 20 << 20
    data = torch.zeros(nbytes, dtype=torch.uint8)
    request = WriteRequest(
        Folder(LocalDisk(), tmp_path), [FileJob("f", [0], nbytes)], [data].__getitem__,
        Settings(sync=sync), Observer("save"),
    )  # fmt: skip
    write_files(request)
    assert offsets == ([0, 8 << 20] if sync else [])
