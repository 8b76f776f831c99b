import tempfile
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.write_results import WriteResults, places_of
from pytest_dcp._engine.io import block_sums as block_sums_module
from pytest_dcp._engine.io import checked_ranges as ranges
from pytest_dcp._engine.io import read_copies as read
from pytest_dcp._engine.io import write_files as write
from pytest_dcp._engine.io.copy_plan import Targets, copies, runs, slabs, span_of, starts
from pytest_dcp._engine.io.entry_places import resolve_entry_places
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.read_copies import CopyRequest, ReadSettings, read_copies
from pytest_dcp._engine.io.write_files import (
    FileJob,
    Settings,
    WriteRequest,
    balance_by_bytes,
    write_files,
)
from pytest_dcp._engine.plan.boxes import pad_rows
from pytest_dcp._engine.plan.columns import ReadItems, WriteItems
from pytest_dcp._engine.plan.describe import Wanted
from pytest_dcp._engine.plan.load import read_items
from pytest_dcp._engine.plan.save import concatenate_tables
from pytest_dcp.errors import CheckpointCorruptError, PlanError
from support.tilings import boxes_in, fewer, shapes, shard_item, tilings

BLOCK = 16
CONVERTED = {
    torch.float32: [torch.float32, torch.float64, torch.bfloat16],
    torch.bfloat16: [torch.bfloat16, torch.float32],
    torch.int8: [torch.int8, torch.int64],
    torch.int64: [torch.int64],
    torch.bool: [torch.bool],
    torch.complex64: [torch.complex64, torch.complex128],
    torch.float8_e4m3fn: [torch.float8_e4m3fn, torch.float32],
}


def part(tensor: torch.Tensor, box) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(*box, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def numbers(shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    count = torch.Size(shape).numel()
    values = torch.arange(count) % 15 + 1
    return (values % 2 == 0 if dtype == torch.bool else values.to(dtype)).reshape(shape)


@st.composite
def memories(draw, shape: tuple, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A target of this shape inside a larger memory: in any order of dimensions, with gaps."""
    order = draw(st.permutations(range(len(shape))))
    step = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    base = torch.zeros([shape[dim] * step[dim] + 1 for dim in order], dtype=dtype)
    view = base[tuple(slice(0, shape[dim] * step[dim], step[dim]) for dim in order)]
    back = [order.index(dim) for dim in range(len(shape))]
    if draw(st.booleans()):
        return (flat := torch.zeros(shape, dtype=dtype)), flat
    target = view.permute(back) if shape else base
    if dtype.is_complex and draw(st.booleans()):
        target = target.conj()
    return target, base


@st.composite
def stored_tensors(draw) -> list[tuple]:
    """Full tensors and the boxes that they are stored as."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(shapes(max_dims=3, max_side=7))
        dtype = draw(st.sampled_from(list(CONVERTED)))
        found.append((numbers(size, dtype), draw(tilings(size))))
    return found


def saved(folder: Path, tensors: list, files: int, threads: int) -> Catalog:
    """The tensors' boxes in files, and their catalog."""
    items = [
        (full, box, shard_item(f"w{n}", full.shape, box, full.dtype))
        for n, (full, boxes) in enumerate(tensors)
        for box in boxes
    ]
    (table,), index = concatenate_tables([WriteItems.of([item for *_, item in items])])
    jobs = [
        FileJob(f"f{n}", rows) for n, rows in enumerate(balance_by_bytes(table.size_bytes(), files))
    ]
    written = write_files(
        WriteRequest(
            Folder(LocalDisk(), folder),
            jobs,
            lambda row: part(items[row][0], items[row][1]),
            Settings(sync=False, threads=threads, copy_ahead_bytes=32),
            Observer("save"),
        ),
    )
    places = places_of(index, [WriteResults(table, written)])
    return Catalog(index, replace(places, block_bytes=BLOCK))


def small(stack: ExitStack) -> None:
    """Blocks, pieces and limits of a few bytes."""
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    for module, name, value in [
        (block_sums_module, "BLOCK_BYTES", BLOCK),
        (write, "BLOCK_BYTES", BLOCK),
        (write, "PIECE_BYTES", 24),
        (write, "WRITE_BYTES", 100),
        (read, "RUN_BYTES", 8),
        (read, "CHECKED_RUN_BYTES", 24),
        (read, "BATCH", 2),
        (ranges, "PIECE_BYTES", 20),
        (ranges, "EXTEND_FROM_BYTES", 64),
    ]:
        patch.setattr(module, name, value)


def wanted_of(boxes: list) -> Wanted:
    rank = max((len(box[0]) for _, box in boxes), default=0)
    return Wanted(
        fqns=tuple(fqn for fqn, _ in boxes),
        ndim=np.array([len(box[0]) for _, box in boxes], dtype=np.int16),
        offset=pad_rows([box[0] for _, box in boxes], rank, 0),
        shape=pad_rows([box[1] for _, box in boxes], rank, 1),
        nth=np.zeros(len(boxes), dtype=np.int64),
    )


def loaded(folder: Path, catalog: Catalog, items: ReadItems, targets, settings) -> Observer:
    """Fill the targets, by name."""
    watcher = Observer("load")
    rows = np.arange(len(items))
    odd: dict = {}
    table = Targets(rows, [targets[fqn] for fqn in items.fqns])
    plan = copies(items, table, catalog.index, odd)
    read_copies(CopyRequest(Folder(LocalDisk(), folder), catalog, items, plan, settings, watcher))
    return watcher


@given(stored_tensors(), st.data())
@fewer(2)
def test_written_tensors_come_back_in_any_box_memory_and_dtype(tensors, data):
    draw = data.draw
    wanted, targets, bases = [], {}, {}
    for n, (full, _) in enumerate(tensors):
        box = draw(st.one_of(st.just(((0,) * full.dim(), tuple(full.shape))), boxes_in(full.shape)))
        dtype = draw(st.sampled_from(CONVERTED[full.dtype]))
        targets[f"w{n}"], bases[f"w{n}"] = draw(memories(box[1], dtype))
        wanted.append((f"w{n}", box))
    settings = ReadSettings(
        verify=draw(st.sampled_from(["auto", "full", "off"])),
        threads=draw(st.integers(1, 3)),
        staging_bytes=draw(st.sampled_from([16, 40, 1 << 10])),
        window_bytes=draw(st.sampled_from([1, 40, 1 << 20])),
    )
    files, threads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        small(stack)
        catalog = saved(Path(folder), tensors, files, threads)
        items = read_items(wanted_of(wanted), catalog.index)
        loaded(Path(folder), catalog, items, targets, settings)
    for (fqn, box), (full, _) in zip(wanted, tensors, strict=True):
        target, base = targets[fqn], bases[fqn]
        expected = part(full, box).to(target.dtype)
        assert torch.equal(target.to(torch.complex128), expected.to(torch.complex128))
        # Memory around and between the target's elements is unchanged.
        target.zero_()
        assert not base.to(torch.complex128).any()


@given(stored_tensors(), st.data())
@fewer(8)
def test_no_flipped_bit_of_the_data_is_loaded_when_all_is_verified(tensors, data):
    wanted = [(f"w{n}", ((0,) * t.dim(), tuple(t.shape))) for n, (t, _) in enumerate(tensors)]
    targets = {f"w{n}": torch.zeros_like(t) for n, (t, _) in enumerate(tensors)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        small(stack)
        catalog = saved(Path(folder), tensors, 1, 1)
        places = catalog.places
        filled = np.flatnonzero(places.data_nbytes > 0).tolist()
        if not filled:
            return
        row = data.draw(st.sampled_from(filled))
        at = int(places.data_start[row])
        at += data.draw(st.integers(0, int(places.data_nbytes[row]) - 1))
        file = Path(folder) / places.files[places.file[row]]
        content = bytearray(file.read_bytes())
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        items = read_items(wanted_of(wanted), catalog.index)
        with pytest.raises(CheckpointCorruptError, match="checksum") as caught:
            loaded(Path(folder), catalog, items, targets, ReadSettings(verify="full"))
    start = int(places.data_start[row])
    assert caught.value.offset == start + (at - start) // BLOCK * BLOCK
    assert caught.value.entry == catalog.index.fqns[catalog.index.key_of[row]]


@given(shapes(max_dims=4, max_side=4), st.data())
@fewer(2)
def test_starts_and_span_are_those_of_the_elements(shape, data):
    stride = [data.draw(st.integers(0, 20)) for _ in shape]
    expected = [sum(a * s for a, s in zip(at, stride, strict=True)) for at in np.ndindex(*shape)]
    table = np.array(shape, dtype=np.int64), np.array(stride, dtype=np.int64)
    assert starts(*table).tolist() == expected
    assert span_of(*table, 4) == (max(expected) + 4 if expected else 0)


@given(shapes(max_dims=4, max_side=4, min_side=1), st.data(), st.sampled_from([1, 4]))
@fewer(2)
def test_runs_are_the_longest_pieces_that_lie_together_in_both_places(shape, data, itemsize):
    def strides() -> list[int]:
        inner, found = itemsize, []
        for n in reversed(shape):
            found.append(inner)
            inner *= n * data.draw(st.sampled_from([1, 1, 2]))
        return found[::-1]

    here, there = strides(), strides()
    inner, nbytes = runs(np.array(shape, dtype=np.int64), np.array(here), np.array(there), itemsize)
    outer = len(shape) - inner
    assert nbytes == itemsize * int(np.prod(shape[outer:], dtype=int))
    for stride in (here, there):
        lows = starts(np.array(shape[outer:], dtype=np.int64), np.array(stride[outer:]))
        assert lows.tolist() == list(range(0, nbytes, itemsize))
    if outer:
        # One dimension more would not lie together in one of the two.
        together = [
            starts(np.array(shape[outer - 1 :]), np.array(stride[outer - 1 :])).tolist()
            == list(range(0, nbytes * shape[outer - 1], itemsize))
            for stride in (here, there)
        ]
        assert not all(together)


@given(shapes(max_dims=3, max_side=5, min_side=1), st.sampled_from([1, 4]), st.data())
@fewer(2)
def test_slabs_hold_every_element_once_in_order_and_within_the_limit(shape, itemsize, data):
    order = data.draw(st.permutations(range(len(shape))))
    stride, step = [0] * len(shape), itemsize
    for dim in order:
        stride[dim] = step
        step *= shape[dim] * data.draw(st.sampled_from([1, 2]))
    limit = data.draw(st.integers(itemsize, 80))
    table = np.array(shape, dtype=np.int64), np.array(stride, dtype=np.int64)
    seen: list[tuple] = []
    lows = []
    for offset, sides in slabs(*table, itemsize, limit):
        assert span_of(sides, table[1], itemsize) <= limit
        lows.append(int((offset * table[1]).sum()))
        seen += product(*(range(o, o + n) for o, n in zip(offset, sides, strict=True)))
    assert lows == sorted(lows)
    assert sorted(seen) == sorted(product(*map(range, shape)))


def one_tensor(folder: Path, full: torch.Tensor) -> Catalog:
    return saved(folder, [(full, [((0,) * full.dim(), tuple(full.shape))])], 1, 1)


def test_a_listed_plan_of_fewer_dimensions_than_the_checkpoint_has_is_carried_out(tmp_path):
    small_one, wide = numbers((4,), torch.int64), numbers((2, 3), torch.int64)
    with ExitStack() as stack:
        small(stack)
        catalog = saved(tmp_path, [(small_one, [((0,), (4,))]), (wide, [((0, 0), (2, 3))])], 1, 1)
        made = read_items(wanted_of([("w0", ((0,), (4,)))]), catalog.index)
        items = replace(ReadItems.of(list(made)), entry=made.entry)
        target = torch.zeros(4, dtype=torch.int64)
        loaded(tmp_path, catalog, items, {"w0": target}, ReadSettings())
    assert torch.equal(target, small_one)


@pytest.mark.parametrize("target", [torch.zeros(3), torch.zeros(4).reshape(2, 2), torch.zeros(())])
def test_a_target_that_is_too_small_is_refused_before_anything_is_read(tmp_path, target):
    with ExitStack() as stack:
        small(stack)
        catalog = one_tensor(tmp_path, numbers((4,), torch.float32))
        items = read_items(wanted_of([("w0", ((0,), (4,)))]), catalog.index)
        with pytest.raises((PlanError, ValueError)):
            loaded(tmp_path, catalog, items, {"w0": target}, ReadSettings())


def test_a_box_outside_the_stored_chunk_is_refused(tmp_path):
    with ExitStack() as stack:
        small(stack)
        catalog = one_tensor(tmp_path, numbers((4,), torch.float32))
        items = read_items(wanted_of([("w0", ((0,), (4,)))]), catalog.index)
        for column, value in [("from_offset", 1), ("from_offset", -1), ("to_offset", 1)]:
            wrong = replace(items, **{column: np.array([[value]])})
            with pytest.raises(PlanError, match="'w0'"):
                loaded(tmp_path, catalog, wrong, {"w0": torch.zeros(4)}, ReadSettings())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_missing_file_is_named(tmp_path, threads):
    with ExitStack() as stack:
        small(stack)
        catalog = one_tensor(tmp_path, numbers((4,), torch.float32))
        items = read_items(wanted_of([("w0", ((0,), (4,)))]), catalog.index)
        (tmp_path / "f0").unlink()
        with pytest.raises(CheckpointCorruptError, match="the data file is missing") as caught:
            loaded(tmp_path, catalog, items, {"w0": torch.zeros(4)}, ReadSettings(threads=threads))
    assert (caught.value.file, caught.value.entry) == ("f0", "w0")


def test_a_missing_file_of_a_catalog_without_places_of_data_is_named(tmp_path):
    catalog = one_tensor(tmp_path, numbers((4,), torch.float32))
    unknown = np.array([-1])
    places = replace(catalog.places, data_start=unknown, data_nbytes=unknown)
    (tmp_path / "f0").unlink()
    with pytest.raises(CheckpointCorruptError, match="missing"):
        resolve_entry_places(
            Folder(LocalDisk(), tmp_path), replace(catalog, places=places), np.array([0])
        )


def test_a_chunk_without_a_file_is_named(tmp_path):
    catalog = one_tensor(tmp_path, numbers((4,), torch.float32))
    nowhere = replace(catalog, places=EntryPlaces.nowhere(1))
    items = read_items(wanted_of([("w0", ((0,), (4,)))]), catalog.index)
    with pytest.raises(CheckpointCorruptError, match=r"no file has this part .*'w0'"):
        loaded(tmp_path, nowhere, items, {"w0": torch.zeros(4)}, ReadSettings())


def test_the_place_of_the_data_is_found_in_the_entry(tmp_path):
    full = numbers((5, 3), torch.bfloat16)
    catalog = one_tensor(tmp_path, full)
    unknown = np.array([-1])
    places = replace(catalog.places, data_start=unknown, data_nbytes=unknown)
    found = resolve_entry_places(
        Folder(LocalDisk(), tmp_path), replace(catalog, places=places), np.array([0])
    )
    assert found.catalog.places.data_start == catalog.places.data_start
    assert found.catalog.places.data_nbytes == catalog.places.data_nbytes
    assert found.odd_strides == {}


def test_progress_counts_the_bytes_of_the_plan(tmp_path):
    full = numbers((50, 50), torch.float32)
    with ExitStack() as stack:
        small(stack)
        catalog = one_tensor(tmp_path, full)
        items = read_items(wanted_of([("w0", ((0, 3), (50, 2)))]), catalog.index)
        target = torch.zeros(50, 2)
        watcher = loaded(tmp_path, catalog, items, {"w0": target}, ReadSettings())
    assert torch.equal(target, full[:, 3:5])
    assert watcher.done_bytes == target.nbytes
