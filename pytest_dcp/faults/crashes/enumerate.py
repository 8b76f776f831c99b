"""Pure (no I/O): a trace -> the folders that a crash at any moment could leave, each once.

The recorded block ran once, to its end. Nothing is run again: its operations, with the times at
which each began and ended in each rank, are enough to compute the folder after every crash.

1. `crash_points.moments` lists when everything may stop: which operations were done, which were
   under way. Operations of several ranks that overlap in time may have been done in either order,
   or not at all, so one instant gives several moments.
2. `_storages` applies the done operations to a model of the storage (`DiskModel`, `ObjectStore`).
   It holds the tree that programs saw, the tree on stable storage, and the changes between them.
3. `_damages` says what the crash did, level by level. At level 0 nothing that was seen is lost, and
   an operation under way may be done in part (`TornWriteAt`). From level 1 on, changes that were
   not yet stable are lost: first all or single ones, then runs of them, then pairs (`losses`). Only
   a power cut loses changes, so the models `kill` and `s3` have level 0 alone.
4. `_different` computes the remaining folder and drops folders seen before. The same folder counts
   twice only if other ranks had returned: then a test may expect something else of it.

The order is by level, then by moment: the most likely and most readable states are first. A level
that does not fit the budget is thinned evenly over all moments (`_evenly`), so that a small budget
still includes the commit at the end of a long save. Candidates are cheap to list; their trees,
which cost a copy of the folder's bytes, are made only as far as the budget goes.

A crash's id (see `crash_id`) has no bytes, clocks or names of files. So it names the same crash in
every run that does the same operations in the same order, and `only` finds it again without regard
to budgets.

Assumes that the trace has every operation below the roots, and that the clocks of all ranks are one
(CLOCK_MONOTONIC of one machine). Guarantees that each yielded state is possible under the model:
every loss is of changes that nothing had made stable, every order one that the times allow. Does
not guarantee that all possible states are listed: subsets of lost changes are sampled beyond pairs,
and two crashes in a row are not considered.

Rank 0 replaces `.metadata` by way of a temporary file that it forgets to sync, while rank 1 appends
to a log. Where only processes die, the old metadata or the new ones are there:

>>> def op(kind, path, at, rank=0, **more):
...     return Operation(kind, path, rank=rank, handle=1, started_ns=at, ended_ns=at + 10, **more)
>>> trace = Trace.of(
...     bases=[{".metadata": b"old", "log": b""}],
...     operations=[
...         op("create", "tmp", 0),
...         op("write", "tmp", 10, offset=0, data=b"new", nbytes=3),
...         op("rename", "tmp", 20, to=".metadata"),
...         op("open", "log", 0, rank=1),
...         op("write", "log", 15, rank=1, offset=0, data=b".", nbytes=1),
...     ],
...     returned_ns={0: 30, 1: 30},
... )
>>> sorted({crash.tree[".metadata"] for crash in crashes(trace, "kill")})
[b'new', b'old']

POSIX lets the name arrive before the bytes, so a power cut can leave an empty or a zeroed file.
ext4 keeps the two together:

>>> sorted({crash.tree[".metadata"] for crash in crashes(trace, "posix")})
[b'', b'\\x00\\x00\\x00', b'new', b'old']
>>> sorted({crash.tree[".metadata"] for crash in crashes(trace, "ext4-ordered")})
[b'new', b'old']
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pytest_dcp.faults.crash_models import MODELS, Model
from pytest_dcp.faults.crashes.crash_id import OperationCode, crash_id, encode_operations
from pytest_dcp.faults.crashes.crash_points import CrashPoint, TornWriteAt, moments
from pytest_dcp.faults.crashes.disk_model import DiskModel
from pytest_dcp.faults.crashes.losses import LOSSES, RULES, LostSet
from pytest_dcp.faults.crashes.object_store_model import ObjectStore
from pytest_dcp.faults.crashes.trace import Entry, Trace, Tree
from pytest_dcp.faults.tap.operation import Operation


@dataclass(frozen=True, slots=True)
class Crash:
    """One crash, and the folder that it leaves."""

    model: Model
    id: str
    """Identifies the crash within its trace; the same in every run that does the same operations in
    the same order.
    """
    operation_count: int
    """Operations done before."""
    returned: frozenset[int]
    """Ranks whose recorded block had ended."""
    what: str
    """For people: when it came, and what it lost."""
    tree: Tree = field(repr=False)


@dataclass(frozen=True, slots=True)
class StateCandidate:
    """A crash whose folder has not been computed yet."""

    moment: CrashPoint
    storage: DiskModel | ObjectStore
    damage: LostSet | TornWriteAt

    def id(self, model: Model, codes: Sequence[OperationCode]) -> str:
        """The crash's id."""
        return crash_id(model, self.moment, self.storage, self.damage, codes)

    def tree(self, operations: Sequence[Operation]) -> Tree:
        """The folder after the crash."""
        # Done in part, it changes the storage itself: other candidates share that one.
        if isinstance(self.damage, TornWriteAt):
            torn = self.storage.copy()
            at = self.damage.operation
            torn.begin(at, operations[at], self.damage.part)
            return torn.visible_tree()
        if isinstance(self.storage, DiskModel) and self.damage != LostSet():
            return self.damage.tree_after(self.storage)
        return self.storage.visible_tree()


def crashes(
    trace: Trace, model: Model, budget: int | None = None, only: str | None = None
) -> Iterator[Crash]:
    """The crashes of a trace that leave different folders, the simplest first.

    budget: maximum number of states. only: the id of the single crash to return.

    Raises ValueError for an unknown model.
    """
    if model not in MODELS:
        raise ValueError(f"a model of crashes is one of {', '.join(MODELS)}; got {model!r}")
    storages = list(_storages(trace, model))
    codes = encode_operations(trace.operations)
    seen: set[Found] = set()
    for level in range(len(LOSSES[model]) + 1):  # a level may be empty, and the next one not
        remaining = None if budget is None else budget - len(seen)
        if remaining == 0:
            return
        # A long trace has more moments than the budget allows crashes: drop the surplus.
        every = 1 if only or not remaining or not level else -(-len(storages) // remaining)
        candidates = [
            StateCandidate(moment, storage, damage)
            for moment, storage in storages[::every]
            for damage in _damages(trace, model, level, moment, storage)
        ]
        if only is not None:
            # Before any tree is made: an id costs no copy of the folder.
            candidates = [one for one in candidates if one.id(model, codes) == only]
        found = _different(trace, _evenly(candidates, remaining), seen)
        # Thinning took the moments in another order than readers expect.
        chosen = sorted(
            itertools.islice(found, remaining), key=lambda pair: pair[0].moment.ended_count
        )
        for candidate, tree in chosen:
            yield _crash(trace, model, candidate, tree, codes)


Found = tuple[frozenset[int], frozenset[tuple[str, Entry]]]
"""The ranks that had returned, and the folder."""


def _different(
    trace: Trace, candidates: Iterable[StateCandidate], seen: set[Found]
) -> Iterator[tuple[StateCandidate, Tree]]:
    for candidate in candidates:
        tree = candidate.tree(trace.operations)
        # Trees are compared, not damages: many different losses leave the same folder.
        found = (candidate.moment.returned, frozenset(tree.items()))
        if found not in seen:
            seen.add(found)
            yield candidate, tree


def _storages(trace: Trace, model: Model) -> Iterator[tuple[CrashPoint, DiskModel | ObjectStore]]:
    """The storage at each moment, once for each order in which it can have come about."""
    start: DiskModel | ObjectStore
    start = ObjectStore.of(trace.base) if model == "s3" else DiskModel.of(trace.base, RULES[model])
    applied_count = 0
    waiting: list[int] = []
    for moment in moments(trace):
        waiting += moment.order[applied_count : moment.ended_count]
        applied_count = max(applied_count, moment.ended_count)
        # Operations that have ended stay in `start`; operations under way are applied to a copy. So
        # all moments together cost one pass over the trace, not one each.
        waiting = in_order(start, trace.operations, waiting)
        storage = start.copy()
        under_way = moment.order[moment.ended_count :]
        # Otherwise impossible: an operation needs a name that nothing before it has made.
        if not in_order(storage, trace.operations, [*under_way, *waiting]):
            yield moment, storage


def in_order(
    storage: DiskModel | ObjectStore, operations: Sequence[Operation], indices: Sequence[int]
) -> list[int]:
    """Do the operations in a possible order. Returns the operations that cannot have
    been done.

    Of two overlapping operations, the first to end may need a name that the other created.
    """
    pending = list(indices)
    while pending:
        impossible = []
        for index in pending:
            try:
                storage.apply(index, operations[index])
            except LookupError:
                impossible.append(index)
        # No progress in a whole round: no order is possible.
        if len(impossible) == len(pending):
            return pending
        pending = impossible
    return []


def _damages(
    trace: Trace, model: Model, level: int, moment: CrashPoint, storage: DiskModel | ObjectStore
) -> Iterator[LostSet | TornWriteAt]:
    if level > 0:
        if isinstance(storage, DiskModel):
            yield from LOSSES[model][level - 1](storage)
        return
    yield LostSet()
    for index in moment.under_way:
        for part in storage.parts(trace.operations[index]):
            yield TornWriteAt(index, part)


def _evenly(candidates: Sequence[StateCandidate], count: int | None) -> Iterator[StateCandidate]:
    """All of them, ordered so that any prefix is spread evenly over the whole sequence."""
    step = 1 if not count else max(1, -(-len(candidates) // count))
    for start in range(step):
        yield from candidates[start::step]


def _crash(
    trace: Trace,
    model: Model,
    candidate: StateCandidate,
    tree: Tree,
    codes: Sequence[OperationCode],
) -> Crash:
    moment = candidate.moment
    return Crash(
        model=model,
        id=candidate.id(model, codes),
        operation_count=len(moment.order),
        returned=moment.returned,
        what=_what(trace.operations, candidate),
        tree=tree,
    )


def _what(operations: Sequence[Operation], candidate: StateCandidate) -> str:
    """A text for people: when the crash came, and what it lost."""
    moment, damage, storage = candidate.moment, candidate.damage, candidate.storage
    parts = [f"after {len(moment.order)} of {len(operations)} operations"]
    if moment.order:
        parts.append(f"the last: {operations[moment.order[-1]]}")
    if isinstance(damage, TornWriteAt):
        parts.append(f"{damage.part} bytes done of: {operations[damage.operation]}")
    elif isinstance(storage, DiskModel):
        names = sorted({storage.name_changes[n].operation for n in damage.names})
        changed = sorted({storage.byte_changes[n].operation for n in damage.bytes})
        parts += [f"its names lost: {operations[n]}" for n in names]
        how = "its bytes zeros" if damage.zeros else "its bytes lost"
        parts += [f"{how}: {operations[n]}" for n in changed]
    if moment.returned:
        parts.append(f"rank {', '.join(map(str, sorted(moment.returned)))} had returned")
    return "; ".join(parts)
