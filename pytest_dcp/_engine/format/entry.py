"""Entries: a tensor's dtype and shape -> the bytes around its data; a value's pickle <-> its entry.

A data file is a concatenation of entries. Each is the stored (uncompressed) zip archive that
`torch.save` of torch 2.13 writes to a stream, to the byte, so any reader that has `torch.load`
opens it. For a tensor everything but the data, its CRC and the fingerprint made of the CRCs is a
function of dtype and shape: that is an `EntryFrame`, made once per kind of tensor and kept.

Rules inside:

- Pure (no I/O); the tensor's bytes are never touched, and never copied.
- Offsets are relative to the entry's start, so an entry may start anywhere in its file.
- Every record's content starts at a multiple of 64 bytes, behind an extra field `FB` of padding.
- A record of 4 GiB - 1 bytes or more, or one that starts at or after that, is in zip64 form.
- The record `.data/serialization_id` is a fingerprint that no reader checks. torch takes data that
  begin with the signature of a descriptor for one and counts four bytes more: such an entry
  differs from torch's in the fingerprint and its CRC alone.

The zip format is APPNOTE.TXT 6.3.10 of PKWARE; what torch makes of it is
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

ALIGNMENT = 64
_PICKLE_NAME = b"archive/data.pkl"
_DATA_NAME = b"archive/data/0"
_ID_NAME = b"archive/.data/serialization_id"
_VERSION_CONTENT = b"3\n"
_VERSION_CRC = crc32(_VERSION_CONTENT)

# The first half of the fingerprint hashes the records' names (std::hash of libstdc++ in the order
# of an unordered_set), so it is one constant for tensors and one for values without storages.
_TENSOR_NAMES_HASH = b"15728199511854643026"
_VALUE_NAMES_HASH = b"02908468677762923104"

_MASK64 = (1 << 64) - 1

_KEPT_FRAMES = 4096
"""About 2 kB each. A model's distinct (dtype, shape) pairs are few next to its tensors."""

_VALUE_DIRECTORY_LIMIT = 16 << 20
"""Bytes of a value's directory, in which each tensor that the value holds takes about 70."""

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
    """The tail, cut where a CRC or the fingerprint goes; one part when the data is empty."""

    def tail(self, crc: int) -> bytes:
        """What follows the data, whose true CRC-32 is `crc` (0 for an empty tensor)."""
        if not self.data_nbytes:
            return self._parts[0]
        data_crc = crc.to_bytes(4, "little")
        digest = _combine(_combine(self._seed, crc), _VERSION_CRC)
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
    archive = _Archive()
    archive.add(_PICKLE_NAME, tensor_pickle(dtype, shape))
    _add_constants(archive)
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
    """The whole entry of a Python value that holds no tensor; `pickled` is it in protocol 2."""
    archive = _Archive()
    archive.add(_PICKLE_NAME, pickled)
    _add_constants(archive)
    archive.add(b"archive/version", _VERSION_CONTENT)
    archive.add(_ID_NAME, b"%b%020d" % (_VALUE_NAMES_HASH, archive.seed))
    return archive.finish()[0]


def pickle_of(entry: bytes | memoryview) -> memoryview:
    """The bytes of data.pkl in a whole entry, a view of it; their CRC has been checked.

    Holds for every entry that torch wrote, of whatever version and with or without tensors.

    Raises:
        CheckpointCorruptError: the entry is damaged.
    """
    return memoryview(records_of(entry)("data.pkl"))


def records_of(entry: bytes | memoryview) -> Callable[[str], bytes | memoryview]:
    """What gives the content of a whole entry's records by name; each CRC is checked.

    Raises:
        CheckpointCorruptError: the entry, or the record that is asked for, is damaged or missing,
            or the numbers of a storage are not little-endian.
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
    """The data.pkl of a contiguous tensor on the CPU: the opcodes torch's pickler makes.

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
    """The opcodes that push a tuple of integers, and the next free place of the memo."""
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


def _combine(seed: int, crc: int) -> int:
    """c10::hash_combine, which folds each record's CRC into the fingerprint."""
    return seed ^ ((crc + 0x9E37_79B9 + (seed << 6) + (seed >> 2)) & _MASK64)


def _add_constants(archive: _Archive) -> None:
    archive.add(b"archive/.format_version", b"1")
    archive.add(b"archive/.storage_alignment", b"64")
    archive.add(b"archive/byteorder", b"little")


def _cut(tail: bytes, holes: tuple[tuple[int, int], ...]) -> tuple[bytes, ...]:
    """The pieces of a tail between its holes, each hole a place and a length."""
    starts = [0, *(at + n for at, n in holes)]
    ends = [*(at for at, _ in holes), len(tail)]
    return tuple(tail[start:end] for start, end in zip(starts, ends, strict=True))


def _zip64_extra(*values: int) -> bytes:
    """The zip64 extra field that holds these 64-bit values, or nothing when there are none."""
    if not values:
        return b""
    head = form.ZIP64_EXTRA_ID.to_bytes(2, "little") + (8 * len(values)).to_bytes(2, "little")
    return head + b"".join(value.to_bytes(8, "little") for value in values)


class _Archive:
    """An archive being laid out: what was emitted since `take`, and the directory to come."""

    def __init__(self) -> None:
        self.cursor = 0
        """Where the next byte goes, from the entry's start."""
        self.seed = 0
        """The fingerprint of the records so far."""
        self._chunks: list[bytes] = []
        self._central: list[bytes] = []
        self._central_crcs: list[int] = []
        self._central_nbytes = 0
        self._count = 0
        self._offset = 0
        self._taken = 0

    def add(self, name: bytes, content: bytes) -> tuple[int, int]:
        """Emits a record; returns where its content and its descriptor's CRC start."""
        self.begin(name, len(content))
        at = self.cursor - self._taken
        self._emit(content)
        return at, self.end(name, len(content), crc32(content))

    def begin(self, name: bytes, nbytes: int) -> None:
        """Emits a record's local header, padded so that the content starts aligned.

        With bit 3 set the header has no CRC and no sizes; what torch writes in the zip64 field
        here is the size, a zero and, where it needs it, the header's own offset.
        """
        self._offset = offset = self.cursor
        sizes = (nbytes, 0) if nbytes >= form.MAX32 else ()
        wide = _zip64_extra(*sizes, *((offset,) if offset >= form.MAX32 else ()))
        fixed = offset + form.LOCAL_HEADER.size + len(name) + len(wide) + 4
        npad = -fixed % ALIGNMENT
        pad = b"FB%c\x00%b" % (npad, b"Z" * npad)
        flags = _flags(nbytes)
        nextra = len(wide) + 4 + npad
        header = form.LOCAL_HEADER.pack(
            form.LOCAL_SIGNATURE, 0, flags, 0, 0, 0, 0, 0, 0, len(name), nextra
        )
        self._emit(header + name + wide + pad)

    def end(self, name: bytes, nbytes: int, crc: int) -> int:
        """Emits a record's descriptor and notes its directory entry; returns the CRC's place."""
        at = self.cursor - self._taken + 4
        offset = self._offset
        if nbytes:  # an empty record has no descriptor, and no part in the fingerprint
            self.seed = _combine(self.seed, crc)
            layout = form.DESCRIPTOR64 if max(nbytes, offset) >= form.MAX32 else form.DESCRIPTOR
            self._emit(layout.pack(form.DESCRIPTOR_SIGNATURE, crc, nbytes, nbytes))
        sizes = (nbytes, nbytes) if nbytes >= form.MAX32 else ()
        wide = _zip64_extra(*sizes, *((offset,) if offset >= form.MAX32 else ()))
        size32, offset32 = min(nbytes, form.MAX32), min(offset, form.MAX32)
        self._central_crcs.append(self._central_nbytes + 16)
        central = form.CENTRAL_HEADER.pack(
            form.CENTRAL_SIGNATURE, 0, 0, _flags(nbytes), 0, 0, 0, crc, size32, size32,
            len(name), len(wide), 0, 0, 0, 0, offset32,
        )  # fmt: skip
        self._central.append(central + name + wide)
        self._central_nbytes += len(self._central[-1])
        self._count += 1
        return at

    def take(self) -> bytes:
        """What was emitted since the last call."""
        taken, self._chunks = b"".join(self._chunks), []
        self._taken = self.cursor
        return taken

    def skip(self, nbytes: int) -> None:
        """Leaves room for content that someone else writes; what was emitted must be taken."""
        self.cursor += nbytes
        self._taken = self.cursor

    def finish(self) -> tuple[bytes, list[int]]:
        """What was emitted since `take`, the directory and the ends; where its CRCs are.

        The zip64 end record is written always, needed or not.
        """
        start, nbytes, count = self.cursor, self._central_nbytes, self._count
        self._emit(b"".join(self._central))
        ends = form.END64.pack(
            form.END64_SIGNATURE,
            form.END64.size - 12,
            0x031E,
            45,
            0,
            0,
            count,
            count,
            nbytes,
            start,
        )
        ends += form.END64_LOCATOR.pack(form.END64_LOCATOR_SIGNATURE, 0, self.cursor, 1)
        ends += form.END.pack(
            form.END_SIGNATURE, 0, 0, count, count, nbytes, min(start, form.MAX32), 0
        )
        base = start - self._taken
        self._emit(ends)
        return self.take(), [base + at for at in self._central_crcs]

    def _emit(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self.cursor += len(chunk)


def _flags(nbytes: int) -> int:
    return form.FLAG_UTF8 | (form.FLAG_DESCRIPTOR if nbytes else 0)
