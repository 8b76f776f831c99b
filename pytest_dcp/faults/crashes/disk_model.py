"""Pure (no I/O): a model of a disk: the tree that programs see, and the parts of it on stable
storage.

A file is a node, to which names point, as in every Unix. Names and bytes that are not known to be
on stable storage are kept as changes, in order; the crash model says which of them a crash may
lose. A table, `Rules`, says which changes each operation makes stable, one row for each kind of
file system.

The state has two layers and the changes between them:

- `names` and `contents`: the tree as running programs see it. Every operation changes it at once.
  It remains when processes die.
- `stable_names` and `stable_contents`: the tree that is on the disk for certain.
- `name_changes` and `byte_changes`: how to get from the second to the first. A power cut leaves the
  stable layer with some of the changes applied, in their order; `losses` says which ones.

A change becomes stable, and leaves its list, by

- `sync` of a file: its byte changes. Under ext4 the journal is committed too, with all names so
  far;
- `sync_folder`: the name changes in that folder; under ext4 in all folders;
- `close` of a file under NFS (close-to-open): its byte changes;
- a name change that needs its bytes (under ext4, a rename over a file) takes them with it.

A sync covers only changes that had ended before it began: it may miss a write that overlaps it, and
the crash that loses this write must be found.

A rename is two changes, the new name set and the old one removed, that POSIX may lose apart. A node
without a name is no longer in the tree, though its bytes are still written to: `rename` of an open
file and removal behind a reader's back work as in Unix, through `handles`.

Assumes that operations are applied in a possible order: a missing name is a LookupError, which
`enumerate.in_order` uses to find such an order. Guarantees that `visible_tree` equals the real
folder after the same operations (the recording checks it against the disk).

>>> at = iter(range(0, 1000, 10))
>>> def op(kind, path, **more):
...     now = next(at)
...     return Operation(kind, path, started_ns=now, ended_ns=now + 10, **more)
>>> disk = DiskModel.of({}, Rules())
>>> disk.apply(0, op("create", "w", handle=1))
>>> disk.apply(1, op("write", "w", handle=1, offset=0, data=b"ab", nbytes=2))
>>> disk.visible_tree(), disk.tree_after(names=[], changes=[])
({'w': b'ab'}, {})

The name could arrive without the bytes, or with zeros for them:

>>> disk.tree_after(disk.name_changes, [])
{'w': b''}
>>> disk.tree_after(disk.name_changes, [(disk.byte_changes[0], False)])
{'w': b'\\x00\\x00'}

An fsync of the file makes its bytes last; its name lasts once the folder is synced as well:

>>> disk.apply(2, op("sync", "w", handle=1))
>>> len(disk.byte_changes), disk.tree_after([], [])
(0, {})
>>> disk.apply(3, op("sync_folder", ".", handle=2))
>>> disk.tree_after([], [])
{'w': b'ab'}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pytest_dcp.faults.crashes.disk_changes import ByteChange, NameChange, torn_at
from pytest_dcp.faults.crashes.trace import Tree, TreeLink
from pytest_dcp.faults.tap.operation import Operation

ROOT = 0


@dataclass(frozen=True, slots=True)
class Rules:
    """Promises of a file system beyond POSIX."""

    sync_commits_names: bool = False
    """An fsync of any file or folder makes every earlier change of names stable, in every folder.
    """
    names_at_once: bool = False
    """A change of names is stable when the call returns."""
    close_syncs: bool = False
    """Closing a file makes its bytes stable."""
    rename_over_flushes: bool = False
    """A rename that replaces a file becomes stable only together with the bytes that the file had
    then.
    """


Names = dict[tuple[int, str], int]


@dataclass(slots=True)
class DiskModel:
    """A storage in the middle of a trace."""

    rules: Rules = field(default_factory=Rules)
    folders: set[int] = field(default_factory=lambda: {ROOT})
    links: dict[int, str] = field(default_factory=dict)
    names: Names = field(default_factory=dict)
    """Names as programs see them now."""
    contents: dict[int, bytes] = field(default_factory=dict)
    """Contents of files as programs see them now."""
    stable_names: Names = field(default_factory=dict)
    stable_contents: dict[int, bytes] = field(default_factory=dict)
    name_changes: list[NameChange] = field(default_factory=list)
    byte_changes: list[ByteChange] = field(default_factory=list)
    handles: dict[tuple[int, int], int] = field(default_factory=dict)
    """By rank and handle: the node that was opened."""
    nodes: int = 1

    @classmethod
    def of(cls, base: Tree, rules: Rules) -> DiskModel:
        """A storage on which the whole tree is stable."""
        machine = cls(rules)
        # Sorted, a folder comes before its contents.
        for path in sorted(base):
            entry = base[path]
            folder, name = machine._parent(path)
            node = machine._new(entry)
            machine.names[folder, name] = node
        machine.stable_names = dict(machine.names)
        machine.stable_contents = dict(machine.contents)
        return machine

    def copy(self) -> DiskModel:
        """A copy in the same state."""
        return DiskModel(
            self.rules, set(self.folders), dict(self.links), dict(self.names), dict(self.contents),
            dict(self.stable_names), dict(self.stable_contents), list(self.name_changes),
            list(self.byte_changes), dict(self.handles), self.nodes,
        )  # fmt: skip

    def apply(self, index: int, op: Operation) -> None:
        """Do one operation of the trace. Raises LookupError for a missing name."""
        APPLY[op.kind](self, index, op)

    def parts(self, op: Operation) -> Sequence[int]:
        """The parts of an operation that can be done alone: for a write, numbers of bytes."""
        return torn_at(op.offset or 0, op.nbytes) if op.kind == "write" else ()

    def begin(self, index: int, op: Operation, part: int) -> None:
        """Do only one such part."""
        self.apply(index, replace(op, data=(op.data or b"")[:part], nbytes=part))

    # ---- names

    def create(self, index: int, op: Operation) -> None:
        node = self._find(op.path)
        if node is None:
            node = self._new(b"")
            self._set(index, op, op.path, node)
        # An existing file is truncated; an empty one does not change.
        elif self.contents.get(node):
            self._change(ByteChange(index, op.ended_ns, node, 0, None))
        self.handles[op.rank, op.handle] = node

    def open(self, index: int, op: Operation) -> None:
        node = self._find(op.path)
        if node is not None:
            self.handles[op.rank, op.handle] = node

    def make_folder(self, index: int, op: Operation) -> None:
        if self._find(op.path) is None:  # a store may get it twice, and the root is always there
            self._set(index, op, op.path, self._new(None))

    def link(self, index: int, op: Operation) -> None:
        to = str(op.to)
        # A symbolic link: the tap records its target as data.
        if op.path == op.to:
            node = self._new(TreeLink((op.data or b"").decode()))
        elif op.path.startswith("/"):
            node = self._add_outside_file(index, op)
        else:
            node = self._there(op)
        self._set(index, op, to, node)

    def rename(self, index: int, op: Operation) -> None:
        to = str(op.to)
        # Moved out of the folder: for this tree it is a removal.
        if to.startswith("/"):
            self._set(index, op, op.path, None)
            return
        outside = op.path.startswith("/")
        node = self._add_outside_file(index, op) if outside else self._there(op)
        # Asked before the new name is set, which hides the file that had it.
        replaces = self.rules.rename_over_flushes and self.names.get(self._parent(to)) is not None
        self._set(index, op, to, node, needs_bytes=replaces)
        # A change of its own, which POSIX may lose apart from the other.
        if not outside:
            self._set(index, op, op.path, None)

    def remove(self, index: int, op: Operation) -> None:
        self._set(index, op, op.path, None)

    # ---- bytes

    def write(self, index: int, op: Operation) -> None:
        node = self._file(op)
        # A stream's position is not recorded; assumes that it writes at the end.
        offset = len(self.contents[node]) if op.offset is None else op.offset
        self._change(ByteChange(index, op.ended_ns, node, offset, op.data or b""))

    def truncate(self, index: int, op: Operation) -> None:
        self._change(ByteChange(index, op.ended_ns, self._file(op), op.nbytes, None))

    def allocate(self, index: int, op: Operation) -> None:
        size = (op.offset or 0) + op.nbytes
        self._change(ByteChange(index, op.ended_ns, self._file(op), size, None, grows_only=True))

    # ---- durability

    def sync(self, index: int, op: Operation) -> None:
        self._settle_bytes(self._file(op), op)
        if self.rules.sync_commits_names:
            # Names whose change was still under way may not be in this commit of the journal.
            self._settle_names(lambda change: change.ended_ns <= op.started_ns)

    def sync_folder(self, index: int, op: Operation) -> None:
        folder = self.handles.get((op.rank, op.handle), self._find(op.path))
        everywhere = self.rules.sync_commits_names
        self._settle_names(
            lambda change: (
                (everywhere or change.folder == folder) and change.ended_ns <= op.started_ns
            )
        )

    def close(self, index: int, op: Operation) -> None:
        node = self.handles.pop((op.rank, op.handle), None)
        if self.rules.close_syncs and node is not None:
            self._settle_bytes(node, op)

    def change_nothing(self, index: int, op: Operation) -> None:
        """Change nothing: for operations that only read."""

    # ---- after a crash

    def visible_tree(self) -> Tree:
        """The tree as running programs see it; it also remains if only the processes die."""
        return self._tree(self.names, self.contents)

    def tree_after(
        self, names: Iterable[NameChange], changes: Sequence[tuple[ByteChange, bool]]
    ) -> Tree:
        """The tree if only these changes have reached the disk, in this order."""
        stable_names = dict(self.stable_names)
        for change in names:
            _apply_name(stable_names, change)
        contents = dict(self.stable_contents)
        for byte_change, arrived in changes:
            apply = byte_change.apply if arrived else byte_change.zero_fill
            contents[byte_change.node] = apply(contents.get(byte_change.node, b""))
        return self._tree(stable_names, contents)

    def _tree(self, names: Names, contents: Mapping[int, bytes]) -> Tree:
        inside: dict[int, list[tuple[str, int]]] = {}
        for (folder, name), node in names.items():
            inside.setdefault(folder, []).append((name, node))
        tree: dict[str, bytes | TreeLink | None] = {}
        todo = [("", ROOT)]
        for above, folder in todo:
            for name, node in inside.get(folder, ()):
                path = above + name
                if node in self.folders:
                    tree[path] = None
                    todo.append((path + "/", node))
                elif node in self.links:
                    tree[path] = TreeLink(self.links[node])
                else:
                    tree[path] = contents.get(node, b"")
        return tree

    # ---- inside

    def _new(self, entry: bytes | TreeLink | None) -> int:
        node, self.nodes = self.nodes, self.nodes + 1
        if entry is None:
            self.folders.add(node)
        elif isinstance(entry, TreeLink):
            self.links[node] = entry.target
        else:
            self.contents[node] = entry
        return node

    def _add_outside_file(self, index: int, op: Operation) -> int:
        """Bind the name of a file from outside, whose bytes no watcher saw being synced."""
        node = self._new(b"")
        self._change(ByteChange(index, op.ended_ns, node, 0, op.data or b""))
        return node

    def _set(
        self, index: int, op: Operation, path: str, node: int | None, *, needs_bytes: bool = False
    ) -> None:
        folder, name = self._parent(path)
        change = NameChange(index, op.ended_ns, folder, name, node, needs_bytes)
        _apply_name(self.names, change)
        if self.rules.names_at_once:
            _apply_name(self.stable_names, change)
        else:
            self.name_changes.append(change)

    def _change(self, change: ByteChange) -> None:
        self.contents[change.node] = change.apply(self.contents.get(change.node, b""))
        self.byte_changes.append(change)

    def _settle_bytes(self, node: int, op: Operation) -> None:
        """Make the changes of the file from before the operation stable."""
        pending = []
        for change in self.byte_changes:
            if change.node == node and change.ended_ns <= op.started_ns:
                before = self.stable_contents.get(node, b"")
                self.stable_contents[node] = change.apply(before)
            else:
                pending.append(change)
        self.byte_changes = pending

    def _settle_names(self, covered: Callable[[NameChange], bool]) -> None:
        pending = []
        for change in self.name_changes:
            if covered(change):
                _apply_name(self.stable_names, change)
                if change.needs_bytes and change.node is not None:
                    self._settle_forced(change)
            else:
                pending.append(change)
        self.name_changes = pending

    def _settle_forced(self, rename: NameChange) -> None:
        pending = []
        for change in self.byte_changes:
            if change.node == rename.node and change.operation < rename.operation:
                before = self.stable_contents.get(change.node, b"")
                self.stable_contents[change.node] = change.apply(before)
            else:
                pending.append(change)
        self.byte_changes = pending

    def _parent(self, path: str) -> tuple[int, str]:
        head, _, name = path.rpartition("/")
        folder = self._find(head) if head else ROOT
        if folder is None or folder not in self.folders:
            raise LookupError(f"no folder {head!r} for {path!r}")
        return folder, name

    def _find(self, path: str, hops: int = 8) -> int | None:
        """The node of a path after following links; None if it does not exist."""
        if path in ("", "."):
            return ROOT
        head, _, name = path.rpartition("/")
        folder = self._find(head, hops)
        node = None if folder is None else self.names.get((folder, name))
        if node in self.links and hops:
            target = self.links[node]
            return self._find(f"{head}/{target}".lstrip("/"), hops - 1)
        return node

    def _there(self, op: Operation) -> int:
        node = self.names.get(self._parent(op.path))
        if node is None:
            raise LookupError(f"{op}: there is no {op.path!r}")
        return node

    def _file(self, op: Operation) -> int:
        node = self.handles.get((op.rank, op.handle)) if op.handle else self._find(op.path)
        if node is None:
            node = self._find(op.path)
        if node is None:
            raise LookupError(f"{op}: there is no {op.path!r}")
        return node


def _apply_name(names: Names, change: NameChange) -> None:
    if change.node is None:
        names.pop((change.folder, change.name), None)
    else:
        names[change.folder, change.name] = change.node


APPLY: dict[str, Callable[[DiskModel, int, Operation], None]] = {
    "make_folder": DiskModel.make_folder,
    "list": DiskModel.change_nothing,
    "create": DiskModel.create,
    "open": DiskModel.open,
    "write": DiskModel.write,
    "read": DiskModel.change_nothing,
    "allocate": DiskModel.allocate,
    "truncate": DiskModel.truncate,
    "sync": DiskModel.sync,
    "sync_folder": DiskModel.sync_folder,
    "close": DiskModel.close,
    "rename": DiskModel.rename,
    "link": DiskModel.link,
    "remove": DiskModel.remove,
    "remove_folder": DiskModel.remove,
}
