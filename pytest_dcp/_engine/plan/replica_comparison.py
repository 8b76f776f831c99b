"""Which parts of a state dict several ranks hold, and whether their copies are equal.

A save keeps one copy of each replicated box or value, on whichever rank has the least to write. So
if copies differ, the checkpoint would be a state that no rank ever held. The comparison:

1. The global plan groups the ranks' rows by key and offset (`Replicas`). The coordinator chooses
   what to compare (`choose_rows`) and sends each rank the rows: every replicated value, and of the
   tensors a few short pieces (a sample) or all bytes.
2. Each rank sends a 64-bit sum for each of its rows with the result of its write.
3. The coordinator compares the sums (`find_differing`) before it commits. Only if some differ do
   the ranks send more, so that the error can name the first index.

Pure (no I/O).

Both ranks hold `b`, and each holds half of `w`. In `global_plan` their rows are 0 for `w`, 1 for
`b`; the groups are the two halves and `b`:

>>> replicas = Replicas(
...     group=[np.array([0, 2]), np.array([1, 2])], count=np.array([1, 1, 2]),
...     nbytes=np.array([16, 16, 8]), fqns=("w", "b"), key=np.array([0, 0, 1]))
>>> checks = replicas.choose_rows("check", seed=0)
>>> [(check.rows.tolist(), check.nbytes.tolist()) for check in checks]
[([1], [8]), ([1], [8])]

Each rank sends a sum of its copy of `b`. If they differ, the ranks are in two camps:

>>> sums = [np.array([number], np.uint64) for number in (7, 9)]
>>> differing = replicas.find_differing(checks, sums)
>>> [(one.fqn, one.camps()) for one in differing]
[('b', [[0], [1]])]
>>> some_ranks_text([0, 1, 2, 5])
'ranks 0-2, 5'
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.packed_names import Fqns
from pytest_dcp.errors import ReplicaMismatchError
from pytest_dcp.rank_names import some_ranks_text

ReplicaCheck = Literal["sample", "check", "off"]
"""How much of the replicated data to compare: all values and a sample of the tensors, everything,
or nothing."""
Sums = NDArray[np.uint64]
NOT_COMPARED = 0
"""The sum of a value that cannot be reduced to bytes; it counts as equal to every other sum."""
SAMPLE_BYTES = 4096
"""Bytes of a sampled tensor: replicas that drifted apart differ nearly everywhere."""
SAMPLED_AT_LEAST = 8
SAMPLED_ONE_IN = 64
"""Tensors in a sample. Both constants keep its cost below 3 % of a save: looking up a tensor and
summing a piece takes about a fifth of the time of writing a small tensor."""
SHOWN = 5
"""How many keys an error describes in full."""


@dataclass(frozen=True, slots=True, eq=False)
class Checks:
    """The pieces that one rank sums, one per row."""

    rows: Ints
    """Of its local plan."""
    start: Ints
    """Of the piece, in bytes of the box's row-major data; 0 for a value."""
    nbytes: Ints
    """Of the piece; -1: a Python value."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Replicas:
    """The rows of all ranks' local plans, in groups that hold the same box or value."""

    group: list[Ints]
    """Of each rank: the group of each of its rows."""
    count: Ints
    """Rows of each group."""
    nbytes: Ints
    """Of each group's box; -1: a Python value."""
    fqns: Fqns
    key: Ints
    """Of each group: the position of its name in `fqns`."""

    def choose_rows(self, how: ReplicaCheck, seed: int) -> list[Checks] | None:
        """The pieces that each rank must sum; None if there is nothing to compare.

        The same seed chooses the same sample; a new one at each save eventually finds differences
        that one sample misses.
        """
        many = self.count > 1
        if how == "off" or not many.any():
            return None
        values, tensors = many & (self.nbytes < 0), many & (self.nbytes > 0)
        start = np.zeros(len(self.count), dtype=np.int64)
        length = self.nbytes.copy()
        if how == "sample":
            random = np.random.default_rng(seed)
            some = _some(np.flatnonzero(tensors), random)
            tensors = np.zeros(len(tensors), dtype=bool)
            tensors[some] = True
            pieces = -(-self.nbytes[some] // SAMPLE_BYTES)
            start[some] = random.integers(0, np.maximum(pieces, 1)) * SAMPLE_BYTES
            length[some] = np.minimum(self.nbytes[some] - start[some], SAMPLE_BYTES)
        is_checked = values | tensors
        rows = [np.flatnonzero(is_checked[group]) for group in self.group]
        return [
            Checks(own, start[group[own]], length[group[own]])
            for own, group in zip(rows, self.group, strict=True)
        ]

    def find_differing(
        self, checks: Sequence[Checks], sums: Sequence[Sums | None]
    ) -> list[Differing]:
        """The groups whose members' sums are not all equal, in the order of the first rank's rows.

        A rank that gave no sums (its planner makes the data on the fly) is not compared.
        """
        ranks = [rank for rank, some in enumerate(sums) if some is not None]
        if not ranks:
            return []
        rows = np.concatenate([checks[rank].rows for rank in ranks])
        rank_of = np.repeat(ranks, [len(checks[rank]) for rank in ranks])
        group = np.concatenate([self.group[rank][checks[rank].rows] for rank in ranks])
        all_sums = np.concatenate([cast("Sums", sums[rank]) for rank in ranks])
        compared = all_sums != NOT_COMPARED
        rows, rank_of, group, all_sums = (
            rows[compared],
            rank_of[compared],
            group[compared],
            all_sums[compared],
        )
        first = np.zeros(len(self.count), dtype=np.uint64)
        # Backwards, so that the lowest rank's sum remains.
        first[group[::-1]] = all_sums[::-1]
        odd = set(group[all_sums != first[group]].tolist())
        found: dict[int, dict[int, tuple[int, int]]] = {}
        for at in np.flatnonzero(np.isin(group, list(odd))).tolist():
            members = found.setdefault(int(group[at]), {})
            members[int(rank_of[at])] = (int(rows[at]), int(all_sums[at]))
        return [Differing(self.fqns[self.key[at]], members) for at, members in found.items()]


@dataclass(frozen=True, slots=True)
class Differing:
    """A box or value whose copies differ."""

    fqn: str
    members: dict[int, tuple[int, int]]
    """By rank: the row of its local plan, and its sum."""

    def camps(self) -> list[list[int]]:
        """The ranks in groups of equal copies, the lowest rank's first."""
        by_sum: dict[int, list[int]] = {}
        for rank, (_, checksum) in sorted(self.members.items()):
            by_sum.setdefault(checksum, []).append(rank)
        return list(by_sum.values())


def _some(rows: Ints, random: np.random.Generator) -> Ints:
    """A sample of the rows."""
    # Sorted, so that each rank looks its tensors up in the order of its plan.
    most = max(SAMPLED_AT_LEAST, len(rows) // SAMPLED_ONE_IN)
    return rows if len(rows) <= most else np.sort(random.choice(rows, most, replace=False))


def groups_of_ranks(lengths: Sequence[int], order: Ints, starts: Ints) -> list[Ints]:
    """The group of each rank's rows.

    `lengths` are the ranks' numbers of rows; `order` sorts the rows of all, joined, and a group
    begins at each of `starts` in that order.
    """
    group = np.empty(len(order), dtype=np.int64)
    group[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(order))))
    return np.split(group, np.cumsum(lengths)[:-1])


# ---- the error text


@dataclass(frozen=True, slots=True)
class ReplicaDifference:
    """Where the copies of one key differ first."""

    fqn: str
    camps: list[list[int]]
    """Ranks with equal copies."""
    where: str
    """The first index, or the first place in a Python value; may be empty."""
    texts: list[str]
    """Each camp's copy at that place."""

    def __str__(self) -> str:
        at = f" first at {self.where}:" if self.where else ":"
        copies = ", ".join(
            f"{text} on {some_ranks_text(ranks)}"
            for ranks, text in zip(self.camps, self.texts, strict=True)
        )
        return f"{self.fqn!r} differs{at} {copies}"


def mismatch_error(
    differences: Sequence[ReplicaDifference], others: Iterable[str] = ()
) -> ReplicaMismatchError:
    """The error for these differences, and for other keys, which are only named."""
    other_fqns = list(others)
    fqns = tuple(dict.fromkeys([*(d.fqn for d in differences), *other_fqns]))
    lines = [f"{len(fqns)} key(s) that several ranks hold are not equal on them:"]
    lines += [str(difference) for difference in differences]
    if other_fqns:
        lines.append(
            f"and {', '.join(map(repr, other_fqns[:20]))}{' ...' if len(other_fqns) > 20 else ''}"
        )
    lines.append(
        "One copy of each is saved. Make them equal (broadcast them before the save), save a value "
        "of each rank as PerRank(value), or pass replicas='off' to save any rank's copy (for code "
        "that you cannot change: set DCP_REPLICAS=off)."
    )
    return ReplicaMismatchError("\n".join(lines), keys=fqns)


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int | None:
    """The first position at which two sequences differ, a missing end counted; None if none."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return None if len(one) == len(other) else min(len(one), len(other))
