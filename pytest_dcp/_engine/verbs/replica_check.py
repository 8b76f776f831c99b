"""A save's comparison of replicas on several ranks, in steps: see `plan.replica_comparison`.

Where copies differ, two further steps find out where: the lowest rank of each group of equal
copies sends the sums of the tensor's blocks (or an outline of the value), then the bytes of the
first block that differs.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from pytest_dcp._engine.coordinate import Team
from pytest_dcp._engine.coordinate.sent_classes import record
from pytest_dcp._engine.io.digests import (
    BLOCK_BYTES,
    block_sums,
    data_of,
    digest_of_value,
    outline,
    sum_of_tensor,
)
from pytest_dcp._engine.io.tensor_memory import memory_of
from pytest_dcp._engine.plan.capabilities import compares_replicas
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.opaque import is_wrapper
from pytest_dcp._engine.plan.replica_comparison import (
    SHOWN,
    Checks,
    Differing,
    ReplicaDifference,
    Sums,
    first_difference,
    mismatch_error,
)

Lookup = Callable[[int], Any]
"""The data of a row of the local plan: this rank's memory of a box, or a value."""


@dataclass(frozen=True, slots=True)
class Dispute:
    """Differences that the coordinator found; sent to every rank instead of the metadata."""

    differences: list[Differing]
    others: list[str]
    """Flat names of further keys that differ."""


@dataclass(frozen=True, slots=True)
class _Copy:
    """One of several differing copies, as its rank describes it."""

    fqn: str
    leaves: list[Any]
    """Sums of a tensor's blocks, or the leaves of a value."""
    shape: tuple[int, ...] | None
    """Of the box; None for a value, and for a wrapper of other tensors."""
    offset: tuple[int, ...] = ()
    """Of the box in the full tensor."""
    dtype: torch.dtype = torch.uint8


record(Dispute, _Copy)


class Comparison:
    """One rank's part in the comparison of one save.

    It works with the default planner, and with subclasses that save the state dict's own data.
    """

    def __init__(self, planner: SavePlanner) -> None:
        self._planner = planner if compares_replicas(planner) else None
        self._checks: list[Checks] | None = None

    def choose_rows(self, plans: Sequence[SavePlan]) -> list[Checks | None]:
        """On the coordinator, once these local plans are joined: the pieces that each rank sums.

        None for every rank if a subclass joined other plans than the ranks': it knows no such rows.
        """
        planner = self._planner
        if planner is not None and planner.replicas is not None:
            same = len(planner.planned) == len(plans) and all(
                items is plan.items or not plan.usable
                for plan, items in zip(plans, planner.planned, strict=True)
            )
            if same:
                seed = secrets.randbits(64)
                self._checks = planner.replicas.choose_rows(planner.replica_check, seed)
        return list(self._checks) if self._checks is not None else [None] * len(plans)

    def sums(self, local: SavePlan, checks: Checks | None) -> Sums | None:
        """A sum for each piece that this rank compares, of rows of its local plan.

        None for a planner that computes its data on request.
        """
        found = None if checks is None else self._own_rows(local)
        if checks is None or found is None:
            return None
        _, lookup = found
        sums = np.empty(len(checks), dtype=np.uint64)
        columns = (checks.rows.tolist(), checks.start.tolist(), checks.nbytes.tolist())
        pieces = zip(*columns, strict=True)
        for at, (row, start, nbytes) in enumerate(pieces):
            data = lookup(row)
            sums[at] = digest_of_value(data) if nbytes < 0 else sum_of_tensor(data, start, nbytes)
        return sums

    def dispute(self, sums: Sequence[Sums | None], *, unchanged: bool = True) -> Dispute | None:
        """On the coordinator: the differences; None if there are none.

        unchanged: whether every rank's data is still as it was summed, so that a closer look can
        say where copies differ.
        """
        if self._planner is None or self._planner.replicas is None or self._checks is None:
            return None
        differing = self._planner.replicas.find_differing(self._checks, sums)
        if not differing:
            return None
        count = SHOWN if unchanged else 0
        return Dispute(differing[:count], [one.fqn for one in differing[count:]])

    def settle(self, team: Team, local: SavePlan, dispute: Dispute) -> None:
        """Raise, on every rank, an error that names each key, the ranks and the first index."""
        items, lookup = self._own_rows(local) or (WriteItems.of([]), _nothing)
        _settle(team, dispute, items, lookup)

    def _own_rows(self, local: SavePlan) -> tuple[WriteItems, Lookup] | None:
        """The rows of this rank's local plan, and a function that returns their data."""
        if self._planner is None:
            return None
        # A remembered plan is not sent: the coordinator refers to its own copy.
        items = WriteItems.of(local.items) if local.usable else self._planner.offered
        lookup = self._planner.lookup(items)
        return None if lookup is None else (items, lookup)


def _nothing(row: int) -> Any:
    raise LookupError(f"this rank was asked for row {row}, and compares nothing")


def _settle(team: Team, dispute: Dispute, items: WriteItems, lookup: Lookup) -> None:
    """Raise, on every rank, an error that names each key, the ranks and the first index."""
    mine = [_own_row(one, team.rank) for one in dispute.differences]

    def describe() -> list[_Copy | None]:
        return [None if row is None else _describe_copy(items, row, lookup(row)) for row in mine]

    def compare(rank_leaves: list[list[_Copy | None]]) -> list[int | None]:
        rank_copies.extend(rank_leaves)
        return [
            _first_leaf([rank_leaves[camp[0]][n] for camp in one.camps()])
            for n, one in enumerate(dispute.differences)
        ]

    rank_copies: list[list[_Copy | None]] = []
    at = team.all_reduce("compare replicas", describe, compare)

    def blocks() -> list[bytes | None]:
        return [
            _block(lookup(row), leaf) if row is not None and leaf is not None else None
            for row, leaf in zip(mine, at, strict=True)
        ]

    def conclude(rank_blocks: list[list[bytes | None]]) -> None:
        found = []
        for n, one in enumerate(dispute.differences):
            ranks = [camp[0] for camp in one.camps()]
            copies = [rank_copies[rank][n] for rank in ranks]
            found.append(_difference(one, copies, at[n], [rank_blocks[rank][n] for rank in ranks]))
        raise mismatch_error(found, dispute.others)

    team.all_reduce("compare replicas", blocks, conclude)


def _own_row(one: Differing, rank: int) -> int | None:
    """The rank's row, if it represents the ranks with the same copy."""
    if rank not in {camp[0] for camp in one.camps()}:
        return None
    return one.members[rank][0]


def _describe_copy(items: WriteItems, row: int, data: Any) -> _Copy:
    fqn = items.fqns[row]
    if items.ndim[row] < 0 or is_wrapper(data):
        return _Copy(fqn, outline(data), None)
    ndim = int(items.ndim[row])
    offset = tuple(items.offset[row, :ndim].tolist())
    return _Copy(fqn, block_sums(data), tuple(data.shape), offset, data.dtype)


def _first_leaf(copies: Sequence[_Copy | None]) -> int | None:
    """The first leaf in which a copy differs from the first copy."""
    leaves = [copy.leaves for copy in copies if copy is not None]
    found = [first_difference(leaves[0], other) for other in leaves[1:]]
    return min((at for at in found if at is not None), default=None)


def _block(data: Any, number: int) -> bytes | None:
    if not isinstance(data, torch.Tensor) or is_wrapper(data):
        return None
    flat = data_of(data)
    return bytes(memory_of(flat)[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])


def _difference(
    one: Differing, copies: Sequence[_Copy | None], leaf: int | None, blocks: Sequence[bytes | None]
) -> ReplicaDifference:
    first = copies[0]
    if first is None:
        raise ValueError("the lowest rank that holds a value did not describe it")
    if first.shape is None:
        return _difference_of_values(one, first.fqn, copies, leaf)
    if leaf is None:
        return ReplicaDifference(first.fqn, one.camps(), "", ["equal by now" for _ in copies])
    return _difference_of_tensors(one, first, leaf, [block or b"" for block in blocks])


def _difference_of_tensors(
    one: Differing, copy: _Copy, number: int, blocks: Sequence[bytes]
) -> ReplicaDifference:
    columns = np.stack([np.frombuffer(block, dtype=np.uint8) for block in blocks])
    at = int((columns != columns[0]).any(axis=0).argmax()) // copy.dtype.itemsize
    element = number * BLOCK_BYTES // copy.dtype.itemsize + at
    inside = np.unravel_index(element, copy.shape) if copy.shape else ()
    index = tuple(int(i) + n for i, n in zip(inside, copy.offset, strict=True))
    elements = [torch.frombuffer(bytearray(block), dtype=copy.dtype) for block in blocks]
    texts = [repr(some[at].item()) for some in elements]
    return ReplicaDifference(copy.fqn, one.camps(), f"index {index}" if index else "", texts)


def _difference_of_values(
    one: Differing, fqn: str, copies: Sequence[_Copy | None], leaf: int | None
) -> ReplicaDifference:
    where, texts = "", []
    for copy in copies:
        leaves = copy.leaves if copy is not None else []
        if leaf is not None and leaf < len(leaves):
            path, text, _ = leaves[leaf]
            where = where or path
            texts.append(text)
        else:
            texts.append("another value" if leaf is None else "nothing there")
    return ReplicaDifference(fqn, one.camps(), where, texts)
