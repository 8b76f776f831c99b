"""Files, as the engine needs them: the contract that every storage keeps.

See `local_disk`, `stream_disk` and `object_disk` for the storages.

Everything that the engine does to storage goes through a `Disk`, so that one place decides how an
operation is made, and faults can be put between.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

Buffer = bytes | bytearray | memoryview


class Out(Protocol):
    """A new file, written from its start to its end."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append the buffers, all of them."""

    def reserve(self, nbytes: int) -> None:
        """Say how long the file will be at least: an early error when there is no room, and space
        in one piece, where the storage can do that."""

    def end_at(self, nbytes: int) -> None:
        """Set the file's size, independent of reserved space."""

    def sync(self) -> None:
        """Return once the bytes so far are on stable storage."""


class In(Protocol):
    """A file that is there."""

    size: int
    maps: bool
    """Whether `window` is worth asking."""

    @property
    def stored_bytes(self) -> int:
        """Space that it occupies in its storage: less than `size` if it is sparse."""

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill the view from the offset; fewer bytes than asked only at the end of the file.

        Safe to call from several threads.
        """

    def read_rows(self, offsets: Sequence[int], views: Sequence[memoryview]) -> int:
        """Fill each view from its offset; the bytes read, fewer than asked only if the file ends.

        Safe to call from several threads.
        """

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        """These bytes as memory, to be dropped soon; None where that does not go. For one thread.

        For files that are not cut short while they are read: see `io.mapped_windows`.
        """


class Disk(Protocol):
    """Where checkpoints are kept."""

    renames: bool
    """Whether `replace` is done at one instant. Where not, a file appears whole when it is closed,
    if it is no longer than metadata are."""

    def make_folder(self, folder: Any) -> Sequence[Any]:
        """Make the folder and those above it; nothing where it exists.

        The folders to sync before its name and those of new ones above it last, the innermost
        first. The first is given for a folder that exists, too: who made it may not have synced it.
        """

    def names(self, folder: Any) -> list[str]:
        """Names of the folder's entries; none where there is no folder."""

    def exists(self, folder: Any, name: str) -> bool:
        """Whether the folder has a file of this name."""

    def create(self, folder: Any, name: str) -> AbstractContextManager[Out]:
        """A new file of this name. An existing one is replaced."""

    def open(self, folder: Any, name: str) -> AbstractContextManager[In]:
        """The file of this name, to read.

        Raises FileNotFoundError, and CheckpointCorruptError unless it is a plain file inside the
        folder.
        """

    def replace(self, folder: Any, old: str, new: str) -> None:
        """Rename a file. An open of `new` finds the old file or the new one, never none."""

    def remove(self, folder: Any, name: str) -> None:
        """Remove a file; nothing where it is gone."""

    def sync_folder(self, folder: Any) -> None:
        """Return once the folder's names are on stable storage."""

    def locked(self, folder: Any) -> AbstractContextManager[None]:
        """Keep other saves' commits out of the folder, where the storage has a way to."""

    def leased(self, folder: Any, name: str) -> AbstractContextManager[None]:
        """Keep a commit from replacing this file, for a while, where the storage has a way to."""

    def between_leases(self, folder: Any, name: str) -> AbstractContextManager[None]:
        """Replace this file inside: its readers have let go, or were given their time."""
