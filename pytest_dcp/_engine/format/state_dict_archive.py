"""A whole state dict as `torch.save` writes it, with the tensors' bytes to be filled in.

The archive begins with a record for each tensor, so that their places are known before anything is
read; the pickle, which also holds the values, comes after them. A reader finds records by name, so
we can choose the order.

How a file is made: `place_tensors` says where each tensor's bytes go; the caller writes them there;
`close_archive`, given their CRCs and the pickle, gives all the other bytes. Pure (no I/O).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pytest_dcp._engine.format.archive_layout import ArchiveLayout, add_constants
from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.format.python_values import PICKLE_PROTOCOL
from pytest_dcp._torch_internals.tensors import identity_of_storage, take_apart_typed_storage


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where the bytes of a storage lie in the file."""

    key: str
    """The storage's key in the pickle: the record is `data/{key}`."""
    offset: int
    """Bytes from the file's start, a multiple of 64."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class ArchivePiece:
    """Bytes to be written at an offset of the file."""

    offset: int
    content: bytes | memoryview


def place_tensors(sizes: Sequence[int]) -> tuple[list[TensorPlace], int]:
    """A place for each storage of the given size, and where the last one's record ends."""
    archive = ArchiveLayout()
    places: list[TensorPlace] = []
    for number, nbytes in enumerate(sizes):
        archive.begin(_record(str(number)), nbytes)
        archive.take()
        places.append(TensorPlace(str(number), archive.cursor, nbytes))
        archive.skip(nbytes)
        archive.end(_record(str(number)), nbytes, crc=0)
        archive.take()
    return places, archive.cursor


def close_archive(
    places: Sequence[TensorPlace],
    crcs: Sequence[int],
    pickled: bytes,
    others: Mapping[str, bytes | memoryview],
) -> list[ArchivePiece]:
    """All bytes of the archive except those of the placed storages.

    crcs: CRC-32 of each placed storage.
    others: the further storages that the pickle refers to, by key.
    """
    archive = ArchiveLayout()
    pieces: list[ArchivePiece] = []

    def take() -> None:
        content = archive.take()
        pieces.append(ArchivePiece(archive.cursor - len(content), content))

    for place, crc in zip(places, crcs, strict=True):
        archive.begin(_record(place.key), place.nbytes)
        take()
        archive.skip(place.nbytes)
        archive.end(_record(place.key), place.nbytes, crc)
    archive.add(b"archive/data.pkl", pickled)
    add_constants(archive)
    for key, content in others.items():
        archive.begin(_record(key), len(content))
        take()
        pieces.append(ArchivePiece(archive.cursor, content))
        archive.skip(len(content))
        archive.end(_record(key), len(content), crc32(content))
    archive.add(b"archive/version", b"3\n")
    tail, _ = archive.finish()
    pieces.append(ArchivePiece(archive.cursor - len(tail), tail))
    return pieces


def pickle_state_dict(
    state_dict: object, key_of: Callable[[torch.UntypedStorage], str | None]
) -> tuple[bytes, dict[str, torch.UntypedStorage]]:
    """The pickle of a state dict, and the storages that it refers to besides the placed ones.

    key_of: the key of a placed storage; None for any other.
    """
    stream = io.BytesIO()
    pickler = _StatePickler(stream, key_of)
    pickler.dump(state_dict)
    return stream.getvalue(), pickler.others


class _StatePickler(pickle.Pickler):
    """Pickles as `torch.save` does: a storage becomes ('storage', class, key, 'cpu', elements)."""

    def __init__(
        self, stream: io.BytesIO, key_of: Callable[[torch.UntypedStorage], str | None]
    ) -> None:
        super().__init__(stream, PICKLE_PROTOCOL)
        self.others: dict[str, torch.UntypedStorage] = {}
        self._key_of = key_of
        self._keys: dict[int, str] = {}

    def persistent_id(self, value: object) -> tuple[str, object, str, str, int] | None:
        """The stand-in for a storage in the pickle; None for everything else."""
        storage: Any = value
        if isinstance(value, torch.storage.TypedStorage):
            name, storage, numel = take_apart_typed_storage(value)
            kind: object = getattr(torch, name)
        elif isinstance(value, torch.UntypedStorage):
            kind, numel = torch.UntypedStorage, value.nbytes()
        else:
            return None
        key = self._key_of(storage) or self._other_key(storage)
        return ("storage", kind, key, "cpu", numel)

    def _other_key(self, storage: Any) -> str:
        identity = identity_of_storage(storage)
        key = self._keys.get(identity)
        if key is None:
            key = self._keys[identity] = f"value-{len(self.others)}"
            self.others[key] = storage.cpu()
        return key


def _record(key: str) -> bytes:
    return b"archive/data/" + key.encode()
