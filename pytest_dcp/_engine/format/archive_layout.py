"""A zip archive laid out as `torch.save` lays it out: every record where torch would put it.

The parts are made in order, and the caller writes the content of large records: `begin` and `end`
give the bytes before and after it, and `skip` steps over it.

- Every record's content starts at a multiple of 64 bytes, behind an extra field `FB` of padding.
- A record of 4 GiB - 1 bytes or more, or starting at or after that offset, is in zip64 form.

Pure (no I/O). The zip format is APPNOTE.TXT 6.3.10 of PKWARE; torch's form of it is
caffe2/serialize/inline_container.cc and miniz of torch 2.13.
"""

from __future__ import annotations

from zlib import crc32

from pytest_dcp._engine.format import zip_archive as form

ALIGNMENT = 64
_MASK64 = (1 << 64) - 1


class ArchiveLayout:
    """An archive being laid out: the bytes emitted since `take`, and the directory so far."""

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
        self._taken_until = 0

    def add(self, name: bytes, content: bytes) -> tuple[int, int]:
        """Emits a record; returns where its content and its descriptor's CRC start."""
        self.begin(name, len(content))
        at = self.cursor - self._taken_until
        self._emit(content)
        return at, self.end(name, len(content), crc32(content))

    def begin(self, name: bytes, nbytes: int) -> None:
        """Emits a record's local header, padded so that the content starts aligned.

        With bit 3 set the header has no CRC and no sizes; torch writes the size, a zero and, if
        needed, the header's own offset into the zip64 field here.
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
        at = self.cursor - self._taken_until + 4
        offset = self._offset
        if nbytes:  # an empty record has no descriptor and does not count in the fingerprint
            self.seed = combine_fingerprint(self.seed, crc)
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
        """The bytes emitted since the last call."""
        emitted, self._chunks = b"".join(self._chunks), []
        self._taken_until = self.cursor
        return emitted

    def skip(self, nbytes: int) -> None:
        """Leaves room for content that the caller writes; take the emitted bytes first."""
        self.cursor += nbytes
        self._taken_until = self.cursor

    def finish(self) -> tuple[bytes, list[int]]:
        """The bytes emitted since `take`, the directory and the end records; and the offsets of its
        CRCs.

        The zip64 end record is always written, needed or not.
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
        base = start - self._taken_until
        self._emit(ends)
        return self.take(), [base + at for at in self._central_crcs]

    def _emit(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self.cursor += len(chunk)


def combine_fingerprint(seed: int, *crcs: int) -> int:
    """c10::hash_combine, which folds each record's CRC into the fingerprint."""
    for crc in crcs:
        seed ^= (crc + 0x9E37_79B9 + (seed << 6) + (seed >> 2)) & _MASK64
    return seed


def add_constants(archive: ArchiveLayout) -> None:
    archive.add(b"archive/.format_version", b"1")
    archive.add(b"archive/.storage_alignment", b"64")
    archive.add(b"archive/byteorder", b"little")


def _zip64_extra(*values: int) -> bytes:
    """The zip64 extra field that holds these 64-bit values, or nothing when there are none."""
    if not values:
        return b""
    head = form.ZIP64_EXTRA_ID.to_bytes(2, "little") + (8 * len(values)).to_bytes(2, "little")
    return head + b"".join(value.to_bytes(8, "little") for value in values)


def _flags(nbytes: int) -> int:
    return form.FLAG_UTF8 | (form.FLAG_DESCRIPTOR if nbytes else 0)
