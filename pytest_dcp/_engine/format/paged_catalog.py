"""The catalog of a large checkpoint, whose chunks are read when they are asked for.

Opening reads the keys, the names of the files, and no chunk (`manifest_columns.open_keys`). Then:

- `select_part` reads and checks the rows of some keys alone, page by page, and nothing else.
- A whole column of chunks, as planning a load needs it, is an attribute that appears when it is
  first used: then the manifest is read and checked as a whole.

Either way a number is used only after its page's checksum and every rule of the catalog have been
checked, for the rows that are used. So damage is found when it is touched, not when the checkpoint
is opened. Many small parts would read the manifest in small pieces, so after a quarter of its pages
the rest is read at once.

The file stays open until all has been read, or the catalog is dropped: it is one save's, even if
another replaces it meanwhile. Several threads and forked processes may use one catalog.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.format.catalog_checks import check_chunks
from pytest_dcp._engine.format.catalog_selection import select_keys
from pytest_dcp._engine.format.manifest_columns import OpenedManifest
from pytest_dcp._engine.format.manifest_layout import CHUNK_COLUMNS
from pytest_dcp._engine.format.manifest_pages import ManifestPages
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.column_table import ColumnTable
from pytest_dcp._engine.plan.packed_index import PackedIndex
from pytest_dcp.errors import CheckpointCorruptError

if TYPE_CHECKING:  # Self is in `typing` from Python 3.11 on
    from typing_extensions import Self

WHOLE_FROM_PART = 0.25
"""Of the pages, or of the chunks: a part that large costs about as much as all of them."""
_CHUNKS_OF_INDEX = ("offset", "shape")
_CHUNKS_OF_PLACES = ("file", "start", "length", "data_start", "data_nbytes")


class PagedManifest:
    """A manifest that is read part by part, or as a whole."""

    def __init__(
        self,
        pages: ManifestPages,
        opened: OpenedManifest,
        read_all: Callable[[], Catalog],
        start: int,
    ) -> None:
        """opened: views of the pages. read_all: reads and checks the same manifest as a whole.
        start: where it begins in its file."""
        self.on_complete: Callable[[], object] = lambda: None
        """Is called once nothing is left to be read."""
        self.file: str | None = None
        """The name of its file, for errors."""
        self._pages: ManifestPages | None = pages
        pages.start_count()
        self._catalog = opened.catalog
        self._spans = opened.spans
        self._read_all = read_all
        self._start = start
        self._is_damaged = False
        self._lock = threading.Lock()
        self._lock_pid = os.getpid()

    def catalog(self) -> Catalog:
        """The catalog, whose columns of chunks are read when they are used."""
        now = self._catalog
        index, places = PagedIndex.over(self, now.index), PagedPlaces.over(self, now.places)
        return replace(now, index=index, places=places)

    def whole(self) -> Catalog:
        """The catalog with all its chunks. Raises CheckpointCorruptError naming the file."""
        with self._one_at_a_time():
            return self._read_whole()

    def part(self, keys: Ints) -> Catalog:
        """The catalog of these keys alone; see `select_keys`.

        Raises CheckpointCorruptError naming the file, and the page or the chunk that is damaged.
        """
        with self._one_at_a_time():
            pages = self._pages
            if pages is not None and not self._reads_apart(pages, keys):
                with contextlib.suppress(CheckpointCorruptError):
                    # The damage may be elsewhere: only these keys' own is an error here.
                    self._read_whole()
                pages = self._pages
            if pages is not None:
                self._read_rows(pages, keys)
                part = select_keys(self._catalog, keys)
                check_chunks(part)
                return part
            whole = self._catalog
        return select_keys(whole, keys)

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """One thread is inside; errors name the file."""
        if self._lock_pid != os.getpid():
            # In a forked process: the thread that had the lock is not here to release it.
            self._lock, self._lock_pid = threading.Lock(), os.getpid()
        try:
            with self._lock:
                yield
        except CheckpointCorruptError as error:
            raise error.at(file=self.file, offset=self._start) from error

    def _read_whole(self) -> Catalog:
        if self._pages is not None:
            self._is_damaged = True
            self._catalog = self._read_all()
            self._is_damaged, self._pages = False, None
            self.on_complete()
        return self._catalog

    def _reads_apart(self, pages: ManifestPages, keys: Ints) -> bool:
        """Whether to read the rows of these keys alone, rather than everything."""
        first = self._catalog.index.first
        rows = int((first[keys + 1] - first[keys]).sum())
        is_small = max(rows / max(int(first[-1]), 1), pages.part_read) <= WHOLE_FROM_PART
        return is_small or self._is_damaged

    def _read_rows(self, pages: ManifestPages, keys: Ints) -> None:
        """Read the chunks of these keys, and their sums."""
        index, places = self._catalog.index, self._catalog.places
        runs = np.stack([index.first[keys], index.first[keys + 1]], axis=1).tolist()
        columns = [(name, getattr(index, name)) for name in _CHUNKS_OF_INDEX]
        columns += [(name, getattr(places, name)) for name in _CHUNKS_OF_PLACES]
        widths = [(self._spans[name][0], column.strides[0]) for name, column in columns]
        first_sum, (at_sums, _) = places.first_sum, self._spans["sums"]
        at_first, total = self._spans["first_sum"][0], len(places.sums)
        for low, high in runs:
            if low == high:
                continue
            for at, width in widths:
                pages.fill_range(at + low * width, at + high * width)
            pages.fill_range(at_first + low * 8, at_first + (high + 1) * 8)
            bounds = first_sum[low : high + 1]
            if bounds[0] < 0 or bounds[-1] > total or (bounds[1:] < bounds[:-1]).any():
                raise CheckpointCorruptError(
                    f"expected the first sums of its chunks to rise from 0 to {total} at most, got "
                    "other numbers",
                    entry=index.fqns[int(np.searchsorted(index.first, low, side="right")) - 1],
                )
            pages.fill_range(at_sums + int(bounds[0]) * 4, at_sums + int(bounds[-1]) * 4)


class _FilledLater(ColumnTable):
    """A table whose columns of chunks are attributes that do not exist before their first use."""

    manifest: PagedManifest | None = None
    """Where they are; None in a copy, which has them."""

    @classmethod
    def over(cls, manifest: PagedManifest, table: ColumnTable) -> Self:
        """The table of the manifest, with the columns of keys."""
        paged = cls.__new__(cls)
        # With the values of cached properties, such as the dict of names.
        values = {name: v for name, v in vars(table).items() if name not in CHUNK_COLUMNS}
        paged.__dict__.update(values, manifest=manifest, source_file=manifest.file)
        return paged

    def __getattr__(self, name: str) -> Any:
        manifest = self.manifest
        if manifest is None or name not in CHUNK_COLUMNS or name not in self.column_names():
            return self._find_attribute(name)
        table = self._table_of(manifest.whole())
        self.__dict__.update(vars(table))
        return self.__dict__[name]

    def _find_attribute(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @staticmethod
    def _table_of(catalog: Catalog) -> ColumnTable:
        raise NotImplementedError


class PagedIndex(_FilledLater, PackedIndex):
    """An index whose chunks are read with the first use of one of their columns."""

    def _find_attribute(self, name: str) -> Any:
        return PackedIndex.__getattr__(self, name)

    @staticmethod
    def _table_of(catalog: Catalog) -> ColumnTable:
        return catalog.index


class PagedPlaces(_FilledLater, EntryPlaces):
    """Places of chunks, read with the first use of one of their columns."""

    def __reduce__(self) -> tuple[Any, ...]:
        return EntryPlaces, tuple(getattr(self, f.name) for f in fields(EntryPlaces))

    @staticmethod
    def _table_of(catalog: Catalog) -> ColumnTable:
        return catalog.places


def select_part(catalog: Catalog, keys: Ints) -> Catalog:
    """The catalog of these keys alone, as `select_keys`; of a paged catalog only their chunks are
    read.

    Raises CheckpointCorruptError if they are damaged.
    """
    index, places = catalog.index, catalog.places
    if isinstance(index, PagedIndex) and isinstance(places, PagedPlaces):
        manifest = index.manifest
        if manifest is not None and manifest is places.manifest:
            return manifest.part(keys)
    return select_keys(catalog, keys)
