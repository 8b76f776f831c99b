"""What can stand in a folder under a name: files, and what only looks like one.

Nodes are values; `lay` puts one on the disk, and removes what is there.
"""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path


class Node:
    """Something with a name in a folder: the base."""

    __slots__ = ()

    def make(self, path: Path) -> None:
        """Create it where nothing is."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Content(Node):
    """A plain file."""

    data: bytes

    def make(self, path: Path) -> None:
        path.write_bytes(self.data)


@dataclass(frozen=True, slots=True)
class Sparse(Node):
    """A plain file of zeros that takes no room, behind some bytes and before others."""

    nbytes: int
    """Of the whole file."""
    head: bytes = b""
    tail: bytes = b""

    def make(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(self.head)
            file.truncate(self.nbytes)
            file.seek(self.nbytes - len(self.tail))
            file.write(self.tail)


@dataclass(frozen=True, slots=True)
class SymbolicLink(Node):
    """A symbolic link."""

    target: str

    def make(self, path: Path) -> None:
        path.symlink_to(self.target)


@dataclass(frozen=True, slots=True)
class Fifo(Node):
    """A named pipe without a writer: an open waits for ever."""

    def make(self, path: Path) -> None:
        os.mkfifo(path)


@dataclass(frozen=True, slots=True)
class Socket(Node):
    """A socket without a listener."""

    def make(self, path: Path) -> None:
        # By a descriptor of its folder: the path of a socket takes 107 bytes at most.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)


@dataclass(frozen=True, slots=True)
class Folder(Node):
    """An empty folder."""

    def make(self, path: Path) -> None:
        path.mkdir()


@dataclass(frozen=True, slots=True)
class NoNode(Node):
    """Nothing."""

    def make(self, path: Path) -> None:
        return


def lay(node: Node, path: Path) -> None:
    """Replace whatever has the name by the node."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    node.make(path)
