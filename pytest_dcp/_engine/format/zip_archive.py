"""Reads the zip format as entries use it: an entry's bytes -> its records, checked.

The format is APPNOTE.TXT 6.3.10 of PKWARE, without compression, encryption, parts or comments.

Rules inside:

- Everything in an entry is untrusted. Each offset and length is checked against the entry before
  use, and no more is read than the entry holds or a limit allows.
- An archive is fully accounted for or refused: its records, its directory and the end records fill
  it from the first byte to the last without a gap or an overlap, and facts that are stored twice
  agree.
- Damage raises `CheckpointCorruptError` with the offset from the entry's start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from struct import Struct
from zlib import crc32

from pytest_dcp.errors import CheckpointCorruptError

LOCAL_HEADER = Struct("<4s5H3L2H")
"""Signature, version, flags, method, time, date, crc, two sizes, lengths of name and extra."""
CENTRAL_HEADER = Struct("<4s6H3L5H2L")
"""Signature, two versions, flags, method, time, date, crc, two sizes, lengths of name, extra and
comment, disk, two attributes, offset of the local header."""
END64 = Struct("<4sQ2H2L4Q")
"""Signature, length of the rest, two versions, two disks, two counts, the directory's size and
offset."""
END64_LOCATOR = Struct("<4sLQL")
"""Signature, disk, offset of the zip64 end record, number of disks."""
END = Struct("<4s4H2LH")
"""Signature, two disks, two counts, the directory's size and offset, length of comment."""
DESCRIPTOR = Struct("<4s3L")
"""Signature, crc, two sizes: follows the content of a record whose local header lacks them."""
DESCRIPTOR64 = Struct("<4sL2Q")

LOCAL_SIGNATURE = b"PK\x03\x04"
CENTRAL_SIGNATURE = b"PK\x01\x02"
END64_SIGNATURE = b"PK\x06\x06"
END64_LOCATOR_SIGNATURE = b"PK\x06\x07"
END_SIGNATURE = b"PK\x05\x06"
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"

FLAG_DESCRIPTOR = 0x0008
FLAG_UTF8 = 0x0800
ZIP64_EXTRA_ID = 1
MAX16 = 0xFFFF
MAX32 = 0xFFFF_FFFF
"""The first value that a 32-bit field cannot hold: it means "see the zip64 extra field"."""

_TAIL_WINDOW = 2048
"""Bytes read first, from the end: torch writes about 900 after a tensor's data."""
_WINDOW = 1024
"""Bytes read if some are missing: torch writes about 700 before the data."""
_WHOLE = 4096
"""An entry up to this long is read at once."""


@dataclass(frozen=True, slots=True, order=True)
class ZipRecord:
    """One record of the archive; offsets are bytes from the entry's start."""

    offset: int
    """Of the local header."""
    name: bytes
    """With the archive's name in front."""
    flags: int
    crc: int
    nbytes: int
    end: int = 0
    """Where the next record, or the directory, starts."""


@dataclass(frozen=True, slots=True)
class Directory:
    """All records of an archive."""

    records: Mapping[str, ZipRecord]
    """By name, without the archive's name in front."""
    has_crcs: bool
    """False if the archive was written without CRCs: then every CRC is 0."""

    def record(self, name: str) -> ZipRecord:
        """The record of that name; raises `CheckpointCorruptError` if there is none."""
        found = self.records.get(name)
        if found is None:
            names = ", ".join(repr(record_name[:64]) for record_name in list(self.records)[:8])
            raise corrupt(f"expected a record {name[:64]!r}, the entry holds {names}", 0)
        return found


class Source:
    """An entry's bytes, in few reads: small reads are widened, and the bytes read are kept.

    `read(offset, n)` gives n bytes at an offset from the entry's start; fewer mean that the file
    ends too soon.
    """

    def __init__(self, read: Callable[[int, int], bytes | memoryview], length: int) -> None:
        self.length = length
        self._read = read
        self._spans: list[tuple[int, bytes | memoryview]] = []
        if length > _WHOLE:
            self._fetch(length - _TAIL_WINDOW, _TAIL_WINDOW)
        elif length > 0:
            self._fetch(0, length)

    def get(self, offset: int, nbytes: int, what: str) -> bytes | memoryview:
        """Exactly these bytes; raises `CheckpointCorruptError` if the entry does not hold them."""
        if offset < 0 or offset + nbytes > self.length:
            raise corrupt(
                f"expected {what} of {nbytes} bytes, the entry has {self.length}", max(offset, 0)
            )
        for start, span in self._spans:
            if start <= offset and offset + nbytes <= start + len(span):
                return span[offset - start : offset - start + nbytes]
        return self._fetch(offset, max(nbytes, _WINDOW))[:nbytes]

    def _fetch(self, offset: int, nbytes: int) -> bytes | memoryview:
        nbytes = min(nbytes, self.length - offset)
        span = self._read(offset, nbytes)
        if len(span) != nbytes:
            raise corrupt(f"expected {nbytes} bytes, the file gave {len(span)}", offset)
        self._spans.append((offset, span))
        return span


def read_directory(source: Source, limit: int) -> Directory:
    """The archive's records, from a directory of at most `limit` bytes.

    Checks that they lie one after the other from the entry's start to the directory, as far as the
    directory shows; `content_offset` checks the rest for a record that is used.
    """
    count, start, end = _find_directory(source)
    if end - start > limit:
        raise corrupt(f"expected a directory of {limit} bytes at most, got {end - start}", start)
    raw = source.get(start, end - start, "the directory")
    found: list[ZipRecord] = []
    at = 0
    for _ in range(count):
        record, at = _read_central(raw, at, start)
        found.append(record)
    if at != len(raw):
        raise corrupt(f"expected {count} records in the directory, found more", start + at)
    records = _in_order(found, start)
    folder = records[0].name.partition(b"/")[0] + b"/"
    by_name = {_plain_name(record, folder): record for record in records}
    if len(by_name) != count:
        raise corrupt("expected the name of each record once, one occurs twice", start)
    return Directory(by_name, any(record.crc for record in records))


def content(source: Source, directory: Directory, name: str, limit: int) -> bytes | memoryview:
    """The content of a record of at most `limit` bytes; its CRC is checked if it has one."""
    record = directory.record(name)
    if record.nbytes > limit:
        raise corrupt(
            f"expected a record {name!r} of {limit} bytes at most, got {record.nbytes}",
            record.offset,
        )
    at = content_offset(source, record)
    found = source.get(at, record.nbytes, f"the record {name!r}")
    if directory.has_crcs and crc32(found) != record.crc:
        raise corrupt(
            f"expected CRC {record.crc:#010x} of record {name!r}, got {crc32(found):#010x}", at
        )
    return found


def content_offset(source: Source, record: ZipRecord) -> int:
    """Where a record's content starts: its local header, content and descriptor fill its place."""
    at, size = record.offset, LOCAL_HEADER.size
    header = LOCAL_HEADER.unpack(source.get(at, size, "a local header"))
    signature, _, flags, method, _, _, crc, packed, nbytes, nname, nextra = header
    name = bytes(source.get(at + size, nname, "a record's name"))
    if (signature, flags, method, name) != (LOCAL_SIGNATURE, record.flags, 0, record.name):
        raise corrupt(f"expected the local header of {record.name[:64]!r}", at)
    later = bool(flags & FLAG_DESCRIPTOR)
    for local_value, true in ((crc, record.crc), (packed, record.nbytes), (nbytes, record.nbytes)):
        if local_value != min(true, MAX32) and not (later and local_value == 0):
            raise corrupt(f"the local header of {record.name[:64]!r} denies the directory", at)
    start: int = at + size + nname + nextra
    unused_bytes = record.end - start - record.nbytes
    if unused_bytes not in ((DESCRIPTOR.size, DESCRIPTOR64.size) if later else (0,)):
        raise corrupt(
            f"expected {record.name[:64]!r} to fill its place, {unused_bytes} are left", at
        )
    if later:
        _check_descriptor(source, record, start + record.nbytes)
    return start


def corrupt(reason: str, offset: int) -> CheckpointCorruptError:
    """The error that says what was expected at this offset of the entry."""
    return CheckpointCorruptError(reason, offset=offset)


def _check_descriptor(source: Source, record: ZipRecord, at: int) -> None:
    """Refuses a descriptor, from `at` to the record's end, that is not what the directory says."""
    layout = DESCRIPTOR if record.end - at == DESCRIPTOR.size else DESCRIPTOR64
    found = layout.unpack(source.get(at, layout.size, "a descriptor"))
    if found != (DESCRIPTOR_SIGNATURE, record.crc, record.nbytes, record.nbytes):
        raise corrupt(f"the descriptor of {record.name[:64]!r} denies the directory", at)


def _find_directory(source: Source) -> tuple[int, int, int]:
    """The number of records, and where the directory starts and ends."""
    at = end = source.length - END.size
    fields = END.unpack(source.get(at, END.size, "an end record"))
    signature, disk, other_disk, here, count, nbytes, start, ncomment = fields
    if signature != END_SIGNATURE or ncomment or disk or other_disk or here != count:
        raise corrupt("expected the entry to end with the end record of a whole zip archive", at)
    locator_at = at - END64_LOCATOR.size
    if locator_at >= 0 and source.get(locator_at, 4, "") == END64_LOCATOR_SIGNATURE:
        narrow = ((count, MAX16), (nbytes, MAX32), (start, MAX32))
        count, nbytes, start = wide = _find_directory64(source, locator_at)
        for (narrow_value, absent), true in zip(narrow, wide, strict=True):
            if narrow_value not in (true, absent):
                raise corrupt(f"the two end records disagree: {narrow_value} and {true}", at)
        end = locator_at - END64.size
    if start + nbytes != end or not 0 < count * CENTRAL_HEADER.size <= nbytes:
        raise corrupt(
            f"expected a directory that ends at {end}, got one of {count} records and "
            f"{nbytes} bytes from {start}",
            at,
        )
    return count, start, end


def _find_directory64(source: Source, locator_at: int) -> tuple[int, int, int]:
    """The number of records, the directory's size and its start, from the zip64 end record."""
    locator = source.get(locator_at, END64_LOCATOR.size, "a zip64 locator")
    _, disk, at, disks = END64_LOCATOR.unpack(locator)
    if disk or disks != 1 or at != locator_at - END64.size:
        raise corrupt("expected the zip64 end record right before its locator", locator_at)
    end64 = END64.unpack(source.get(at, END64.size, "a zip64 end record"))
    signature, rest, _, _, disk, other_disk, here, count, nbytes, start = end64
    plain = rest == END64.size - 12 and not disk and not other_disk and here == count
    if signature != END64_SIGNATURE or not plain:
        raise corrupt("expected the zip64 end record of a whole archive", at)
    return count, nbytes, start


def _read_central(raw: bytes | memoryview, at: int, start: int) -> tuple[ZipRecord, int]:
    """The directory's record at `at` of `raw`, and where the next one starts."""
    head = raw[at : at + CENTRAL_HEADER.size]
    if len(head) < CENTRAL_HEADER.size or head[:4] != CENTRAL_SIGNATURE:
        raise corrupt("expected a record of the zip directory", start + at)
    _, _, _, flags, method, _, _, crc, packed, nbytes, *rest = CENTRAL_HEADER.unpack(head)
    nname, nextra, ncomment, disk, _, _, offset = rest
    extra_at = at + len(head) + nname
    end = extra_at + nextra + ncomment
    if end > len(raw):
        raise corrupt("expected a record inside the directory, it runs beyond", start + at)
    name = bytes(raw[extra_at - nname : extra_at])
    if method:
        raise corrupt(f"expected stored records, {name[:64]!r} is compressed", start + at)
    if flags & ~(FLAG_UTF8 | FLAG_DESCRIPTOR) or disk:
        raise corrupt(f"expected a plain record, {name[:64]!r} has flags {flags:#x}", start + at)
    extra = bytes(raw[extra_at : extra_at + nextra])
    nbytes, packed, offset = _read_zip64(extra, (nbytes, packed, offset), start + extra_at)
    if packed != nbytes:
        raise corrupt(f"expected stored records, {name[:64]!r} has two sizes", start + at)
    if max(offset, nbytes) >= start:
        raise corrupt(f"expected {name[:64]!r} before the directory, it lies outside", start + at)
    return ZipRecord(offset, name, flags, crc, nbytes), end


def _read_zip64(extra: bytes, narrow: tuple[int, ...], where: int) -> Iterator[int]:
    """The 32-bit fields, with marked ones replaced by the values of the zip64 extra field."""
    absent = sum(value == MAX32 for value in narrow)
    wide = b""
    at = 0
    while absent and at + 4 <= len(extra) and not wide:
        kind, nbytes = (int.from_bytes(extra[i : i + 2], "little") for i in (at, at + 2))
        if kind == ZIP64_EXTRA_ID:
            wide = extra[at + 4 : at + 4 + nbytes]
        at += 4 + nbytes
    if len(wide) != 8 * absent:
        raise corrupt(f"expected {absent} values in the zip64 extra field", where)
    values = iter(Struct(f"<{absent}Q").unpack(wide))
    return (next(values) if value == MAX32 else value for value in narrow)


def _in_order(found: list[ZipRecord], directory_at: int) -> list[ZipRecord]:
    """The records by offset, each with its end; they must fill the bytes before the directory."""
    found = sorted(found)
    ends = [*(record.offset for record in found[1:]), directory_at]
    if found[0].offset != 0:
        raise corrupt("expected the first record at the entry's start", 0)
    for record, end in zip(found, ends, strict=True):
        if record.offset + LOCAL_HEADER.size + len(record.name) + record.nbytes > end:
            raise corrupt(f"the record {record.name[:64]!r} overlaps the next part", record.offset)
    # Not `replace`, which takes longer than all the rest of a small entry's directory.
    return [
        ZipRecord(r.offset, r.name, r.flags, r.crc, r.nbytes, end)
        for r, end in zip(found, ends, strict=True)
    ]


def _plain_name(record: ZipRecord, folder: bytes) -> str:
    """The record's name without the archive's, which all records must share."""
    if not record.name.startswith(folder):
        raise corrupt(
            f"expected a name in {folder[:64]!r}, got {record.name[:64]!r}", record.offset
        )
    try:
        return record.name.removeprefix(folder).decode()
    except UnicodeDecodeError as cause:
        raise corrupt(f"expected UTF-8, got name {record.name[:64]!r}", record.offset) from cause
