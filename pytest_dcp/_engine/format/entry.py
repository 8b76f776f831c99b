"""Entries: a tensor's dtype and shape -> the bytes around its data; a value's pickle <-> its entry.

A data file is a concatenation of entries. Each is the stored (uncompressed) zip archive that
`torch.save` of torch 2.13 writes to a stream, to the byte, so any reader that has `torch.load`
opens it. For a tensor everything but the data, its CRC and the fingerprint made of the CRCs is a
function of dtype and shape: that is an `EntryFrame`, made once per kind of tensor and kept.

Rules inside:

- Pure (no I/O); the tensor's bytes are never touched, and never copied.
- Offsets are relative to the entry's start, so an entry may start anywhere in its file.
- Every record's content starts at a multiple of 64 bytes, behind an extra field `FB` of padding.
- A record of 4 GiB - 1 bytes or more, or starting at or after that offset, is in zip64 form.
- The record `.data/serialization_id` is a fingerprint that no reader checks. If data begins with
  the signature of a descriptor, torch mistakes it for one and counts four bytes more: such an entry
  differs from torch's only in the fingerprint and its CRC.

The zip format is APPNOTE.TXT 6.3.10 of PKWARE; torch's form of it is
caffe2/serialize/inline_container.cc and miniz of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from zlib import crc32

import torch

from pytest_dcp._engine.format import zip_archive as form
from pytest_dcp._engine.format.archive_layout import (
    ArchiveLayout,
    add_constants,
    combine_fingerprint,
)

_PICKLE_NAME = b"archive/data.pkl"
_DATA_NAME = b"archive/data/0"
_ID_NAME = b"archive/.data/serialization_id"
_VERSION_CONTENT = b"3\n"
_VERSION_CRC = crc32(_VERSION_CONTENT)

# The first half of the fingerprint hashes the records' names (std::hash of libstdc++ in the order
# of an unordered_set), so it is one constant for tensors and one for values without storages.
_TENSOR_NAMES_HASH = b"15728199511854643026"
_VALUE_NAMES_HASH = b"02908468677762923104"

_KEPT_FRAMES = 4096
"""Frames of about 2 kB each. A model has few distinct (dtype, shape) pairs compared with its
tensors."""

_VALUE_DIRECTORY_LIMIT = 16 << 20
"""Bytes of a value's directory; each tensor that the value holds takes about 70."""

# Storage classes of pickle format v2. Every other dtype is written untyped, in format v3.
_STORAGE_CLASSES = {
    torch.float64: b"DoubleStorage",
    torch.float32: b"FloatStorage",
    torch.float16: b"HalfStorage",
    torch.bfloat16: b"BFloat16Storage",
    torch.int64: b"LongStorage",
    torch.int32: b"IntStorage",
    torch.int16: b"ShortStorage",
    torch.int8: b"CharStorage",
    torch.uint8: b"ByteStorage",
    torch.bool: b"BoolStorage",
    torch.complex128: b"ComplexDoubleStorage",
    torch.complex64: b"ComplexFloatStorage",
}
_UNTYPED = frozenset(
    {
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.complex32,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
        torch.float4_e2m1fn_x2,
        torch.bits8,
        torch.bits16,
        torch.bits1x8,
        torch.bits2x4,
        torch.bits4x2,
    }
)


@dataclass(frozen=True, slots=True)
class EntryFrame:
    """The bytes around one contiguous tensor's data: a function of its dtype and shape.

    The entry is `head`, then `data_nbytes` bytes of data, then `tail(crc)`.
    """

    head: bytes
    """From the entry's start up to the data; its length is a multiple of 64."""
    data_nbytes: int
    length: int
    """Of the whole entry, in bytes."""
    _seed: int = field(repr=False)
    """The fingerprint of the records before the data."""
    _parts: tuple[bytes, ...] = field(repr=False)
    """The tail, split where a CRC or the fingerprint goes; one part if the data is empty."""

    def tail(self, crc: int) -> bytes:
        """The bytes after the data, whose true CRC-32 is `crc` (0 for an empty tensor)."""
        if not self.data_nbytes:
            return self._parts[0]
        data_crc = crc.to_bytes(4, "little")
        digest = combine_fingerprint(self._seed, crc, _VERSION_CRC)
        identity = b"%b%020d" % (_TENSOR_NAMES_HASH, digest)
        id_crc = crc32(identity).to_bytes(4, "little")
        a, b, c, d, e, f = self._parts
        return b"".join((a, data_crc, b, identity, c, id_crc, d, data_crc, e, id_crc, f))


@lru_cache(maxsize=_KEPT_FRAMES)
def tensor_frame(dtype: torch.dtype, shape: tuple[int, ...]) -> EntryFrame:
    """The frame of a contiguous tensor that needs no gradient.

    Raises:
        TypeError: the dtype has no plain storage (quantised, or narrower than its byte).
        ValueError: a dimension is negative.
    """
    if any(size < 0 for size in shape):
        raise ValueError(f"expected dimensions of 0 or more, got shape {shape!r}")
    data_nbytes = prod(shape) * dtype.itemsize
    archive = ArchiveLayout()
    archive.add(_PICKLE_NAME, tensor_pickle(dtype, shape))
    add_constants(archive)
    archive.begin(_DATA_NAME, data_nbytes)
    head = archive.take()
    seed = archive.seed
    archive.skip(data_nbytes)
    crc_at = archive.end(_DATA_NAME, data_nbytes, crc=0)
    archive.add(b"archive/version", _VERSION_CONTENT)
    identity = b"%b%020d" % (_TENSOR_NAMES_HASH, archive.seed)
    id_at, id_crc_at = archive.add(_ID_NAME, identity)
    tail, central_at = archive.finish()
    length = len(head) + data_nbytes + len(tail)
    if not data_nbytes:
        return EntryFrame(head, 0, length, seed, (tail,))
    holes = ((crc_at, 4), (id_at, 40), (id_crc_at, 4), (central_at[-3], 4), (central_at[-1], 4))
    return EntryFrame(head, data_nbytes, length, seed, _cut(tail, holes))


def value_entry(pickled: bytes) -> bytes:
    """The whole entry of a Python value that holds no tensor; `pickled` is its pickle in protocol
    2."""
    archive = ArchiveLayout()
    archive.add(_PICKLE_NAME, pickled)
    add_constants(archive)
    archive.add(b"archive/version", _VERSION_CONTENT)
    archive.add(_ID_NAME, b"%b%020d" % (_VALUE_NAMES_HASH, archive.seed))
    return archive.finish()[0]


def pickle_of(entry: bytes | memoryview) -> memoryview:
    """The bytes of data.pkl in a whole entry, a view of it; their CRC has been checked.

    Works for every entry that torch wrote, of any version and with or without tensors.

    Raises:
        CheckpointCorruptError: the entry is damaged.
    """
    return memoryview(records_of(entry)("data.pkl"))


def records_of(entry: bytes | memoryview) -> Callable[[str], bytes | memoryview]:
    """A function that gives the content of a whole entry's records by name, checking each CRC.

    Raises:
        CheckpointCorruptError: the entry or the requested record is damaged or missing, or the
            numbers of a storage are not little-endian.
    """
    view = memoryview(entry).cast("B")
    source = form.Source(lambda offset, nbytes: view[offset : offset + nbytes], len(view))
    directory = form.read_directory(source, _VALUE_DIRECTORY_LIMIT)

    def read(name: str) -> bytes | memoryview:
        if name.startswith("data/") and "byteorder" in directory.records:
            order = form.content(source, directory, "byteorder", len(view))
            if bytes(order) != b"little":
                raise form.corrupt("expected little-endian numbers, got others", 0)
        return form.content(source, directory, name, len(view))

    return read


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The row-major stride that torch gives a shape, in elements; sizes of 0 count as 1."""
    stride = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        stride[i - 1] = stride[i] * (shape[i] or 1)
    return tuple(stride)


def tensor_pickle(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """The data.pkl of a contiguous tensor on the CPU: the opcodes that torch's pickler emits.

    Protocol 2: `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad,
    hooks)`; v3 adds the dtype and counts the untyped storage in bytes.
    """
    name = _STORAGE_CLASSES.get(dtype)
    if name is None and dtype not in _UNTYPED:
        raise TypeError(
            f"expected a dtype of plain elements of whole bytes, got {dtype!r}; "
            "quantised tensors must be dequantised before they are saved"
        )
    version, storage, numel, extra = b"2", b"torch\n%b" % (name or b""), prod(shape), b""
    if name is None:
        version, storage, numel = b"3", b"torch.storage\nUntypedStorage", numel * dtype.itemsize
        extra = b"ctorch\n%b\n" % str(dtype).removeprefix("torch.").encode()
    size, memo = _pickled_tuple(shape, 6)
    stride, memo = _pickled_tuple(contiguous_stride(shape), memo)
    hooks = b"\x89ccollections\nOrderedDict\nq%c)Rq%c" % (memo, memo + 1)
    memo += 2
    if extra:
        extra += b"q%c" % memo
        memo += 1
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v%b\nq\x00((X\x07\x00\x00\x00storageq\x01c%b\nq\x02"
        b"X\x01\x00\x00\x000q\x03X\x03\x00\x00\x00cpuq\x04%btq\x05QK\x00%b%b%b%btq%cRq%c."
    ) % (version, storage, _pickled_int(numel), size, stride, hooks, extra, memo, memo + 1)


def _pickled_tuple(values: tuple[int, ...], memo: int) -> tuple[bytes, int]:
    """The opcodes that push a tuple of integers, and the next free memo index."""
    items = b"".join(map(_pickled_int, values))
    match len(values):
        case 0:
            return b")", memo
        case 1 | 2 | 3:
            return b"%b%cq%c" % (items, 0x84 + len(values), memo), memo + 1
        case _:
            return b"(%btq%c" % (items, memo), memo + 1


def _pickled_int(value: int) -> bytes:
    """The opcode that pushes an integer of 0 or more: the shortest, as pickle chooses it."""
    if value < 1 << 8:
        return b"K%c" % value
    if value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if value < 1 << 31:
        return b"J" + value.to_bytes(4, "little")
    nbytes = value.bit_length() // 8 + 1  # one bit more, for the sign
    return b"\x8a%c" % nbytes + value.to_bytes(nbytes, "little")


def _cut(tail: bytes, holes: tuple[tuple[int, int], ...]) -> tuple[bytes, ...]:
    """The pieces of a tail between its holes, each hole a place and a length."""
    starts = [0, *(at + n for at, n in holes)]
    ends = [*(at for at, _ in holes), len(tail)]
    return tuple(tail[start:end] for start, end in zip(starts, ends, strict=True))
