"""Opens a checkpoint as a mapping of its flat names: nothing is loaded, and no code of it runs.

    path or URL -> locate -> open_catalog or torch_save_contents -> OpenCheckpoint -> LazyTensor

Two halves of `w` have been saved; one row is read:

>>> import torch
>>> import pytest_dcp.checkpoint as dcp
>>> _ = dcp.save({"model": {"w": torch.arange(8.0).reshape(4, 2)}, "step": 3}, checkpoint_id="s3")
>>> with open_checkpoint("s3") as ckpt:
...     ckpt["model.w"], ckpt["model.w"][1:2], ckpt["step"].value()
(<'model.w': torch.float32 of (4, 2), 1 shard>, tensor([[2., 3.]]), 3)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from pytest_dcp._engine.format.catalog_comparison import find_equal_keys
from pytest_dcp._engine.format.memory_limit import MemoryLimit
from pytest_dcp._engine.io.checked_ranges import Verify
from pytest_dcp._engine.io.read_copies import ReadSettings
from pytest_dcp._engine.lazy_reading.contents import BoxToRead, Contents
from pytest_dcp._engine.lazy_reading.html import ROWS, draw_checkpoint
from pytest_dcp._engine.lazy_reading.lazy_values import (
    Lazy,
    LazyTensor,
    LazyValue,
    allocate_target,
    unpicklable,
)
from pytest_dcp._engine.lazy_reading.locate import (
    Format,
    Location,
    PathLike,
    locate_checkpoint,
)
from pytest_dcp._engine.lazy_reading.name_tree import NameTree, find_names, find_nearest
from pytest_dcp._engine.lazy_reading.open_catalog import open_catalog
from pytest_dcp._engine.lazy_reading.torch_save_contents import TorchSaveContents
from pytest_dcp._engine.plan.box_coverage import problems_of
from pytest_dcp._engine.plan.boxes import volumes
from pytest_dcp._engine.storages.folder_reader import checked_verify, read_settings
from pytest_dcp.errors import NotACheckpointError, UnknownNameError
from pytest_dcp.tracebacks import drop_inner_frames

SHOWN = 20
"""Names in the `repr`."""


class OpenCheckpoint(Mapping[str, Lazy]):
    """A checkpoint as a read-only mapping of its flat names; close it, or use it in `with`."""

    def __init__(
        self,
        where: str,
        format: Format,
        contents: Contents,
        opening: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.where = where
        """The path or URL."""
        self.opening = opening
        """The arguments with which `open_checkpoint` opens it once more, in another process."""
        self.format = format
        """dcp (this engine's and torch's folders), safetensors (files and folders), torch_save."""
        self._contents = contents

    def __getitem__(self, name: str) -> Lazy:
        if not isinstance(name, str) or not self._contents.has(name):
            raise self._unknown(name)
        facts = self._contents.describe(name)
        if facts is None:
            return LazyValue(self._contents, name)
        return LazyTensor(self._contents, name, facts)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._contents.has(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._contents.names)

    def __len__(self) -> int:
        return len(self._contents.names)

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __reduce__(self) -> NoReturn:
        raise unpicklable(self)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Names, shapes and shards stay known; reads raise ValueError."""
        self._contents.close()

    @property
    def tree(self) -> NameTree:
        """The names as nested mappings, split at their dots: `ckpt.tree["model"]["layers"]`."""
        return NameTree(self._contents.names, self.__getitem__)

    def glob(self, pattern: str) -> list[str]:
        """The names that a shell-style pattern matches; `*` matches dots too."""
        return find_names(self._contents.names, pattern)

    def read(
        self, names: Iterable[str], *, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """Several full tensors at once, which is faster than one by one. Their files are read in
        the order of their bytes.

        dtype: of the results; None: as stored. Raises UnknownNameError, and TypeError for the name
        of a value.
        """
        if isinstance(names, str):
            raise TypeError(f"read takes several names, got one str: read([{names!r}])")
        boxes = []
        for name in dict.fromkeys(names):
            lazy = self[name]
            if not isinstance(lazy, LazyTensor):
                raise TypeError(f"{name!r} is a value: read it with checkpoint[{name!r}].value()")
            target = allocate_target(name, lazy.shape, dtype or lazy.dtype)
            boxes.append(BoxToRead(name, (0,) * lazy.ndim, target))
        self._contents.read_boxes(boxes)
        return {box.name: box.target for box in boxes}

    def read_boxes(self, boxes: Sequence[BoxToRead]) -> None:
        """Fill the targets with parts of stored tensors."""
        self._contents.read_boxes(boxes)

    def read_value(self, name: str, *, weights_only: bool = True) -> Any:
        """The value of this name.

        weights_only: False allows values of any class, and reading them can run code.
        """
        return self._contents.read_value(name, weights_only=weights_only)

    def identify(self) -> str:
        """A text that differs for another save in the same place, as far as that is known."""
        return self._contents.identify()

    def path_of(self, name: str) -> tuple[Any, ...]:
        """The keys from the root of the saved state dict to this name."""
        return self._contents.path_of(name)

    @property
    def containers(self) -> str | None:
        """The description of the saved containers, if not all are plain dicts and lists."""
        return self._contents.containers

    @property
    def common(self) -> Mapping[str, Any]:
        """The plain values and tensors in the `common.pt` of a checkpoint of Megatron-Core, by
        their first keys; empty for any other checkpoint. It is read at each use.

        No code of it runs: an object of an unknown class is a placeholder that has its name. Raises
        CheckpointCorruptError, naming the file, if it is damaged.
        """
        return self._contents.read_common() if self.format == "dcp" else {}

    @property
    def missing_files(self) -> tuple[str, ...]:
        """Data files that were not there when it was opened; tensors in them cannot be read."""
        return tuple(self._contents.missing_files)

    def verify_index(self) -> None:
        """Check the bytes of the index that no read looks at: in `.metadata` the pickle for torch.

        Raises CheckpointCorruptError naming the file.
        """
        self._contents.verify_index()

    def find_stray_files(self) -> tuple[str, ...]:
        """Data files in the folder that the checkpoint does not name: of other saves, or left by
        one that ended early."""
        return tuple(self._contents.find_stray_files())

    def find_equal_names(self, other: OpenCheckpoint) -> list[str]:
        """Names whose contents are the same in both, by their checksums alone.

        Names that were cut into other shards, or have no checksums, are left open.
        """
        one, two = self._contents.catalog, other._contents.catalog
        return [] if one is None or two is None else find_equal_keys(one, two)

    def find_coverage_problems(self) -> list[str]:
        """Tensors whose shards leave gaps, overlap or exceed them, in words."""
        catalog = self._contents.catalog
        return [] if catalog is None else problems_of(catalog.index, complete=True)

    def count_without_checksums(self) -> int:
        """Names with elements that no checksum covers."""
        catalog = self._contents.catalog
        if catalog is None:
            return 0 if self._contents.has_checksums else len(self)
        bare = (catalog.places.first_sum[1:] == catalog.places.first_sum[:-1]) & (
            (volumes(catalog.index.shape) > 0) | (catalog.index.ndim[catalog.index.key_of] < 0)
        )
        return len(set(catalog.index.key_of[bare].tolist()))

    @property
    def nbytes(self) -> int:
        """Of the elements of all full tensors."""
        return sum(lazy.nbytes for lazy in self.values() if isinstance(lazy, LazyTensor))

    @property
    def files(self) -> tuple[str, ...]:
        """The data files, relative to the checkpoint's folder."""
        return tuple(self._contents.file_names())

    @property
    def bytes_read(self) -> int:
        """From the data files since it was opened."""
        return self._contents.bytes_read

    @property
    def bytes_needed(self) -> int:
        """Of the parts that were asked for since it was opened."""
        return self._contents.bytes_needed

    def __repr__(self) -> str:
        lines = [f"<{self.format} checkpoint {self.where!r}: {len(self)} names>"]
        lines += [f"  {self[name]!r}" for name in islice(self, SHOWN)]
        if len(self) > SHOWN:
            lines.append(f"  ... and {len(self) - SHOWN} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [self[name].table_row() for name in islice(self, ROWS)]
        title = f"{self.where}: {self.format}, {len(self):,} names in {len(self.files):,} files"
        return draw_checkpoint(title, rows, len(self) - len(rows))

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def _unknown(self, name: object) -> UnknownNameError:
        if not isinstance(name, str):
            return UnknownNameError(f"a name is a str, got {type(name).__name__}")
        names = self._contents.names
        below = sum(one.startswith(f"{name}.") for one in names)
        nearest: tuple[str, ...] = ()
        if below:
            hint = f": {below} names begin with {name + '.'!r}, see glob and tree"
        else:
            nearest = find_nearest(names, name)
            hint = f"; the nearest: {', '.join(map(repr, nearest))}" if nearest else ""
        return UnknownNameError(f"{self.where} has no {name!r}{hint}", name, nearest)


@drop_inner_frames
def open_checkpoint(
    path: PathLike,
    *,
    rank: int | None = None,
    verify: Verify = "auto",
    thread_count: int | None = None,
    max_decoded_bytes: int | None = None,
    follow_links: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> OpenCheckpoint:
    """Open a checkpoint: only its index is read.

    path: a folder of this engine or of torch, a safetensors file, a folder of them, a file of
        torch.save, or a URL of one of them.
    rank: of the rank whose own checkpoint is opened, where each rank saved on its own.
    verify, thread_count, max_decoded_bytes: as for FileSystemReader.
    follow_links: whether data files may be links to plain files elsewhere; None: only those of
        safetensors checkpoints, as in a cache of the Hugging Face hub.
    storage_options: of the URL's file system: keys, endpoints.

    Raises FileNotFoundError if nothing is there, NotACheckpointError for anything else than a
    checkpoint, CheckpointCorruptError, naming the file, if the index is damaged.
    """
    location = locate_checkpoint(
        path, rank=rank, follow_links=follow_links, storage_options=storage_options
    )
    settings = read_settings(
        location.folder, checked_verify(verify), thread_count, MemoryLimit(max_decoded_bytes)
    )
    contents = _open_contents(location, settings, rank)
    opening = {
        "rank": rank,
        "verify": verify,
        "thread_count": thread_count,
        "max_decoded_bytes": max_decoded_bytes,
        "follow_links": follow_links,
        "storage_options": storage_options,
    }
    return OpenCheckpoint(os.fspath(path), location.format, contents, opening)


def _open_contents(location: Location, settings: ReadSettings, rank: int | None) -> Contents:
    if location.format != "torch_save" or location.file is None:
        return open_catalog(location, settings, rank)
    try:
        return TorchSaveContents(location.folder, location.file, verify=settings.verify != "off")
    except (TypeError, ValueError) as error:
        where = f"{location.folder}/{location.file}"
        raise NotACheckpointError(f"{where} is no checkpoint: {error}") from error
