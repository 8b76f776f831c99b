"""Pure (no I/O): an object store to which the operations on a folder are applied.

A put is atomic and happens when the file is closed; a rename is a copy and a removal. Folders are
only parts of names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pytest_dcp.faults.crashes.disk_changes import ByteChange
from pytest_dcp.faults.crashes.trace import Entry, Tree
from pytest_dcp.faults.tap.operation import Operation


@dataclass(slots=True)
class ObjectStore:
    """The objects, and the files still being written."""

    objects: dict[str, Entry] = field(default_factory=dict)
    staged: dict[tuple[int, int | str], tuple[str, bytes, bool]] = field(default_factory=dict)
    """By rank and handle, or path: the name, the bytes, and whether to put them on close."""

    @classmethod
    def of(cls, base: Tree) -> ObjectStore:
        """A store with the contents of a folder."""
        return cls(dict(base))

    def copy(self) -> ObjectStore:
        """A copy in the same state."""
        return ObjectStore(dict(self.objects), dict(self.staged))

    def apply(self, index: int, op: Operation) -> None:
        """Do one operation of the trace."""
        APPLY.get(op.kind, ObjectStore.change_nothing)(self, op)

    def parts(self, op: Operation) -> Sequence[int]:
        """The parts of an operation that can be done alone: for a rename, the copy."""
        return (0,) if op.kind == "rename" else ()

    def begin(self, index: int, op: Operation, part: int) -> None:
        """Do only one such part."""
        self._copy(op)

    def visible_tree(self) -> Tree:
        """The objects as files, with the folders that their names imply."""
        folders = {
            path[:n]: None for path in self.objects for n, sign in enumerate(path) if sign == "/"
        }
        return {**folders, **self.objects}

    def create(self, op: Operation) -> None:
        self.staged[_key(op)] = (op.path, b"", True)

    def open(self, op: Operation) -> None:
        entry = self.objects.get(op.path)
        if isinstance(entry, bytes):
            self.staged[_key(op)] = (op.path, entry, False)

    def change(self, op: Operation) -> None:
        staged = self.staged.get(_key(op))
        path, content, _ = staged or (op.path, self.objects.get(op.path), True)
        content = content if isinstance(content, bytes) else b""
        at = len(content) if op.offset is None else op.offset
        if op.kind == "truncate":
            change = ByteChange(0, 0, 0, op.nbytes, None)
        elif op.kind == "allocate":
            change = ByteChange(0, 0, 0, at + op.nbytes, None, grows_only=True)
        else:
            change = ByteChange(0, 0, 0, at, op.data or b"")
        if staged is None:  # by its path, as truncate does
            self.objects[path] = change.apply(content)
        else:
            self.staged[_key(op)] = (path, change.apply(content), True)

    def close(self, op: Operation) -> None:
        path, content, to_put = self.staged.pop(_key(op), ("", b"", False))
        if to_put:
            self.objects[path] = content

    def rename(self, op: Operation) -> None:
        self._copy(op)
        self._remove(op.path)

    def link(self, op: Operation) -> None:
        self._copy(op)

    def remove(self, op: Operation) -> None:
        self._remove(op.path)

    def make_folder(self, op: Operation) -> None:
        if op.path != ".":
            self.objects.setdefault(op.path, None)

    def change_nothing(self, op: Operation) -> None:
        """Does nothing: a store has no such operation."""

    def _copy(self, op: Operation) -> None:
        to = str(op.to)
        if op.data is not None:
            self.objects[to] = op.data
        for path, entry in list(self.objects.items()):
            if path == op.path or path.startswith(op.path + "/"):
                self.objects[to + path[len(op.path) :]] = entry

    def _remove(self, name: str) -> None:
        for path in list(self.objects):
            if path == name or path.startswith(name + "/"):
                del self.objects[path]


def _key(op: Operation) -> tuple[int, int | str]:
    return op.rank, op.handle or op.path


APPLY: dict[str, Callable[[ObjectStore, Operation], None]] = {
    "make_folder": ObjectStore.make_folder,
    "create": ObjectStore.create,
    "open": ObjectStore.open,
    "write": ObjectStore.change,
    "allocate": ObjectStore.change,
    "truncate": ObjectStore.change,
    "close": ObjectStore.close,
    "rename": ObjectStore.rename,
    "link": ObjectStore.link,
    "remove": ObjectStore.remove,
    "remove_folder": ObjectStore.remove,
}
