"""Whether the ranks of a load read together, and what each reads: the argument `read` of `load`.

    "local"   each rank reads what it wants
    "shared"  what several ranks want is read by one of them, which sends it to the others
    "auto"    "shared" where reading is far (an object store, a network file system) and would fetch
              a worthwhile part twice; elsewhere "local", since ranks of one machine share the
              kernel's page cache

Every rank says in its plan whether it can and may (`SharingWish`); the coordinator decides for all
(`agree_on_sharing`). Where they share, one more step follows: each rank offers the ranges that it
wants (`Offer`), and gets its share (`Deal`), or None where nothing is worth it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from torch.distributed.checkpoint.storage import StorageReader

from pytest_dcp._engine.coordinate.sent_classes import record
from pytest_dcp._engine.io.entry_places import LocatedEntries
from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.shared_reads import ReadShare, Wants, share_reads
from pytest_dcp._engine.plan.storage_capabilities import shares_reads
from pytest_dcp.rank_names import ranks_text

Read = Literal["auto", "local", "shared"]

WORTHWHILE_BYTES = 1 << 20
"""Less reading than this is not worth another step and connections, for "auto"."""
MOST_RANKS = 256
"""Of a group for "auto": the coordinator compares what all of them want."""
MOST_RECEIVERS = 64
"""Of one rank for "auto": it connects to each of them, and sends each bucket as many times."""


@dataclass(frozen=True, slots=True)
class SharingWish:
    """A rank's say in whether the ranks read together."""

    read: str
    """The argument."""
    is_ready: bool
    """Whether it would: it is asked to, or its storage is far and can."""


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """A rank's offer to read for others."""

    wants: Wants
    token: str
    """Names its end of the exchange."""


@dataclass(frozen=True, slots=True, eq=False)
class Deal:
    """A rank's part in shared reads."""

    share: ReadShare
    tokens: dict[int, str]
    """Of the ranks to which it sends."""


record(SharingWish, Offer, Deal, Wants, ReadShare, LocatedEntries)


def checked_read(read: str, reader: StorageReader) -> Read:
    """The argument; raises ValueError if it is invalid, or the reader cannot do it."""
    if read not in get_args(Read):
        raise ValueError(f"read must be 'auto', 'local' or 'shared', got {read!r}")
    if read == "shared" and not (shares_reads(reader) and reader.may_share_reads()):
        raise ValueError(
            f"read='shared' needs a storage that reads ranges of bytes for other ranks, and "
            f"{type(reader).__name__} reads in its own way: use 'auto' or 'local'"
        )
    return cast(Read, read)


def wish_of(read: Read, reader: StorageReader, ranks: int) -> SharingWish:
    """This rank's say."""
    if read == "local" or ranks < 2 or not shares_reads(reader) or not reader.may_share_reads():
        return SharingWish(read, is_ready=False)
    return SharingWish(read, read == "shared" or (ranks <= MOST_RANKS and reader.is_far))


def agree_on_sharing(wishes: Sequence[SharingWish]) -> bool:
    """On the coordinator: whether the ranks share; ValueError where they differ in `read`."""
    ranks: dict[str, list[int]] = {}
    for rank, wish in enumerate(wishes):
        ranks.setdefault(wish.read, []).append(rank)
    if len(ranks) > 1:
        values = ", ".join(f"{read!r} on {ranks_text(some)}" for read, some in ranks.items())
        raise ValueError(f"`read` must be the same on all ranks, got {values}")
    return all(wish.is_ready for wish in wishes)


def divide_entries(ranks_entries: Sequence[Ints], rank: int) -> Ints:
    """The part of these entries that one rank looks into, of those that it wants itself.

    ranks_entries: of each rank, ascending.

    >>> both = np.arange(4)
    >>> [divide_entries([both, both, np.array([7])], rank).tolist() for rank in range(3)]
    [[0, 1, 2], [3], [7]]
    """
    every = np.unique(np.concatenate(ranks_entries))
    is_wanted = np.array([np.isin(every, some) for some in ranks_entries])
    wanters = is_wanted.sum(axis=0)
    # The n-th of all entries goes to the wanter at the same relative place: neighbours together.
    turn = np.arange(len(every)) * wanters // max(len(every), 1)
    mine: Ints = every[is_wanted[rank] & (is_wanted[:rank].sum(axis=0) == turn)]
    return mine


def make_deals(offers: Sequence[Offer], *, insist: bool) -> list[Deal | None]:
    """On the coordinator: each rank's part; None for all if sharing is not worth it.

    insist: whether everything that is wanted twice is shared, however little it is.
    """
    least_bytes = 1 if insist else WORTHWHILE_BYTES
    shares = share_reads([offer.wants for offer in offers], least_bytes)
    if shares is None:
        return [None] * len(offers)
    receivers = [_receivers_of(rank, share) for rank, share in enumerate(shares)]
    if not insist and max(map(len, receivers)) > MOST_RECEIVERS:
        return [None] * len(offers)
    tokens = [offer.token for offer in offers]
    return [
        Deal(share, {to: tokens[to] for to in ranks})
        for share, ranks in zip(shares, receivers, strict=True)
    ]


def _receivers_of(rank: int, share: ReadShare) -> list[int]:
    """The ranks that get a bucket from this one."""
    groups = set(share.wanted_by[share.owner == rank].tolist())
    return sorted({to for group in groups for to in share.groups[group]} - {rank})
