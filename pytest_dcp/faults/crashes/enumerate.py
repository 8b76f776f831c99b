"""Pure (no I/O): a trace -> what a crash at any moment could leave, each folder once.

A crash is a moment of the trace (`crash_points`) and either an operation of which only a part was
done, or what the model of the file system loses (`losses`). They are enumerated level by level, the
simplest losses first, and within a level the earliest moments first. Where a budget ends in the
midst of a level, the level's crashes are taken evenly from all moments.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pytest_dcp.faults.crashes.crash_points import CrashPoint, moments
from pytest_dcp.faults.crashes.disk_model import DiskModel
from pytest_dcp.faults.crashes.losses import LOSSES, MODELS, RULES, Loss, Model
from pytest_dcp.faults.crashes.object_store_model import ObjectStore
from pytest_dcp.faults.crashes.trace import Entry, Trace, Tree
from pytest_dcp.faults.tap.operation import Operation

ID_DIGITS = 10


@dataclass(frozen=True, slots=True)
class Crash:
    """One crash, and the folder that it leaves."""

    model: Model
    id: str
    """Tells it from every other crash of the trace; the same in every run that does the same
    operations in the same order."""
    done: int
    """Operations that were done before."""
    returned: frozenset[int]
    """Ranks whose recorded block had ended."""
    what: str
    """For people: when it came, and what it lost."""
    tree: Tree = field(repr=False)


@dataclass(frozen=True, slots=True)
class Torn:
    """An operation under way, of which only a part was done."""

    operation: int
    part: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A crash before anyone looked what it leaves."""

    moment: CrashPoint
    storage: DiskModel | ObjectStore
    damage: Loss | Torn

    def id(self, model: Model) -> str:
        """The crash's id."""
        text = f"{model} {self.moment.name} {self.damage}"
        return f"{model}-{hashlib.sha256(text.encode()).hexdigest()[:ID_DIGITS]}"

    def tree(self, operations: Sequence[Operation]) -> Tree:
        """What the crash leaves."""
        if isinstance(self.damage, Torn):
            torn = self.storage.copy()
            at = self.damage.operation
            torn.begin(at, operations[at], self.damage.part)
            return torn.seen()
        if isinstance(self.storage, DiskModel) and self.damage != Loss():
            return self.damage.left(self.storage)
        return self.storage.seen()


def crashes(
    trace: Trace, model: Model, budget: int | None = None, only: str | None = None
) -> Iterator[Crash]:
    """The crashes of a trace that leave different folders, the simplest first.

    budget: the most states. only: nothing but the crash of this id.

    Raises ValueError for an unknown model.
    """
    if model not in MODELS:
        raise ValueError(f"a model of crashes is one of {', '.join(MODELS)}; got {model!r}")
    storages = list(_storages(trace, model))
    seen: set[Found] = set()
    for level in range(len(LOSSES[model]) + 1):
        left = None if budget is None else budget - len(seen)
        if left == 0:
            return
        # Of a long trace, no more moments than crashes are wanted.
        every = 1 if only or not left or not level else -(-len(storages) // left)
        candidates = [
            Candidate(moment, storage, damage)
            for moment, storage in storages[::every]
            for damage in _damages(trace, model, level, moment, storage)
        ]
        if only is not None:
            candidates = [one for one in candidates if one.id(model) == only]
        found = _different(trace, _evenly(candidates, left), seen)
        chosen = sorted(itertools.islice(found, left), key=lambda pair: pair[0].moment.ended)
        for candidate, tree in chosen:
            yield _crash(trace, model, candidate, tree)


Found = tuple[frozenset[int], frozenset[tuple[str, Entry]]]
"""The ranks that had returned, and the folder."""


def _different(
    trace: Trace, candidates: Iterable[Candidate], seen: set[Found]
) -> Iterator[tuple[Candidate, Tree]]:
    for candidate in candidates:
        tree = candidate.tree(trace.operations)
        found = (candidate.moment.returned, frozenset(tree.items()))
        if found not in seen:
            seen.add(found)
            yield candidate, tree


def _storages(trace: Trace, model: Model) -> Iterator[tuple[CrashPoint, DiskModel | ObjectStore]]:
    """The storage at each moment at which it can have been."""
    start: DiskModel | ObjectStore
    start = ObjectStore.of(trace.base) if model == "s3" else DiskModel.of(trace.base, RULES[model])
    done = 0
    waiting: list[int] = []
    for moment in moments(trace):
        waiting += moment.order[done : moment.ended]
        done = max(done, moment.ended)
        waiting = in_order(start, trace.operations, waiting)
        storage = start.copy()
        under_way = moment.order[moment.ended :]
        if not in_order(storage, trace.operations, [*under_way, *waiting]):
            yield moment, storage


def in_order(
    storage: DiskModel | ObjectStore, operations: Sequence[Operation], indices: Sequence[int]
) -> list[int]:
    """Do the operations in a possible order; those that are left, since they cannot have been done.

    Of two that overlapped, the first to end may need a name that the other made.
    """
    left = list(indices)
    while left:
        again = []
        for index in left:
            try:
                storage.apply(index, operations[index])
            except LookupError:
                again.append(index)
        if len(again) == len(left):
            return left
        left = again
    return []


def _damages(
    trace: Trace, model: Model, level: int, moment: CrashPoint, storage: DiskModel | ObjectStore
) -> Iterator[Loss | Torn]:
    if level > 0:
        if isinstance(storage, DiskModel):
            yield from LOSSES[model][level - 1](storage)
        return
    yield Loss()
    for index in moment.under_way:
        for part in storage.parts(trace.operations[index]):
            yield Torn(index, part)


def _evenly(candidates: Sequence[Candidate], wanted: int | None) -> Iterator[Candidate]:
    """All of them, so ordered that any first few come from the whole length."""
    step = 1 if not wanted else max(1, -(-len(candidates) // wanted))
    for start in range(step):
        yield from candidates[start::step]


def _crash(trace: Trace, model: Model, candidate: Candidate, tree: Tree) -> Crash:
    moment = candidate.moment
    return Crash(
        model=model,
        id=candidate.id(model),
        done=len(moment.order),
        returned=moment.returned,
        what=_what(trace.operations, candidate),
        tree=tree,
    )


def _what(operations: Sequence[Operation], candidate: Candidate) -> str:
    """When the crash came, and what it lost."""
    moment, damage, storage = candidate.moment, candidate.damage, candidate.storage
    parts = [f"after {len(moment.order)} of {len(operations)} operations"]
    if moment.order:
        parts.append(f"the last: {operations[moment.order[-1]]}")
    if isinstance(damage, Torn):
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
