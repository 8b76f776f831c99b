"""Pure (no I/O): the unsynced changes that each kind of file system may lose.

The kinds, with their promises (`RULES`) and possible losses (`LOSSES`), simplest losses first:

kill: nothing is lost: only processes die, the kernel and its caches live on.

posix: any of the names and any of the bytes not made stable by an fsync of their folder or of their
    file, in any combination; of lost bytes the size may have arrived (then they are zeros) or not.
    The two names of a rename may be lost apart. POSIX.1-2024 asks fsync for no more than "to
    assure that all data in progress [..] is transferred" (fsync, rationale), and file systems use
    that freedom: Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014 (ALICE).

ext4-ordered: ext4 as it is mounted by default (data=ordered, delayed allocation, auto_da_alloc;
    Documentation/admin-guide/ext4.rst, ext4(5)). Names reach the journal in the order of their
    operations, so only a suffix can be lost; an fsync of anything commits all before it. Bytes are
    written before the size that makes them visible, so they are missing rather than zeros, unless
    the space was allocated before; a rename over a file takes the bytes with it.

nfs: close-to-open consistency (RFC 7530, 10.3): names are on the server when the call returns,
    bytes when the file is synced or closed. Listings by other clients in the meantime are no
    state of the folder: that is the fault `StaleListing`.

s3: objects, which `ObjectStore` keeps: nothing is there before its file is closed, then all of it;
    a rename is a copy and a removal.

Of n changes any subset may be lost: 2**n, too many. The levels try simple ones instead, as ALICE
does: all lost, one lost, all from some operation on lost, all but one lost, two lost. Of long
lists, `SINGLY` and `PAIRS_OF` bound how many are tried; the newest are always among them, since a
change that a save makes late is the likeliest to be unsynced when it matters.

A loss is a value of positions in the lists of a `DiskModel`, so it means something only together
with the moment that it was made for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pytest_dcp.faults.crash_models import Model
from pytest_dcp.faults.crashes.disk_changes import ByteChange, NameChange
from pytest_dcp.faults.crashes.disk_model import DiskModel, Rules
from pytest_dcp.faults.crashes.trace import Tree

RULES: Mapping[Model, Rules] = {
    "kill": Rules(),
    "posix": Rules(),
    "ext4-ordered": Rules(sync_commits_names=True, rename_over_flushes=True),
    "nfs": Rules(names_at_once=True, close_syncs=True),
    "s3": Rules(),
}

PAIRS_OF = 24
"""Number of newest changes whose pairs are all tried: pairs grow with the square."""


SINGLY = 48
"""Number of changes tried one by one: the newest half, and the rest spread over the older ones."""


@dataclass(frozen=True, slots=True)
class LostSet:
    """One combination of losses, as positions in the model's lists of changes."""

    names: tuple[int, ...] = ()
    bytes: tuple[int, ...] = ()
    zeros: bool = False
    """Whether the sizes of the lost bytes have arrived."""

    def tree_after(self, machine: DiskModel) -> Tree:
        """The tree on the disk after the loss."""
        # If the size of a lost byte change arrived, keep the change, to grow the file only.
        names = [c for n, c in enumerate(machine.name_changes) if n not in self.names]
        changes = [
            (change, n not in self.bytes)
            for n, change in enumerate(machine.byte_changes)
            if self.zeros or n not in self.bytes
        ]
        return machine.tree_after(names, changes)


Losses = Iterator[LostSet]


def _posix_simple(machine: DiskModel) -> Losses:
    """All names, all bytes, all of both; each one."""
    names, changes = _all(machine)
    for zeros in (False, True):
        yield LostSet(names, changes, zeros)
        yield LostSet((), changes, zeros)
        yield from (LostSet((), (n,), zeros) for n in _some(changes))
    yield LostSet(names, ())
    yield from (LostSet((n,), ()) for n in _some(names))


def _posix_runs(machine: DiskModel) -> Losses:
    """All changes from some operation on; all of one file; all but one."""
    names, changes = _all(machine)
    operations = sorted(_operations(machine.name_changes) | _operations(machine.byte_changes))
    for zeros in (False, True):
        for since in _some(operations[1:]):
            late = _since(machine.byte_changes, since)
            yield LostSet(_since(machine.name_changes, since), late, zeros)
            yield LostSet((), late, zeros)
        yield from (LostSet((), file, zeros) for file in _by_file(machine))
        for survivor in _some(names):
            yield LostSet(tuple(n for n in names if n != survivor), changes, zeros)
        for survivor in _some(changes):
            yield LostSet(names, tuple(n for n in changes if n != survivor), zeros)
            yield LostSet((), tuple(n for n in changes if n != survivor), zeros)
    for since in _some(operations[1:]):
        yield LostSet(_since(machine.name_changes, since), ())
    for survivor in _some(names):
        yield LostSet(tuple(n for n in names if n != survivor), ())


def _posix_pairs(machine: DiskModel) -> Losses:
    """Every pair: two names, two writes, or one of each."""
    names, changes = (some[-PAIRS_OF:] for some in _all(machine))
    for pair in itertools.combinations(names, 2):
        yield LostSet(pair, ())
    for zeros in (False, True):
        for name, change in itertools.product(names, changes):
            yield LostSet((name,), (change,), zeros)
        for pair in itertools.combinations(changes, 2):
            yield LostSet((), pair, zeros)


def _ext4_simple(machine: DiskModel) -> Losses:
    """Names from some operation on; all bytes that can be lost; the bytes of each write."""
    for names in _name_suffixes(machine):
        yield LostSet(names, ())
        yield LostSet(names, _unforced_changes(machine, names))
    yield from (LostSet((), (n,)) for n in _some(_unforced_changes(machine, ())))


def _ext4_runs(machine: DiskModel) -> Losses:
    """Bytes of each file, or from some operation on, combined with every suffix of the names."""
    for names in _name_suffixes(machine):
        free = _unforced_changes(machine, names)
        for file in _by_file(machine):
            yield LostSet(names, tuple(n for n in file if n in free))
        yield from (LostSet(names, free[n:]) for n in _some(range(1, len(free))))


def _ext4_pairs(machine: DiskModel) -> Losses:
    for names in _name_suffixes(machine):
        free = _unforced_changes(machine, names)[-PAIRS_OF:]
        yield from (LostSet(names, (n,)) for n in free)
        yield from (LostSet(names, pair) for pair in itertools.combinations(free, 2))


LOSSES: Mapping[Model, tuple[Callable[[DiskModel], Losses], ...]] = {
    "kill": (),
    "posix": (_posix_simple, _posix_runs, _posix_pairs),
    "ext4-ordered": (_ext4_simple, _ext4_runs, _ext4_pairs),
    "nfs": (_posix_simple, _posix_runs, _posix_pairs),
    "s3": (),
}
"""By model: one generator per level, simplest first. Losing nothing comes before them."""


def _all(machine: DiskModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(range(len(machine.name_changes))), tuple(range(len(machine.byte_changes)))


def _some(positions: Sequence[int]) -> Sequence[int]:
    if len(positions) <= SINGLY:
        return positions
    # Every k-th of the older half, k rounded up, so that there are at most SINGLY in all.
    newest = len(positions) - SINGLY // 2
    return [*positions[: newest : -(-newest // (SINGLY // 2))], *positions[newest:]]


def _operations(changes: Sequence[NameChange] | Sequence[ByteChange]) -> set[int]:
    return {change.operation for change in changes}


def _since(changes: Sequence[NameChange | ByteChange], operation: int) -> tuple[int, ...]:
    return tuple(n for n, change in enumerate(changes) if change.operation >= operation)


def _by_file(machine: DiskModel) -> Iterator[tuple[int, ...]]:
    for node in sorted({change.node for change in machine.byte_changes}):
        yield tuple(n for n, c in enumerate(machine.byte_changes) if c.node == node)


def _name_suffixes(machine: DiskModel) -> Iterator[tuple[int, ...]]:
    """Nothing, then ever longer suffixes; the names of one operation stay together."""
    yield ()
    for operation in _some(sorted(_operations(machine.name_changes)))[::-1]:
        yield _since(machine.name_changes, operation)


def _unforced_changes(machine: DiskModel, lost: tuple[int, ...]) -> tuple[int, ...]:
    """The byte changes that no surviving name needs."""
    forced = {
        n
        for m, name in enumerate(machine.name_changes)
        if name.needs_bytes and m not in lost
        for n, change in enumerate(machine.byte_changes)
        if change.node == name.node and change.operation < name.operation
    }
    return tuple(n for n in range(len(machine.byte_changes)) if n not in forced)
