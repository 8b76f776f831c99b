"""Buckets are read ahead of their receivers, but only so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format.memory_limit import MemoryLimit
from pytest_dcp._engine.io.bucket_reading import SPARE, BucketLayout, BucketReader, BucketSource
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.progress_observer import Observer
from pytest_dcp._engine.io.read_copies import ReadSettings
from pytest_dcp._engine.plan.columns import ReadItems
from pytest_dcp._engine.storages.folder_metadata import read_catalog
from pytest_dcp.errors import CheckpointCorruptError
from support.states import numbered, without_warnings

COUNT, THREADS = 12, 2
PART_BYTES = 1 << 16
"""A block with a sum of its own."""
ROW = PART_BYTES // 4
DONE_S = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with without_warnings():
        dcp.save({"w": numbered(COUNT, ROW)}, checkpoint_id=tmp_path)
    return tmp_path


@contextmanager
def reader_of(path: Path) -> Iterator[BucketReader]:
    folder = Folder(LocalDisk(), path)
    catalog = read_catalog(folder, ".metadata", MemoryLimit())
    settings = ReadSettings(threads=THREADS)
    source = BucketSource(folder, catalog, ReadItems.of([]), settings, Observer("load"))
    parts = [(0, n * PART_BYTES, (n + 1) * PART_BYTES) for n in range(COUNT)]
    buckets = [BucketLayout.of(n, [part]) for n, part in enumerate(parts)]
    with closing(BucketReader(source, buckets)) as reader:
        yield reader


def test_no_more_buckets_are_read_than_there_is_memory_for(folder: Path) -> None:
    found = {}
    with reader_of(folder) as reader:
        until_s = time.monotonic() + DONE_S
        while not reader.is_done:
            assert time.monotonic() < until_s
            taken = reader.take()
            assert len(taken) <= THREADS + SPARE
            for number, data in taken:
                found[number] = torch.frombuffer(bytearray(data), dtype=torch.float32)
                reader.release(number)
    assert torch.equal(torch.stack([found[n] for n in range(COUNT)]), numbered(COUNT, ROW))


def test_a_reader_from_which_nothing_is_taken_ends_when_it_is_closed(folder: Path) -> None:
    with reader_of(folder) as reader:
        pass
    assert not any(thread.is_alive() for thread in reader._threads)
    assert reader.tally.read <= (THREADS + SPARE) * PART_BYTES


def test_the_error_of_a_thread_is_raised_where_buckets_are_taken(folder: Path) -> None:
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[: 3 * PART_BYTES])
    with reader_of(folder) as reader, pytest.raises(CheckpointCorruptError, match=path.name):
        take_all(reader)


def take_all(reader: BucketReader) -> None:
    until_s = time.monotonic() + DONE_S
    while time.monotonic() < until_s:
        for number, _ in reader.take():
            reader.release(number)
