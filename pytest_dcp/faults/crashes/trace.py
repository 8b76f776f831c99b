"""Pure (no I/O): the operations of all ranks on a folder, and its contents before.

Enters: the operations of every rank, as the tap saw them. Leaves: a `Trace`, in which several roots
are folders of one tree, with only the operations that matter for a crash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pytest_dcp.faults.tap.operation import Operation


@dataclass(frozen=True, slots=True)
class TreeLink:
    """A symbolic link."""

    target: str


Entry = bytes | TreeLink | None
"""A file's bytes, a link, or None for a folder."""
Tree = Mapping[str, Entry]
"""Posix paths relative to the folder -> entries. A folder comes before its contents."""

LOOKING = frozenset({"list", "read"})
"""Kinds of operations that change nothing, now or at a crash."""


@dataclass(frozen=True, slots=True)
class Trace:
    """The operations of one recorded block, in every rank."""

    base: Tree
    """The folder when the block began, all of it on stable storage."""
    operations: tuple[Operation, ...]
    """In the order in which they ended."""
    returned_ns: Mapping[int, int]
    """By rank: when its block had ended, on the clock of the operations. Dead ranks are missing."""

    @classmethod
    def of(
        cls,
        bases: Iterable[Tree],
        operations: Iterable[Operation],
        returned_ns: Mapping[int, int],
    ) -> Trace:
        """The trace of one or more roots. If there are several, root n becomes folder `n` of the
        tree.
        """
        bases = tuple(bases)
        changes = [op for op in operations if op.kind not in LOOKING]
        if len(bases) == 1:
            tree = bases[0]
        else:
            tree = {}
            for n, base in enumerate(bases):
                tree |= {str(n): None} | {f"{n}/{path}": entry for path, entry in base.items()}
            changes = [_below_its_root(op) for op in changes]
        ordered = sorted(changes, key=lambda op: (op.ended_ns, op.started_ns, op.rank))
        return cls(tree, tuple(ordered), dict(returned_ns))


def _below_its_root(operation: Operation) -> Operation:
    def below(path: str) -> str:
        if path.startswith("/"):
            return path
        return f"{operation.root}/{path}" if path != "." else str(operation.root)

    to = None if operation.to is None else below(operation.to)
    return replace(operation, path=below(operation.path), to=to)
