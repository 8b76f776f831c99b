"""Pure (no I/O): the moments at which a crash can happen, with the operations done and under way.

Two operations are in order if one ended before the other began. Each of several overlapping
operations, in different threads or ranks, may or may not have been done, in either order. These are
the down-sets of an interval order: all operations that had ended when some operation began, and any
of the operations then under way.

It is enough to stop where an operation begins, and where a rank returns. In between no other sets
are possible: an operation that ends was under way at the stop before. A return is a stop because it
changes what must hold: if rank 1 returns from a save while rank 0 still renames the metadata, the
folder without that rename has lost a save that rank 1 was told of. After the last of them comes one
more moment, at which all ranks had returned.

Two ranks each make a file, at the same time:

>>> from pytest_dcp.faults.tap.operation import Operation
>>> both = [Operation("create", f"{rank}", rank=rank, ended_ns=10) for rank in (0, 1)]
>>> for moment in moments(Trace.of([{}], both, returned_ns={0: 20, 1: 20})):
...     print(moment.order, moment.under_way)
() (0, 1)
(0,) (1,)
(1,) (0,)
(0, 1) ()
(1, 0) ()
(0, 1) ()
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pytest_dcp.faults.crashes.trace import Trace

MANY = 4
"""Up to this many operations under way, every subset is tried. Beyond it: none, all, each one
alone, and all but each one.
"""


@dataclass(frozen=True, slots=True)
class CrashPoint:
    """A moment at which everything may stop. Numbers are indices into the trace's operations."""

    ended_count: int
    """How many of the first operations of `order` had ended before."""
    order: tuple[int, ...]
    """All operations done by then, in an order in which they can have been done."""
    under_way: tuple[int, ...]
    """Begun but not ended; perhaps partly done."""
    returned: frozenset[int]
    """Ranks whose recorded block had ended."""


@dataclass(frozen=True, slots=True)
class TornWriteAt:
    """An operation under way, partly done."""

    operation: int
    """Index into the trace's operations."""
    part: int
    """One of the model's `parts`: for a write, the number of bytes done."""


def moments(trace: Trace) -> Iterator[CrashPoint]:
    """Every moment of a trace, earliest first."""
    operations = trace.operations
    prefix: list[int] = []
    seen: set[tuple[frozenset[int], tuple[int, ...], frozenset[int]]] = set()
    begun_ns = (operation.started_ns for operation in operations)
    for at in sorted({*begun_ns, *trace.returned_ns.values()}):
        while len(prefix) < len(operations) and operations[len(prefix)].ended_ns <= at:
            prefix.append(len(prefix))
        # `order` numbers operations by their ends, so the ended ones are a prefix.
        running = [n for n in range(len(prefix), len(operations)) if operations[n].started_ns <= at]
        returned = frozenset(rank for rank, end in trace.returned_ns.items() if end <= at)
        for some in _orders(_subsets(running)):
            # The same operations in one order are one moment, whichever beginning it was found at.
            key = (frozenset((*prefix, *some)), some, returned)
            if key not in seen:
                seen.add(key)
                under_way = tuple(n for n in running if n not in some)
                yield CrashPoint(len(prefix), (*prefix, *some), under_way, returned)
    everything = tuple(range(len(operations)))
    returned = frozenset(trace.returned_ns)
    if (frozenset(everything), (), returned) not in seen:
        yield CrashPoint(len(everything), everything, (), returned)


def _subsets(running: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if len(running) <= MANY:
        for count in range(len(running) + 1):
            yield from itertools.combinations(running, count)
        return
    yield ()
    for one in running:
        yield (one,)
    for one in running:
        yield tuple(n for n in running if n != one)
    yield tuple(running)


def _orders(subsets: Iterator[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
    for subset in subsets:
        # Forwards and backwards only: all orders are too many, and two show whether order matters.
        yield subset
        if len(subset) > 1:
            yield subset[::-1]
