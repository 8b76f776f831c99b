"""Faults at rest: a file's bytes differ from those written, or the file was exchanged.

A fault damages a file before an open or read, and after a write, sync, close or rename. The file
itself is changed, so the damage stays. A file that cannot be damaged this way (too short, no other
file to swap with) does not count as an event.

>>> file, other = Path("data"), Path("other")
>>> def damaged(fault):
...     _ = file.write_bytes(b"abcdefgh"), other.write_bytes(b"other")
...     fault.spoil(file)
...     return file.read_bytes()
>>> damaged(BitFlip(offset=-1, bit=0)), damaged(ZeroSector(sector=1, nbytes=4))
(b'abcdefgi', b'abcd\\x00\\x00\\x00\\x00')
>>> damaged(Truncate()), damaged(Truncate(-1)), damaged(Swap("o*"))
(b'abcd', b'abcdefg', b'other')
>>> BitFlip(offset=8).can_spoil(file), BitFlip(offset=4).can_spoil(file)
(False, True)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_dcp.faults import damage
from pytest_dcp.faults.kinds.base import Moment
from pytest_dcp.faults.kinds.operations import StorageFault
from pytest_dcp.faults.tap.operation import Verdict

LOOKING = ("open", "read")


class Damage(StorageFault):
    """A silent change of a file: the base."""

    __slots__ = ()

    operations = ("open", "read", "write", "sync", "close", "rename", "link")
    during = ("open", "close", "rename")

    def meets(self, file: Path | None) -> bool:
        return file is not None and file.is_file() and self.can_spoil(file)

    def before(self, moment: Moment) -> Verdict | None:
        if moment.where in LOOKING and moment.file is not None:
            self.spoil(moment.file)
        return None

    def after(self, moment: Moment) -> None:
        file = moment.target or moment.file
        if moment.where not in LOOKING and file is not None:
            self.spoil(file)

    def can_spoil(self, file: Path) -> bool:
        """Whether this file can be damaged this way."""
        return True

    def spoil(self, file: Path) -> None:
        """Damage the file."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class BitFlip(Damage):
    """One bit is flipped."""

    offset: int = 0
    """In bytes from the start; negative: from the end."""
    bit: int = 0

    def can_spoil(self, file: Path) -> bool:
        size = file.stat().st_size
        return -size <= self.offset < size

    def spoil(self, file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(damage.flip_bit(data, self.offset % len(data), self.bit))


@dataclass(frozen=True, slots=True)
class ZeroSector(Damage):
    """A sector is filled with zeros."""

    sector: int = 0
    """Index of the sector, from 0."""
    nbytes: int = damage.SECTOR_BYTES

    def can_spoil(self, file: Path) -> bool:
        return self.sector * self.nbytes < file.stat().st_size

    def spoil(self, file: Path) -> None:
        data = file.read_bytes()
        file.write_bytes(damage.fill_sector(data, self.sector, size=self.nbytes))


@dataclass(frozen=True, slots=True)
class Truncate(Damage):
    """Where the file ends, in bytes; negative: how many bytes are missing; by default half."""

    nbytes: int | None = None

    def spoil(self, file: Path) -> None:
        data = file.read_bytes()
        cut = len(data) // 2 if self.nbytes is None else self.nbytes
        file.write_bytes(damage.truncate(data, cut))


@dataclass(frozen=True, slots=True)
class Missing(Damage):
    """The file is gone."""

    def spoil(self, file: Path) -> None:
        file.unlink()


@dataclass(frozen=True, slots=True)
class Foreign(Damage):
    """The file is replaced by one that no save wrote."""

    content: bytes = b"this is no checkpoint\n"

    def spoil(self, file: Path) -> None:
        file.write_bytes(self.content)


@dataclass(frozen=True, slots=True)
class Swap(Damage):
    """The file is swapped with another file of its folder."""

    other: str
    """The other file's name, or a pattern: the first other file that matches."""

    def can_spoil(self, file: Path) -> bool:
        return self._partner(file) is not None

    def spoil(self, file: Path) -> None:
        partner = self._partner(file)
        if partner is not None:
            mine, theirs = file.read_bytes(), partner.read_bytes()
            file.write_bytes(theirs)
            partner.write_bytes(mine)

    def _partner(self, file: Path) -> Path | None:
        others = (path for path in sorted(file.parent.glob(self.other)) if path.is_file())
        return next((path for path in others if path != file), None)


@dataclass(frozen=True, slots=True)
class StaleFile(Damage):
    """The file is replaced by an older one."""

    old: str
    """Path of the old content."""

    def can_spoil(self, file: Path) -> bool:
        return Path(self.old).is_file()

    def spoil(self, file: Path) -> None:
        file.write_bytes(Path(self.old).read_bytes())
