"""The ranks' write items -> who writes what, and the index of the whole. Pure (no I/O).

The coordinator calls `global_plan` with one table of write items per rank. A row of a table says: I
hold this box of that tensor. The plan answers two questions:

- Who writes each box? Rows with the same name and the same offset are replicas. Exactly one of them
  is kept.
- Which boxes does the checkpoint hold? The kept boxes, sorted by name and offset, are the index,
  which becomes `Metadata.state_dict_metadata`.

The steps, in this order, since each relies on the ones before:

1. `_join_tables` puts the rows of all ranks below each other and numbers the distinct names.
2. `_check_bounds` refuses boxes outside their tensors. From here on an offset can stand for a
   number: `_linear_offsets` maps the offsets within one tensor to distinct integers.
3. `_sort_by_key_and_offset` sorts the rows by name, offset and rank. Replicas are now neighbours,
   and `_group_starts` marks where each group begins.
4. `_check_replicas` refuses ranks that disagree: on whether a name is a tensor or a value, on a
   tensor's size or dtype, on the shape of a box that two of them hold.
5. `_choose_keepers` chooses one row per group. Boxes without a replica are charged to their rank
   first. Then the groups, largest first, each go to the rank with the fewest bytes so far among the
   holders of the box (LPT, the longest-processing-time rule of Graham 1969: with free choice of the
   rank its fullest rank has at most 4/3 of the best possible; replicas restrict the choice, so here
   it is a heuristic). Ties go to the lowest rank.
6. `_index` lists the kept boxes, and `box_coverage.problems_of` checks that they tile every tensor:
   no overlap and, where `complete`, no gap.
7. `_divide_among_ranks` cuts the kept rows back into one table per rank, in each rank's own order.
   The hint of a row is the position of its box in the index's list for that name, as torch's
   `MetadataIndex.index`.

Assumes that every rank's table describes the same save. Guarantees that every distinct box is
written once, that the result depends on the tables alone (any rank that has them computes the same
plan), and that a plan is returned only if no check found a problem. Everything but step 5 is
vectorised over the rows of all ranks; the time is that of sorting them, n log n in their number.

Two ranks share `w` by rows, and both hold all of `b`. Rank 0 wins `b`, a tie at 16 bytes each:

>>> import torch
>>> from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
>>> from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
>>> def write(fqn, size, offset, shape):
...     box = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
...     data = TensorWriteData(box, TensorProperties(torch.float32), torch.Size(size))
...     return WriteItem(MetadataIndex(fqn, offset), WriteItemType.SHARD, tensor_data=data)
>>> b = write("b", [2], [0], [2])
>>> rank_0 = WriteItems.of([write("w", [4, 2], [0, 0], [2, 2]), b])
>>> rank_1 = WriteItems.of([write("w", [4, 2], [2, 0], [2, 2]), b])
>>> plan = global_plan([rank_0, rank_1])
>>> [table.fqns for table in plan.tables]
[('w', 'b'), ('w',)]
>>> [table.hint.tolist() for table in plan.tables]
[[0, 0], [1]]

In the index, chunks 0 and 1 are those of `w`, chunk 2 is `b`, padded to two dimensions:

>>> plan.index.fqns, plan.index.first.tolist()
(('w', 'b'), [0, 2, 3])
>>> plan.index.offset.tolist(), plan.index.shape.tolist()
([[0, 0], [2, 0], [0, 0]], [[2, 2], [2, 2], [2, 1]])

Without rank 1 half of `w` is missing:

>>> global_plan([rank_0])
Traceback (most recent call last):
    ...
pytest_dcp.errors.PlanError: Failed to validate global plan: key:w invalid fill tensor-volume: 8
chunks-volume: 4
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.distributed.checkpoint.metadata import TensorProperties

from pytest_dcp._engine.plan.box_coverage import problems_of
from pytest_dcp._engine.plan.boxes import (
    Ints,
    out_of_bounds,
    row_bounds,
    spans,
    split_by_total,
    strides_of,
    widen_table,
)
from pytest_dcp._engine.plan.columns import BYTES, SHARD, UNKNOWN, WriteItems, number_properties
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.packed_names import Fqns
from pytest_dcp._engine.plan.replica_comparison import Replicas, groups_of_ranks
from pytest_dcp.errors import PlanError

SHOWN = 20
"""How many problems an error lists in full; the rest are counted."""


@dataclass(frozen=True, slots=True, eq=False)
class GlobalPlan:
    """Which rank writes which boxes."""

    tables: list[WriteItems]
    """For each rank: the rows that it keeps, in its own order, with hints into the index."""
    rows: list[Ints]
    """For each rank: which of its rows these are."""
    index: Index
    replicas: Replicas
    """The groups of rows, of which one row each is kept."""


@dataclass(frozen=True, slots=True, eq=False)
class _RankRows:
    """Every rank's rows, one after the other."""

    fqns: Fqns
    """The distinct names, in the order of their first appearance."""
    key: Ints
    """(rows,) positions in `fqns`."""
    rank: Ints
    kind: NDArray[np.int8]
    properties: tuple[TensorProperties, ...]
    property_of: NDArray[np.int32]
    ndim: NDArray[np.int16]
    size: Ints
    offset: Ints
    shape: Ints
    nbytes: Ints
    """Of each row's data."""


def global_plan(
    tables: Sequence[WriteItems], *, to_lowest_rank: bool = False, complete: bool = True
) -> GlobalPlan:
    """The ranks' plans without replicas, and the index of what they write together.

    `to_lowest_rank` keeps each replica on the lowest rank that has it, instead of balancing bytes.
    `complete` requires that the boxes fill every tensor; without it a gap is not an error (each
    rank plans alone). Raises PlanError naming every key whose boxes do not fit.
    """
    rows = _join_tables(tables)
    _check_bounds(rows)
    linear = _linear_offsets(rows)
    order = _sort_by_key_and_offset(rows, linear)
    starts = _group_starts(rows.key[order], linear[order])
    _check_replicas(rows, order, starts)
    keeper = _choose_keepers(rows, order, starts, to_lowest_rank)
    index, first_chunk = _index(rows, order[starts])
    problems = problems_of(index, complete=complete)
    if problems:
        raise PlanError(_list_problems("Failed to validate global plan: ", problems))
    hint_of_row = np.full(len(rows.key), UNKNOWN, dtype=np.int64)
    # A hint is the chunk's position among the chunks of its own key.
    hints = np.arange(len(starts)) - first_chunk[rows.key[order[starts]]]
    hint_of_row[keeper] = np.where(rows.kind[keeper] == BYTES, UNKNOWN, hints)
    lead = order[starts]
    replicas = Replicas(
        group=groups_of_ranks([len(table) for table in tables], order, starts),
        count=np.diff(np.append(starts, len(order))),
        nbytes=np.where(rows.kind[lead] == BYTES, UNKNOWN, rows.nbytes[lead]),
        fqns=rows.fqns,
        key=rows.key[lead],
    )
    # Sorted, since `keeper` is in the order of keys: each rank writes in its own order.
    keeper.sort()
    # A gigabyte in a large job, which the shares need next.
    del rows, linear, order, starts, lead, hints
    shares = _divide_among_ranks(tables, keeper, hint_of_row)
    return GlobalPlan(*shares, index, replicas)


def concatenate_tables(tables: Sequence[WriteItems]) -> tuple[list[WriteItems], Index]:
    """The tables with hints, and the index of all rows unchanged: keeps replicas, checks nothing.

    Chunks keep the order of the ranks. Raises PlanError if a value or an unsharded tensor is in two
    plans.
    """
    rows = _join_tables(tables)
    order = np.argsort(rows.key, kind="stable")
    # The parts of a sharded tensor share a name; no value and no whole tensor may.
    twice = np.flatnonzero((np.diff(rows.key[order]) == 0) & (rows.kind[order][1:] != SHARD))
    if len(twice):
        names = sorted({rows.fqns[rows.key[order[at]]] for at in twice.tolist()})
        raise PlanError(_list_problems("Planned more than once: ", names))
    index, first = _index(rows, order)
    hint = np.full(len(order), UNKNOWN, dtype=np.int64)
    hint[order] = np.arange(len(order)) - first[rows.key[order]]
    hint[rows.kind == BYTES] = UNKNOWN
    shared, _ = _divide_among_ranks(tables, np.arange(len(order)), hint)
    return shared, index


def _join_tables(tables: Sequence[WriteItems]) -> _RankRows:
    width = max((table.size.shape[1] for table in tables), default=0)
    names: dict[str, int] = {}
    property_numbers: dict[Any, int] = {}
    ids: dict[int, Ints] = {}
    for table in tables:
        # Ranks that sent the same names share one tuple (`packed_names`), which is numbered once.
        if id(table.fqns) not in ids:
            numbers = [names.setdefault(fqn, len(names)) for fqn in table.fqns]
            ids[id(table.fqns)] = np.array(numbers, dtype=np.int64)
    # Each table numbers its properties itself. The last entry of a lookup serves UNKNOWN, -1.
    lookup = [
        np.array(
            [*(number_properties(property_numbers, p) for p in table.properties), UNKNOWN],
            dtype=np.int32,
        )
        for table in tables
    ]

    def joined(columns: Sequence[Any], empty: Any) -> Any:
        return np.concatenate([*columns, empty])

    none, nothing = np.zeros(0, dtype=np.int64), np.zeros((0, width), dtype=np.int64)
    return _RankRows(
        fqns=tuple(names),
        key=joined([ids[id(table.fqns)] for table in tables], none),
        rank=np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
        kind=joined([t.kind for t in tables], none.astype(np.int8)),
        properties=tuple(TensorProperties(*key) for key in property_numbers),
        property_of=joined(
            [of[t.property_of] for of, t in zip(lookup, tables, strict=True)],
            none.astype(np.int32),
        ),
        ndim=joined([t.ndim for t in tables], none.astype(np.int16)),
        size=joined([widen_table(t.size, width, 1) for t in tables], nothing),
        offset=joined([widen_table(t.offset, width, 0) for t in tables], nothing),
        shape=joined([widen_table(t.shape, width, 1) for t in tables], nothing),
        nbytes=joined([t.size_bytes() for t in tables], none),
    )


def _linear_offsets(rows: _RankRows) -> Ints:
    """A number for each row's offset, distinct within a tensor, even for boxes at its very end."""
    # Strides of size + 1, since an empty box may lie at the tensor's end, where offset == size.
    linear: Ints = (rows.offset * strides_of(rows.size + 1)).sum(axis=1, dtype=np.int64)
    return linear


def _sort_by_key_and_offset(rows: _RankRows, linear: Ints) -> Ints:
    """The rows sorted by key, offset, rank."""
    # One sort of key * span + linear takes a third of lexsort's time (0.24 s against 0.67 s for a
    # million rows), where the product fits 63 bits. A negative `linear` has wrapped around. In both
    # orders the lowest rank leads its group: the rows come by rank, and the first sort is stable.
    span = int(linear.max(initial=0)) + 1
    if int(linear.min(initial=0)) >= 0 and len(rows.fqns) * span < 1 << 62:
        return np.argsort(rows.key * span + linear, kind="stable")
    return np.lexsort((rows.rank, linear, rows.key))


def _group_starts(key: Ints, linear: Ints) -> Ints:
    """Where, in sorted rows, a new key or offset begins."""
    if not len(key):
        return key
    new = np.ones(len(key), dtype=bool)
    new[1:] = (key[1:] != key[:-1]) | (linear[1:] != linear[:-1])
    return np.flatnonzero(new)


def _check_bounds(rows: _RankRows) -> None:
    """Raise PlanError for boxes outside their tensors: later steps turn offsets into numbers."""
    outside = np.flatnonzero(out_of_bounds(rows.offset, rows.shape, rows.size) & (rows.ndim >= 0))
    problems = [
        f"key:{rows.fqns[rows.key[row]]} has out of bounds chunk: "
        f"tensor-size:{tuple(rows.size[row, : rows.ndim[row]].tolist())} "
        f"offset:{tuple(rows.offset[row, : rows.ndim[row]].tolist())} "
        f"shape:{tuple(rows.shape[row, : rows.ndim[row]].tolist())} on rank {rows.rank[row]}"
        for row in outside.tolist()
    ]
    if problems:
        raise PlanError(_list_problems("Failed to validate global plan: ", problems))


def _check_replicas(rows: _RankRows, order: Ints, starts: Ints) -> None:
    """Raise PlanError unless every row agrees with the first of its key, replicas on the shape."""
    # For each row, `lead` is the first row of the same key, `one` the first of the same key and
    # offset.
    group = np.repeat(starts, np.diff(np.append(starts, len(order))))
    one, other = order[group], order
    first_of_key = np.full(len(rows.fqns), len(order), dtype=np.int64)
    # Not the first in sorted order, but of the lowest rank: the message compares others with it.
    np.minimum.at(first_of_key, rows.key, np.arange(len(order)))
    lead = first_of_key[rows.key]
    dtypes = {p.dtype: n for n, p in enumerate(rows.properties)}
    numbers = [*(dtypes[p.dtype] for p in rows.properties), UNKNOWN]
    dtype_of = np.array(numbers, dtype=np.int32)[rows.property_of]
    every = np.arange(len(order))
    # One check at a time: each compares columns that take gigabytes in a large job.
    checks: tuple[tuple[str, Callable[[], Any], Ints, Ints], ...] = (
        ("kind", lambda: (rows.kind == BYTES) != (rows.kind[lead] == BYTES), every, lead),
        ("size", lambda: _differs_in_size(rows, lead), every, lead),
        ("dtype", lambda: dtype_of != dtype_of[lead], every, lead),
        ("shape", lambda: (rows.shape[one] != rows.shape[other]).any(axis=1), other, one),
    )
    problems = [
        f"{rows.fqns[rows.key[row]]!r}: ranks {rows.rank[beside[at]]} and {rows.rank[row]} "
        f"hold it with another {what}"
        for what, find_wrong, which, beside in checks
        for at in np.flatnonzero(find_wrong())[:SHOWN]
        for row in [which[at]]
    ]
    if problems:
        raise PlanError(_list_problems("The ranks disagree: ", problems))


def _differs_in_size(rows: _RankRows, lead: Ints) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = rows.ndim != rows.ndim[lead]
    for dim in range(rows.size.shape[1]):
        column = rows.size[:, dim]
        found |= column != column[lead]
    return found


def _choose_keepers(rows: _RankRows, order: Ints, starts: Ints, to_lowest_rank: bool) -> Ints:
    """The row that keeps each group's box: the replica on the rank with the fewest bytes."""
    count = np.diff(np.append(starts, len(order)))
    keeper = order[starts]
    if to_lowest_rank:
        return keeper
    # Boxes with only one holder come first: their bytes decide which rank has room for more.
    alone = count == 1
    ranks = int(rows.rank.max(initial=-1)) + 1
    burden = np.zeros(ranks, dtype=np.int64)
    np.add.at(burden, rows.rank[keeper[alone]], rows.nbytes[keeper[alone]])
    load = burden.tolist()
    shared = np.flatnonzero(~alone)
    shared = shared[np.argsort(-rows.nbytes[keeper[shared]], kind="stable")]
    # One by one, since each depends on the ones before; lists are faster than arrays for this.
    for part in split_by_total(count[shared]):
        some = shared[part]
        members = order[np.repeat(starts[some], count[some]) + spans(count[some])]
        rank_of, nbytes = rows.rank[members].tolist(), rows.nbytes[members].tolist()
        chosen, first = [], 0
        for many in count[some].tolist():
            owners = rank_of[first : first + many]
            least = min(owners, key=load.__getitem__)
            at = first + owners.index(least)
            load[least] += nbytes[at]
            chosen.append(at)
            first += many
        keeper[some] = members[chosen]
    return keeper


def _index(rows: _RankRows, chunk: Ints) -> tuple[Index, Ints]:
    """The index of these rows (sorted by key and offset), and each key's first chunk."""
    counts = np.bincount(rows.key[chunk], minlength=len(rows.fqns))
    first = row_bounds(counts)
    # Assumes that the rows of a key agree on size and dtype, so that one speaks for all.
    lead = chunk[first[:-1]] if len(chunk) else chunk
    index = Index(
        fqns=rows.fqns,
        property_of=rows.property_of[lead],
        properties=rows.properties,
        ndim=rows.ndim[lead],
        size=rows.size[lead],
        first=first,
        offset=rows.offset[chunk],
        shape=rows.shape[chunk],
    )
    return index, first


def _divide_among_ranks(
    tables: Sequence[WriteItems], kept_rows: Ints, hint: Ints
) -> tuple[list[WriteItems], list[Ints]]:
    """Each rank's part of the kept rows, and which of its rows these are."""
    # Assumes that `kept_rows` ascends: then the rows of each rank are one stretch of it.
    ends = np.cumsum([len(table) for table in tables])
    parts = np.split(kept_rows, np.searchsorted(kept_rows, ends[:-1]))
    rows = [part - (end - len(t)) for part, end, t in zip(parts, ends, tables, strict=True)]
    return [t.take(r, hint[p]) for t, r, p in zip(tables, rows, parts, strict=True)], rows


def _list_problems(headline: str, problems: Sequence[str]) -> str:
    more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return headline + "\n".join(problems[:SHOWN]) + more
