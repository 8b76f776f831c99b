"""Hostile checkpoints: made from a good one to harm their reader.

Enters: a folder with a good checkpoint of your own, by torch or by this engine (its `.metadata` is
unpickled). Leaves: one `Hostile` after the other. Each is a value that describes itself and the
harm it would do, and makes its folder on command. A reader must reject that folder in bounded time
and memory, and read and write nothing outside of it.

The edited metadata are a plain pickle, as torch writes it: no checksum speaks for the good ones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pytest_dcp.faults.hostile.metadata import EDITS, HOSTILE_NAMES, Good, rename_files
from pytest_dcp.faults.hostile.nodes import (
    Content,
    EmptyFolder,
    Fifo,
    Node,
    Socket,
    Sparse,
    SymbolicLink,
    lay,
)

HUGE_BYTES = 1 << 42
"""Size of a sparse file: more than any memory."""


@dataclass(frozen=True, slots=True)
class Hostile:
    """A checkpoint that is made to harm."""

    name: str
    """The oddity; unique within a generator."""
    harm: str
    """The harm to a reader that trusts it."""
    source: Path
    """The folder of the good checkpoint."""
    nodes: Mapping[str, Node]
    """Replacements and additions by name: the entries of the folder that differ from the source."""

    def make(self, folder: str | os.PathLike[str]) -> Path:
        """The checkpoint, in a new folder. Raises FileExistsError if the folder exists."""
        target = Path(folder)
        shutil.copytree(self.source, target)
        for name, node in self.nodes.items():
            lay(node, target / name)
        return target

    def __str__(self) -> str:
        return self.name


def hostile_folders(folder: str | os.PathLike[str]) -> Iterator[Hostile]:
    """Hostile checkpoints without any code in them, of every kind.

    The good checkpoint must have a tensor of some elements, and a value, so that values can be
    attacked too.
    """
    source = Path(folder).absolute()
    good = Good.of(source)
    yield from _odd_nodes(good)
    yield from _odd_names(good)
    for edit in EDITS:
        if good.has(edit.needs):
            yield Hostile(
                edit.name, edit.harm, source, {".metadata": Content(good.edit_pickle(edit))}
            )


def _odd_nodes(good: Good) -> Iterator[Hostile]:
    """Folders in which something other than a plain file has a file's name; where it can be read,
    it gives the right bytes.
    """
    source = good.folder
    for name in (".metadata", good.data_file):
        outside = SymbolicLink(str(source / name))
        waits, leaves = "makes its reader wait for ever", "is read outside of the folder"
        endless = "fills the memory of its reader"
        nodes: list[tuple[str, str, Node]] = [
            ("a FIFO", waits, Fifo()),
            ("a socket", "is no file", Socket()),
            ("a folder", "is no file", EmptyFolder()),
            ("a link out of the folder", leaves, outside),
            ("a link to itself", "is no file", SymbolicLink(name)),
            ("a link to /dev/zero", endless, SymbolicLink("/dev/zero")),
            ("a file of 4 TiB", endless, Sparse(HUGE_BYTES)),
        ]
        for what, harm, node in nodes:
            yield Hostile(f"{what} as {name}", harm, source, {name: node})
    nowhere = SymbolicLink(
        "nowhere"
    )  # as .metadata this would be no checkpoint at all, not a hostile one
    yield Hostile("a link to nothing as data", "is no file", source, {good.data_file: nowhere})
    data = (source / ".metadata").read_bytes()
    huge = Sparse(HUGE_BYTES, head=data[:64], tail=data[-64:])
    yield Hostile(
        "a file of 4 TiB that begins and ends as .metadata", endless, source, {".metadata": huge}
    )


def _odd_names(good: Good) -> Iterator[Hostile]:
    """Names of data files that are not files of the folder. A name that leads somewhere leads to
    the good file.
    """
    source = good.folder
    outside = str(source / good.data_file)
    names = {
        **{f"the name {name!r:.40}": name for name in HOSTILE_NAMES},
        "an absolute name": outside,
        "a name that climbs out": "../" * 40 + outside.lstrip("/"),
        "a name that climbs out from within": f"inner/{'../' * 40}{outside.lstrip('/')}",
        "a name through a linked folder": f"linked/{good.data_file}",
        "a name through the folder above": f"inner/../{good.data_file}",
    }
    beside: dict[str, Node] = {"inner": EmptyFolder(), "linked": SymbolicLink(str(source))}
    for what, name in names.items():
        nodes = {**beside, ".metadata": Content(good.edit_pickle(rename_files(name)))}
        yield Hostile(what, "is read outside of the folder, or is no file", source, nodes)
