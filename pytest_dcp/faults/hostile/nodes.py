"""Entries of a folder: files, and nodes that only look like files.

Nodes are values; `lay` puts one on the disk, replacing any node with the name.
"""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path


class Node:
    """An entry with a name in a folder: the base class."""

    __slots__ = ()

    def make(self, path: Path) -> None:
        """Create it at a free name."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Content(Node):
    """A plain file."""

    data: bytes

    def make(self, path: Path) -> None:
        path.write_bytes(self.data)


@dataclass(frozen=True, slots=True)
class Sparse(Node):
    """A plain file of zeros without blocks, between a head and a tail of bytes."""

    nbytes: int
    """Size of the whole file."""
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
    """A named pipe without a writer: an open waits forever."""

    def make(self, path: Path) -> None:
        os.mkfifo(path)


@dataclass(frozen=True, slots=True)
class Socket(Node):
    """A socket without a listener."""

    def make(self, path: Path) -> None:
        # Relative to the folder's descriptor: the path of a socket has at most 107 bytes.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)


@dataclass(frozen=True, slots=True)
class EmptyFolder(Node):
    """An empty folder."""

    def make(self, path: Path) -> None:
        path.mkdir()


@dataclass(frozen=True, slots=True)
class NoNode(Node):
    """No entry at all."""

    def make(self, path: Path) -> None:
        return


def lay(node: Node, path: Path) -> None:
    """Replace any node that has the name by this node."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    node.make(path)
