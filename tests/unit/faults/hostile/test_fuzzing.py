"""Fuzzed metadata: read in bounded time and memory, and refused or read correctly."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import settings

from pytest_dcp._engine.format import metadata_file, paged_catalog
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.paged_catalog import select_part
from pytest_dcp.errors import CheckpointCorruptError
from pytest_dcp.faults import fuzzed_metadata
from support.forks import FORK_S, forked, limited
from support.loads import ending, load, load_all, save
from support.paged_catalogs import FileInMemory, add_table

SAVERS = ("ours", "torch")
INPUTS = 1_000_000 if settings().max_examples >= 10_000 else 15_000
"""For each of the two. The nightly profile of Hypothesis tries more."""
PAGED_EACH = 5
"""One in this many inputs gets a table of pages, and is read key by key."""
LOADED_EACH = 50
"""One in this many inputs is loaded, with its tensors and values."""
ROOM_BYTES = 256 << 20
ALL_S = max(FORK_S, INPUTS // 200)
"""For all inputs of a test: five times what they take on an idle machine."""
INPUT_S = 5
"""Of the processor, for one input of a few thousand bytes."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    return {saver: save(folder / saver, saver) / ".metadata" for saver in SAVERS}


def check_sound(catalog: Catalog) -> None:
    """Check an accepted file, independently of the reader's own checks."""
    for name in catalog.places.files:
        assert name, "a file without a name"
        assert not name.startswith("/"), name
        assert not {"..", ".", ""} & set(name.split("/")), name
        assert "\0" not in name, name
    for fqn, entry in catalog.metadata().state_dict_metadata.items():
        for chunk in getattr(entry, "chunks", ()):
            size = getattr(entry, "size", ())
            for at, length, whole in zip(chunk.offsets, chunk.sizes, size, strict=True):
                assert 0 in chunk.sizes or 0 <= at <= at + length <= whole, fqn


def read_catalog_of(view: memoryview) -> Catalog:
    reading = metadata_file.read_by_ranges(len(view))
    try:
        at, nbytes = next(reading)
        while True:
            at, nbytes = reading.send(view[at : at + nbytes])
    except StopIteration as end:
        return end.value


@pytest.mark.parametrize("saver", SAVERS)
def test_no_fuzzed_metadata_breaks_the_reader(files: dict[str, Path], saver: str) -> None:
    good = files[saver].read_bytes()

    def body(begin: Callable[[str], None]) -> dict[str, int | float]:
        endings: Counter[str] = Counter()
        slowest = 0.0
        for case in fuzzed_metadata(good, range(INPUTS)):
            view = memoryview(case.data)
            began = time.process_time()
            try:
                with limited(INPUT_S):
                    catalog = read_catalog_of(view)
                endings["taken"] += 1
            except CheckpointCorruptError:
                endings["refused"] += 1
            except BaseException:
                begin(case.what)
                raise
            else:
                begin(case.what)
                check_sound(catalog)
            slowest = max(slowest, time.process_time() - began)
        return {**endings, "slowest_ms": round(slowest * 1000)}

    figures = forked(body, ROOM_BYTES, ALL_S)
    print(f"{INPUTS} fuzzed metadata from {saver}: {figures}")
    assert figures["taken"] + figures["refused"] == INPUTS
    assert figures["taken"] > INPUTS // 50, "nothing gets as far as to the end"
    assert figures["refused"] > INPUTS // 2


def open_pages_of(data: bytes) -> Catalog | None:
    """The catalog of a changed file that got a table of pages; None if it must be read whole."""
    manifest = FileInMemory(add_table(data)).open()
    return None if manifest is None else manifest.catalog()


def test_no_fuzzed_manifest_breaks_the_reader_of_pages(files: dict[str, Path]) -> None:
    """Each key is read by itself, then all of them."""
    good = files["ours"].read_bytes()

    def body(begin: Callable[[str], None]) -> dict[str, int]:
        endings: Counter[str] = Counter()
        for case in fuzzed_metadata(good, range(0, INPUTS, PAGED_EACH)):
            with suppress(CheckpointCorruptError), limited(INPUT_S):
                endings["tried"] += 1
                catalog = open_pages_of(case.data)
                if catalog is None:
                    continue
                endings["opened"] += 1
                begin(case.what)
                right = 0
                for key in range(len(catalog.index)):
                    with suppress(CheckpointCorruptError):
                        check_sound(select_part(catalog, np.array([key])))
                        right += 1
                endings["in part"] += right < len(catalog.index)
                check_sound(catalog)
                endings["taken"] += 1
                assert right == len(catalog.index), "a part of a sound catalog was refused"
        return endings

    with patch.object(paged_catalog, "WHOLE_FROM_PART", 2.0):
        figures = forked(body, ROOM_BYTES, ALL_S)
    print(f"fuzzed manifests with pages: {figures}")
    assert figures["in part"] > figures["tried"] // 50, "no damage is found in parts"
    assert figures["taken"] > figures["tried"] // 100


@pytest.mark.parametrize("saver", SAVERS)
def test_no_fuzzed_metadata_breaks_a_load(files: dict[str, Path], saver: str) -> None:
    good = files[saver].read_bytes()

    def body(begin: Callable[[str], None]) -> dict[str, int]:
        endings: Counter[str] = Counter()
        for case in fuzzed_metadata(good, range(0, INPUTS, LOADED_EACH)):
            files[saver].write_bytes(case.data)
            begin(case.what)
            for one in (load, load_all):
                with limited(INPUT_S):
                    how = ending(one, files[saver].parent)
                # Dtypes that no checkpoint has are refused as in a save, with a TypeError.
                how = "refused" if how.startswith("TypeError('expected a dtype") else how
                assert how in ("refused", "loaded", "another shape"), how
                endings[how] += 1
        return endings

    try:
        print(f"loads of fuzzed metadata from {saver}: {forked(body, 2 * ROOM_BYTES, ALL_S)}")
    finally:
        files[saver].write_bytes(good)


def test_a_seed_gives_the_same_file_each_time(files: dict[str, Path]) -> None:
    for file in files.values():
        once, twice = (list(fuzzed_metadata(file.read_bytes(), range(300))) for _ in range(2))
        assert once == twice
        assert len({case.data for case in once}) > 250


def test_changes_get_past_the_checksums(files: dict[str, Path]) -> None:
    """Most of them, or only the outermost door would be tried."""
    reasons: Counter[str] = Counter()
    for case in fuzzed_metadata(files["ours"].read_bytes(), range(2000)):
        try:
            metadata_file.decode(case.data)
        except CheckpointCorruptError as error:
            reasons["CRC" if "CRC" in error.reason else error.reason[:40]] += 1
    assert reasons["CRC"] < 200
    assert len(reasons) > 200
