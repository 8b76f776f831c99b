"""The file of `torch.save`: unpickled without its elements, which are read by position when used.

    directory and pickle -> the state dict, whose tensors have no memory (`meta`) but known storages
    a part of a tensor   -> its record in the file, and the bytes of it

Nothing is mapped: a mapped page that is touched after the file was cut off ends the process
(SIGBUS), and `torch.save` cuts off the file that it writes over. The bytes come through the open
descriptor, where a file that has changed is an error.

A record has one checksum, over all its bytes. It is checked when the record is first used: while
the record is read as a whole, or else by one more pass over it before the part is read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.format.python_values import decode_pickle
from pytest_dcp._engine.format.zip_archive import (
    Source,
    ZipRecord,
    content,
    content_offset,
    corrupt,
    read_directory,
)
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.local_file import LocalIn
from pytest_dcp._engine.io.tensor_memory import memory_of
from pytest_dcp._engine.lazy_reading.locate import ZIP_SIGNATURE
from pytest_dcp._engine.lazy_reading.tensors_within import replace_tensors
from pytest_dcp._engine.unpickle.trusted_pickles import unpickle_trusted
from pytest_dcp._torch_internals.tensors import identity_of_storage
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointReplacedError,
    UntrustedPickleError,
)

WINDOW_BYTES = 16 << 20
"""Read at a time into memory of its own, where elements are not copied as they lie."""
SMALL_BYTES = 4 << 10
MOST_WASTE = 8
"""A part with gaps is read with them, if it is small, or if less than this many times its own
bytes are read. Otherwise it is split: a column of a large matrix takes a read for each row."""
PIECE_BYTES = 1 << 20
"""Read at a time to be checked alone."""
DIRECTORY_LIMIT = 64 << 20
"""Bytes of a directory; each tensor takes about 70."""


class TorchSaveFile:
    """An open file, and its records."""

    def __init__(self, folder: Folder, name: str, *, verify: bool = True) -> None:
        """verify: whether checksums are checked.

        Raises OSError if it cannot be opened; CheckpointCorruptError for a file that is not from
        `torch.save`, or whose directory is damaged.
        """
        is_local = isinstance(folder.disk, LocalDisk)
        self.path = str(Path(folder.path) / name) if is_local else f"{folder}/{name}"
        """Or its URL."""
        self._verify = verify
        self._until_closed = ExitStack()
        self._file = self._until_closed.enter_context(folder.open(name))
        try:
            self._identity = self._look()
            self._size = self._file.size
            self._check_signature()
            self._directory = read_directory(self._make_source(), DIRECTORY_LIMIT)
        except BaseException:
            self._until_closed.close()
            raise
        self._storages: dict[str, torch.UntypedStorage] = {}
        self._records: dict[int, ZipRecord] = {}
        """Of storages without memory, by the storage's identity."""
        self._starts: dict[int, int] = {}
        """Where the content of a record that was used begins, by the record's offset."""
        self._checked: set[int] = set()
        """The offsets of records whose checksum was right."""

    def unpickle(self, *, weights_only: bool) -> Any:
        """The saved object; its tensors have no memory: read them by `copy_part` or `fill_value`.

        weights_only: False allows values of any class, which can run code. If torch cannot make
            one of them without its elements, the whole file is loaded into memory.
        """
        pickled = self._read_small_record("data.pkl")
        try:
            return decode_pickle(pickled, self._make_storage)
        except UntrustedPickleError:
            if weights_only:
                raise
        try:
            return unpickle_trusted(pickled, self._make_storage)
        except Exception:  # noqa: BLE001 - of the file's own code, and raised again by torch.load
            whole = io.BytesIO(self._read_bytes(0, self._size))
            return torch.load(whole, map_location="cpu", weights_only=False)

    def copy_part(self, part: torch.Tensor, target: torch.Tensor) -> int:
        """Copy a part of a tensor from the file; returns the bytes read, without bytes that were
        only checked.

        Raises CheckpointReplacedError if the file was written to since it was opened, and
        CheckpointCorruptError for a record that is damaged.
        """
        self._check_unchanged()
        read_bytes = self._copy(part, target)
        self._check_unchanged()
        return read_bytes

    def fill_value(self, value: Any) -> Any:
        """A value with the elements of the tensors within it; the same object if it has none."""
        return replace_tensors(value, self._read_tensors)

    @property
    def has_checksums(self) -> bool:
        """Whether its records have checksums; torch has an option to leave them out."""
        return self._directory.has_crcs

    def identify(self) -> str:
        """The size and time of modification at the opening."""
        return repr(self._identity)

    def close(self) -> None:
        """Close the file."""
        self._until_closed.close()

    def _make_storage(self, key: str) -> torch.UntypedStorage:
        """A storage without memory, for a record."""
        found = self._storages.get(key)
        if found is None:
            self._check_byteorder()
            record = self._directory.record(f"data/{key}")
            empty = torch.empty(record.nbytes, dtype=torch.uint8, device="meta")
            found = self._storages[key] = empty.untyped_storage()
            self._records[identity_of_storage(found)] = record
        return found

    def _check_byteorder(self) -> None:
        if not self._storages and "byteorder" in self._directory.records:
            order = self._read_small_record("byteorder")
            if bytes(order) != b"little":
                raise corrupt("expected little-endian numbers, got others", 0)

    def _read_small_record(self, name: str) -> bytes | memoryview:
        return content(self._make_source(), self._directory, name, self._size)

    def _make_source(self) -> Source:
        return Source(self._read_bytes, self._size)

    def _read_tensors(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors with memory; tensors that shared a storage share it again."""
        self._check_unchanged()
        storages: dict[int, torch.UntypedStorage] = {}
        found = [self._read_tensor(tensor, storages) for tensor in tensors]
        self._check_unchanged()
        return found

    def _read_tensor(
        self, tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]
    ) -> torch.Tensor:
        storage = tensor.untyped_storage()
        identity = identity_of_storage(storage)
        if identity not in storages:
            record = self._record_of(tensor)
            whole = torch.empty(record.nbytes, dtype=torch.uint8)
            self._read_record(record, 0, whole)
            storages[identity] = whole.untyped_storage()
        filled = torch.empty(0, dtype=tensor.dtype)
        offset = int(tensor.storage_offset())
        return filled.set_(storages[identity], offset, tensor.shape, tensor.stride())

    def _copy(self, part: torch.Tensor, target: torch.Tensor) -> int:
        if not part.numel():
            return 0
        if not part.is_meta:
            target.copy_(part)
            return 0
        record = self._record_of(part)
        start = int(part.storage_offset()) * part.itemsize
        if _is_same_memory(part, target):
            return self._read_record(record, start, target)
        steps = [(n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True)]
        span = 1 + sum(steps)
        if _is_read_at_once(span * part.itemsize, part.numel() * part.itemsize):
            return self._read_span(record, start, span, part, target)
        dim = steps.index(max(steps))
        half = part.shape[dim] // 2
        return sum(
            self._copy(part.narrow(dim, *piece), target.narrow(dim, *piece))
            for piece in ((0, half), (half, part.shape[dim] - half))
        )

    def _record_of(self, tensor: torch.Tensor) -> ZipRecord:
        record = self._records.get(identity_of_storage(tensor.untyped_storage()))
        if record is None:
            raise CheckpointMismatchError(
                f"a tensor of {tuple(tensor.shape)} in {self.path} was saved without elements"
            )
        return record

    def _read_span(
        self,
        record: ZipRecord,
        start: int,
        span: int,
        part: torch.Tensor,
        target: torch.Tensor,
    ) -> int:
        """Read from the part's first element to its last, and copy its own."""
        memory = torch.empty(span, dtype=part.dtype)
        read_bytes = self._read_record(record, start, memory)
        read = memory.as_strided(part.shape, part.stride())
        read = read.conj() if part.is_conj() else read
        target.copy_(-read if part.is_neg() else read)
        return read_bytes

    def _read_record(self, record: ZipRecord, start: int, memory: torch.Tensor) -> int:
        """Fill dense memory from a byte of the record's content on; returns the bytes read."""
        view = memory_of(memory)
        is_checked = not self._must_check(record)
        if len(view) < record.nbytes and not is_checked:
            self._check_alone(record)
            is_checked = True
        self._read(self._start_of(record) + start, view)
        if not is_checked:
            self._note_checksum(record, crc32(view))
        return len(view)

    def _must_check(self, record: ZipRecord) -> bool:
        return self._verify and self._directory.has_crcs and record.offset not in self._checked

    def _check_alone(self, record: ZipRecord) -> None:
        buffer = memoryview(bytearray(min(PIECE_BYTES, record.nbytes)))
        start, crc = self._start_of(record), 0
        for at in range(0, record.nbytes, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, record.nbytes - at)]
            self._read(start + at, piece)
            crc = crc32(piece, crc)
        self._note_checksum(record, crc)

    def _note_checksum(self, record: ZipRecord, crc: int) -> None:
        if crc != record.crc:
            self._check_unchanged()  # This is the better reason.
            name = record.name.partition(b"/")[2].decode(errors="replace")
            raise CheckpointCorruptError(
                f"expected CRC {record.crc:#010x} of record {name!r}, got {crc:#010x}",
                file=self.path,
                offset=self._start_of(record),
            )
        self._checked.add(record.offset)

    def _start_of(self, record: ZipRecord) -> int:
        start = self._starts.get(record.offset)
        if start is None:
            try:
                start = content_offset(_SmallReads(self._read_bytes, self._size), record)
            except CheckpointCorruptError as error:
                self._check_unchanged()
                raise error.at(file=self.path) from error
            self._starts[record.offset] = start
        return start

    def _read(self, offset: int, view: memoryview) -> None:
        if self._read_into(offset, view) != len(view):
            raise self._replaced_error()

    def _read_bytes(self, offset: int, nbytes: int) -> memoryview:
        """These bytes; fewer at the end of the file."""
        view = memoryview(bytearray(nbytes))
        return view[: self._read_into(offset, view)]

    def _read_into(self, offset: int, view: memoryview) -> int:
        return self._file.read_into(offset, view)

    def _look(self) -> tuple[int, int]:
        """The size and time of modification now; of an object, which is never written to, 0."""
        if not isinstance(self._file, LocalIn):
            return self._file.size, 0
        status = os.fstat(self._file.fd)
        return status.st_size, status.st_mtime_ns

    def _check_signature(self) -> None:
        signature = bytes(self._read_bytes(0, len(ZIP_SIGNATURE)))
        if signature != ZIP_SIGNATURE:
            raise CheckpointCorruptError(
                f"expected the zip archive that torch.save writes, got a file that begins with "
                f"{signature!r}: a file written by torch before 1.6 must be loaded with torch.load "
                "and saved again",
                file=self.path,
            )

    def _check_unchanged(self) -> None:
        if self._look() != self._identity:
            raise self._replaced_error()

    def _replaced_error(self) -> CheckpointReplacedError:
        return CheckpointReplacedError(
            f"{self.path} was written over since it was opened: open it again"
        )


class _SmallReads(Source):
    """Reads of which none is widened: for one record's header and descriptor, far apart."""

    def __init__(self, read: Callable[[int, int], bytes | memoryview], length: int) -> None:
        super().__init__(read, 0)
        self.length = length


def _is_same_memory(part: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether the target's memory equals the part in the file, byte for byte."""
    return (
        part.is_contiguous()
        and target.is_contiguous()
        and part.dtype == target.dtype
        and target.device.type == "cpu"
        and (part.is_conj(), part.is_neg()) == (target.is_conj(), target.is_neg())
    )


def _is_read_at_once(span_bytes: int, own_bytes: int) -> bool:
    if span_bytes > WINDOW_BYTES:
        return False
    return span_bytes <= SMALL_BYTES or span_bytes < MOST_WASTE * own_bytes
