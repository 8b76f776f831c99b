"""Folders <-> trees: read a folder as a tree, and write a tree as a folder.

Folders are created in memory if the machine has such a file system: thousands per second, and an
fsync there costs nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from types import TracebackType

from pytest_dcp.faults.crashes.trace import Entry, Tree, TreeLink

MEMORY = Path("/dev/shm")
"""A tmpfs on every Linux."""


def read_tree(folder: Path) -> Tree:
    """The contents of the folder; empty if it does not exist.

    Raises ValueError for an entry that is neither a file, a folder nor a link.
    """
    tree: dict[str, Entry] = {}
    todo = [(folder, "")]
    while todo:
        above, prefix = todo.pop()
        if not above.is_dir():
            continue
        with os.scandir(above) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = prefix + entry.name
                if entry.is_symlink():
                    tree[path] = TreeLink(os.readlink(entry.path))
                elif entry.is_dir():
                    tree[path] = None
                    todo.append((Path(entry.path), path + "/"))
                elif entry.is_file():
                    tree[path] = Path(entry.path).read_bytes()
                else:
                    raise ValueError(f"{entry.path} is neither a file, a folder nor a link")
    return tree


def write_tree(tree: Tree, folder: Path) -> None:
    """Put the tree into an empty folder."""
    top = os.fspath(folder)
    for path in sorted(tree):
        entry = tree[path]
        where = f"{top}/{path}"
        if entry is None:
            os.mkdir(where)
        elif isinstance(entry, TreeLink):
            os.symlink(entry.target, where)
        else:
            fd = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with os.fdopen(fd, "wb", 0) as file:
                rest = memoryview(entry)
                while rest:
                    rest = rest[file.write(rest) :]


def new_folder(place: Path | None = None) -> Path:
    """A new empty folder owned by this process: in `place`, else in memory if possible."""
    if place is None and MEMORY.is_dir() and os.access(MEMORY, os.W_OK):
        place = MEMORY
    return Path(tempfile.mkdtemp(prefix="dcp-crash-", dir=place))


def _remove_own(folder: Path, pid: int) -> None:
    """Remove a folder, but only in the process that created it, not in its forks."""
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


class RestoredFolder(os.PathLike[str]):
    """A fresh folder with a tree, which the caller may change.

    It is a path-like object and lasts as long as this object; as a context manager it gives the
    folder as a `Path`, and removes it when the block ends.
    """

    def __init__(self, tree: Tree) -> None:
        self._folder = new_folder()
        self._remove = weakref.finalize(self, _remove_own, self._folder, os.getpid())
        try:
            write_tree(tree, self._folder)
        except BaseException:
            self._remove()
            raise

    def __fspath__(self) -> str:
        if not self._remove.alive:
            raise FileNotFoundError(f"{self._folder} was removed when its `with` block ended")
        return os.fspath(self._folder)

    def __str__(self) -> str:
        return os.fspath(self._folder)

    def __repr__(self) -> str:
        return f"<{self._folder}: use it as a path, or as `with state.restored() as folder:`>"

    def __enter__(self) -> Path:
        return Path(os.fspath(self))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._remove()


def restore_tree(tree: Tree) -> RestoredFolder:
    """A folder with the tree."""
    return RestoredFolder(tree)
