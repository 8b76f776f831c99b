"""Files, as the engine needs them: the contract that every storage keeps.

See `local_disk`, `stream_disk` and `object_disk` for the storages.

The engine accesses storage only through a `Disk`, so that one place decides how an operation is
done, and faults can be injected there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

Buffer = bytes | bytearray | memoryview


class Out(Protocol):
    """A new file, written from its start to its end."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append the buffers, all of them."""

    def reserve(self, nbytes: int) -> None:
        """Announce a lower bound of the file's size: storages that can, reserve contiguous space,
        and fail early if there is no room."""

    def begin_sync(self) -> None:
        """Start to bring the bytes so far to stable storage, if the storage can do that early.

        Called now and then while a file is written that will be synced. So the disk works while the
        rest is written, and a bounded number of bytes waits in memory.
        """

    def end_at(self, nbytes: int) -> None:
        """Set the file's size, independent of reserved space."""

    def sync(self) -> None:
        """Return once the bytes so far are on stable storage."""


class In(Protocol):
    """An existing file."""

    size: int
    maps: bool
    """Whether it is worth calling `window`."""
    request_bytes: int
    """Long ranges are read in calls of at least this size, where each call is a request."""

    @property
    def stored_bytes(self) -> int:
        """Space that the file occupies in its storage: less than `size` if it is sparse."""

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill the view from the offset; fewer bytes than asked only at the end of the file.

        Safe to call from several threads.
        """

    def read_rows(self, offsets: Sequence[int], views: Sequence[memoryview]) -> int:
        """Fill each view from its offset; the bytes read, fewer than asked only if the file ends.

        Safe to call from several threads.
        """

    def window(self, offset: int, nbytes: int) -> memoryview | None:
        """These bytes as memory, to be dropped soon; None if that is impossible. For one thread.

        Only for files that are not truncated while they are read: see `io.mapped_windows`.
        """


class Disk(Protocol):
    """Where checkpoints are kept."""

    renames: bool
    """Whether `replace` is atomic. If not, a file no longer than metadata appears whole when it is
    closed."""

    def make_folder(self, folder: Any) -> Sequence[Any]:
        """Make the folder and its missing parents; does nothing if it exists.

        Returns the folders to sync, innermost first, so that its name and the names of new parents
        survive a power cut. Its own parent is returned even if the folder exists: another rank may
        have made it without syncing.
        """

    def names(self, folder: Any) -> list[str]:
        """Names of the folder's entries; empty if the folder does not exist."""

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
        """Remove a file; does nothing if it is gone."""

    def sync_folder(self, folder: Any) -> None:
        """Return once the folder's names are on stable storage."""

    def locked(self, folder: Any) -> AbstractContextManager[None]:
        """Keep other saves' commits out of the folder, if the storage can."""

    def leased(self, folder: Any, name: str) -> AbstractContextManager[None]:
        """Keep a commit from replacing this file for a while, if the storage can."""

    def between_leases(self, folder: Any, name: str) -> AbstractContextManager[None]:
        """Replace this file inside: its readers have released it, or their time is up."""


class RemoteDisk(Protocol):
    """A disk that may be far away. Without this a disk counts as near."""

    def is_remote(self, folder: Any) -> bool:
        """Whether reading the folder's files goes over a network, so that ranks had better not
        read the same bytes."""


def is_remote(disk: object, folder: Any) -> bool:
    """Whether a `RemoteDisk` says so of the folder."""
    ask: Callable[[Any], bool] | None = getattr(disk, "is_remote", None)
    return ask is not None and ask(folder)
