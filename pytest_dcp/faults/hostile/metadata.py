"""Metadata that lie: impossible names, places, sizes, boxes and properties. Pure except for
`Good.of`, which reads the good checkpoint.

Enters: a good checkpoint's `Metadata`. Leaves: a pickle of it with one thing wrong. An edit changes
a copy in place; its lie is wrong for every reader.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

LAST = (1 << 63) - 1
"""The largest signed 64-bit number."""

HOSTILE_NAMES = (
    *("", ".", "..", "/", "./", "/dev/zero", "/proc/self/mem", "../outside"),
    *("nul\0", "a//b", "half \ud800", "n" * 300, "a/" * 3000 + "b"),
)
"""Names that are not a data file of any checkpoint."""

Needs = Literal["tensor", "value"]


@dataclass(frozen=True, slots=True)
class Edit:
    """One lie."""

    name: str
    harm: str
    change: Callable[[Metadata, str], None]
    """Changes the metadata in place, at this key."""
    needs: Needs = "tensor"
    """The kind of key that it needs."""


@dataclass(frozen=True, slots=True)
class Good:
    """A good checkpoint, and the parts of it that hostile ones change."""

    folder: Path
    metadata: bytes
    """The pickle of its Metadata, without the manifest."""
    tensor: str
    """The key of the tensor with the most elements; "" if there is no tensor."""
    value: str
    """The key of a value; "" if there is no value."""

    @classmethod
    def of(cls, folder: Path) -> Good:
        """The checkpoint in a folder. It is unpickled, so it must be trusted.

        Raises ValueError if it holds no tensor.
        """
        metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
        entries = metadata.state_dict_metadata
        sizes = {
            fqn: entry.size.numel()
            for fqn, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and entry.chunks
        }
        if not any(sizes.values()):
            raise ValueError(f"expected a checkpoint with a tensor in {str(folder)!r}")
        values = [fqn for fqn, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]
        return cls(
            folder, pickle.dumps(metadata), max(sizes, key=sizes.__getitem__), (*values, "")[0]
        )

    def has(self, needs: Needs) -> bool:
        """Whether the checkpoint has such a key."""
        return bool(getattr(self, needs))

    def copy(self) -> Metadata:
        """A copy of the metadata, for editing."""
        metadata: Metadata = pickle.loads(self.metadata)
        return metadata

    def edit_pickle(self, edit: Edit) -> bytes:
        """The pickle of the metadata with this lie."""
        metadata = self.copy()
        edit.change(metadata, getattr(self, edit.needs))
        return pickle.dumps(metadata)

    @property
    def data_file(self) -> str:
        """The name of the file with the tensor's first chunk."""
        name: str = place_of(self.copy(), self.tensor).relative_path
        return name

    def entry(self, fqn: str) -> bytes:
        """The bytes of the key's first entry."""
        place = place_of(self.copy(), fqn)
        data = (self.folder / place.relative_path).read_bytes()
        found: bytes = data[place.offset : place.offset + place.length]
        return found


def move_entry(metadata: Metadata, fqn: str, name: str, nbytes: int) -> None:
    """Make the key's first entry a whole file of `nbytes` bytes."""
    place = place_of(metadata, fqn)
    place.relative_path, place.offset, place.length = name, 0, nbytes
    place.transform_descriptors = None


def with_pickle(entry: bytes, pickled: bytes) -> bytes:
    """A zip archive of torch.save with its data.pkl replaced and its checksums recomputed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(entry)) as old, zipfile.ZipFile(buffer, "w") as new:
        for record in old.infolist():
            data = pickled if record.filename.endswith("/data.pkl") else old.read(record)
            new.writestr(zipfile.ZipInfo(record.filename), data)
    return buffer.getvalue()


def place_of(metadata: Metadata, fqn: str) -> Any:
    """The place of the key's first entry."""
    return next(place for key, place in metadata.storage_data.items() if key.fqn == fqn)


def rename_files(name: str) -> Edit:
    """Give every data file this name."""

    def change(metadata: Metadata, fqn: str) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = name

    return Edit("", "", change)


# ---- places


def _place_entry(**fields: Any) -> Callable[[Metadata, str], None]:
    def change(metadata: Metadata, fqn: str) -> None:
        for name, value in fields.items():
            setattr(place_of(metadata, fqn), name, value)

    return change


def _remove_place(metadata: Metadata, fqn: str) -> None:
    for key in [key for key in metadata.storage_data if key.fqn == fqn]:
        del metadata.storage_data[key]


def _swap_entry(metadata: Metadata, fqn: str) -> None:
    """Point the tensor at the shortest other entry."""
    others = [place for key, place in metadata.storage_data.items() if key.fqn != fqn]
    other = min(others, key=lambda place: place.length)
    mine = place_of(metadata, fqn)
    mine.offset, mine.length, mine.relative_path = other.offset, other.length, other.relative_path


# ---- tensors


def _entry(metadata: Metadata, fqn: str) -> Any:
    return metadata.state_dict_metadata[fqn]


def _tile(*boxes: tuple[tuple[int, ...], tuple[int, ...]], size: tuple[int, ...] = ()) -> Any:
    """Chunks, each with the place of the first one; `size` of the tensor, if it is to change."""

    def change(metadata: Metadata, fqn: str) -> None:
        entry, place = _entry(metadata, fqn), place_of(metadata, fqn)
        _remove_place(metadata, fqn)
        entry.size = torch.Size(size) if size else entry.size
        entry.chunks = []
        for number, (offsets, sizes) in enumerate(boxes):
            _add_chunk(metadata, fqn, number, offsets, sizes, place)

    return change


def _add_chunk(
    metadata: Metadata,
    fqn: str,
    number: int,
    offsets: tuple[int, ...],
    sizes: tuple[int, ...],
    place: Any,
) -> None:
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    metadata.state_dict_metadata[fqn].chunks.append(chunk)  # type: ignore[union-attr]  # a tensor
    metadata.storage_data[MetadataIndex(fqn, chunk.offsets, number)] = place


def _set_absurd_size(*size: int) -> Callable[[Metadata, str], None]:
    zeros = (0,) * len(size)
    change: Callable[[Metadata, str], None] = _tile((zeros, size), size=size)
    return change


def _grow_tensor(metadata: Metadata, fqn: str) -> None:
    """Make the tensor one row longer than its chunks."""
    entry = _entry(metadata, fqn)
    entry.size = torch.Size([entry.size[0] + 1, *entry.size[1:]])


def _overlap_chunks(metadata: Metadata, fqn: str) -> None:
    """Add a second chunk that overlaps the first one."""
    entry = _entry(metadata, fqn)
    first = entry.chunks[0]
    entry.size = torch.Size([entry.size[0] + 1, *entry.size[1:]])
    offsets = (first.offsets[0] + 1, *first.offsets[1:])
    place = place_of(metadata, fqn)
    _add_chunk(metadata, fqn, len(entry.chunks), offsets, tuple(first.sizes), place)


def _shift_place(by: int) -> Callable[[Metadata, str], None]:
    def change(metadata: Metadata, fqn: str) -> None:
        chunk = _entry(metadata, fqn).chunks[0]
        key = next(key for key in metadata.storage_data if key.fqn == fqn)
        place = metadata.storage_data.pop(key)
        chunk.offsets = torch.Size([chunk.offsets[0] + by, *chunk.offsets[1:]])
        metadata.storage_data[MetadataIndex(fqn, chunk.offsets, key.index)] = place

    return change


def _many_chunks(metadata: Metadata, fqn: str) -> None:
    """Repeat the same chunk 20,000 times."""
    entry = _entry(metadata, fqn)
    entry.chunks = entry.chunks[:1] * 20_000


def _flatten_chunks(metadata: Metadata, fqn: str) -> None:
    """Give chunks another number of dimensions than their tensor."""
    for chunk in _entry(metadata, fqn).chunks:
        chunk.sizes = torch.Size([*chunk.sizes, 1])


def _change_dtype(dtype: torch.dtype) -> Callable[[Metadata, str], None]:
    def change(metadata: Metadata, fqn: str) -> None:
        _entry(metadata, fqn).properties.dtype = dtype

    return change


def _set_attribute(field: str, value: object) -> Callable[[Metadata, str], None]:
    def change(metadata: Metadata, fqn: str) -> None:
        owner, _, name = field.rpartition(".")
        entry = _entry(metadata, fqn)
        owners = {"": metadata, "entry": entry, "chunk": getattr(entry, "chunks", [None])[0]}
        setattr(owners[owner], name, value)

    return change


_LOST, _CRASH = "gives data that was never saved", "breaks its reader"
_MEMORY, _OUTSIDE = "fills the memory of its reader", "reads or writes outside of the tensor"

EDITS = (
    Edit("an offset beyond the file", _LOST, _place_entry(offset=1 << 60)),
    Edit("an offset that wraps around", _OUTSIDE, _place_entry(offset=LAST)),
    Edit("an offset past 64 bits", _CRASH, _place_entry(offset=1 << 70)),
    Edit("an offset below 0", _OUTSIDE, _place_entry(offset=-1)),
    Edit("an offset inside the entry", _LOST, _place_entry(offset=3)),
    Edit("a length beyond the file", _MEMORY, _place_entry(length=1 << 60)),
    Edit("a length below 0", _OUTSIDE, _place_entry(length=-1)),
    Edit("a length of 0", _LOST, _place_entry(length=0)),
    Edit("a length of a part", _LOST, _place_entry(length=100)),
    Edit("a number that is a text", _CRASH, _place_entry(offset="0")),
    Edit("a name that is no text", _CRASH, _place_entry(relative_path=7)),
    Edit(
        "transforms without number", _CRASH, _place_entry(transform_descriptors=["zstd"] * 100_000)
    ),
    Edit("a tensor without a place", _LOST, _remove_place),
    Edit("the entry of another key", _LOST, _swap_entry),
    Edit("a tensor of 8 TiB", _MEMORY, _set_absurd_size(1 << 40)),
    Edit("a tensor of 2**62 elements", _MEMORY, _set_absurd_size(1 << 62)),
    Edit("sizes whose product wraps around", _MEMORY, _set_absurd_size(1 << 32, 1 << 32)),
    Edit("sizes whose product wraps around to few", _OUTSIDE, _set_absurd_size(1 << 62, 4)),
    Edit("sizes below 0", _CRASH, _set_absurd_size(-1, -24)),
    Edit("10,000 dimensions", _MEMORY, _set_absurd_size(*[1] * 10_000)),
    Edit("a tensor longer than its chunks", _LOST, _grow_tensor),
    Edit("a tensor without chunks", _LOST, _set_attribute("entry.chunks", [])),
    Edit("a chunk upon another", _LOST, _overlap_chunks),
    Edit("one chunk 20,000 times", _MEMORY, _many_chunks),
    Edit("a chunk beyond its tensor", _OUTSIDE, _shift_place(1)),
    Edit("a chunk before its tensor", _OUTSIDE, _shift_place(-1)),
    Edit("a chunk that wraps around", _OUTSIDE, _shift_place(LAST)),
    Edit("chunks of other dimensions", _OUTSIDE, _flatten_chunks),
    Edit("a wider dtype", _OUTSIDE, _change_dtype(torch.complex128)),
    Edit("a narrower dtype", _LOST, _change_dtype(torch.uint8)),
    Edit("a dtype that is a text", _CRASH, _change_dtype("float32")),  # type: ignore[arg-type]  # a lie
    Edit("a size that is a tuple", _CRASH, _set_attribute("entry.size", (24,))),
    Edit("a chunk's size that is a list", _CRASH, _set_attribute("chunk.sizes", [24])),
    Edit("properties that are nothing", _CRASH, _set_attribute("entry.properties", None)),
    Edit("keys that are nothing", _CRASH, _set_attribute("state_dict_metadata", None)),
    Edit("places that are a list", _CRASH, _set_attribute("storage_data", [])),
    Edit("a value beyond the file", _MEMORY, _place_entry(length=1 << 60), "value"),
    Edit("a value without a place", _LOST, _remove_place, "value"),
    Edit("a value whose entry is a tensor's part", _LOST, _place_entry(offset=64), "value"),
)
