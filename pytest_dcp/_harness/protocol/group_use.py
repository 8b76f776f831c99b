"""Each rank's use of its process groups -> whether the ranks are in step. Pure (no I/O).

Enters: for each rank and group, the number of collectives in which the rank took part, their names
if known, and the number of messages that it sent to and received from each member, since a moment
at which all ranks were in step. Leaves: the first difference in words.

A collective that only one rank has started is still open: it would pair with the next one that its
peers start. The same holds for two different collectives, and for a message not received.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ANY = -1
"""In `receives`: a receive that accepted the first message from any member."""
GROUPS_MADE = ""
"""The name under which a rank counts the process groups that it made."""

Ranks = Mapping[int, Mapping[str, "GroupUse"]]
"""By rank, and by the group's name."""


class Kinds(NamedTuple):
    """Names of the collectives that Python has called in a process group."""

    called: int = 0
    digest: int = 0
    """Digest of their names, in order."""
    last: tuple[str, ...] = ()
    """The names of the last few."""


NO_KINDS = Kinds()


@dataclass(frozen=True, slots=True)
class GroupUse:
    """One rank's part in one process group."""

    collectives: int
    members: tuple[int, ...] = ()
    """Ranks of the world, ascending; empty for `GROUPS_MADE`."""
    sends: Mapping[int, int] = field(default_factory=dict)
    """By receiver, as a rank of the world: number of messages."""
    receives: Mapping[int, int] = field(default_factory=dict)
    """By sender."""
    kinds: Kinds = NO_KINDS


Counts = tuple[tuple[int, int], ...]
PlainKinds = tuple[int, int, tuple[str, ...]]
PlainGroups = dict[str, tuple[int, tuple[int, ...], Counts, Counts, PlainKinds]]
"""By the group's name: collectives, members, sent, received, kinds."""


def to_plain(uses: Mapping[str, GroupUse]) -> PlainGroups:
    """The uses in a form that JSON can carry; `from_plain` reads them."""
    return {
        name: (
            use.collectives,
            use.members,
            (*use.sends.items(),),
            (*use.receives.items(),),
            (use.kinds.called, use.kinds.digest, use.kinds.last),
        )
        for name, use in uses.items()
    }


def from_plain(plain: PlainGroups) -> dict[str, GroupUse]:
    """Inverse of `to_plain`."""
    return {
        name: GroupUse(
            collectives,
            tuple(members),
            dict(sends),
            dict(receives),
            Kinds(kinds[0], kinds[1], tuple(kinds[2])),
        )
        for name, (collectives, members, sends, receives, kinds) in plain.items()
    }


def are_equal(plains: Sequence[PlainGroups]) -> bool:
    """Whether all ranks report the same and no messages: in step, checked cheaply."""
    first = plains[0]
    return all(one == first for one in plains) and not any(
        sends or receives for _, _, sends, receives, _ in first.values()
    )


def out_of_step(ranks: Ranks) -> str:
    """The first difference between the ranks in one line; empty when they are in step.

    Only present ranks that have the group are compared.
    """
    names = sorted({name for uses in ranks.values() for name in uses})
    for name in names:
        uses = {rank: of_rank[name] for rank, of_rank in ranks.items() if name in of_rank}
        if text := _collectives(name, uses) or _kinds(name, uses) or _messages(name, uses):
            return text
    return ""


def _collectives(name: str, uses: Mapping[int, GroupUse]) -> str:
    by_count: dict[int, list[int]] = {}
    for rank, use in sorted(uses.items()):
        by_count.setdefault(use.collectives, []).append(rank)
    if len(by_count) < 2:
        return ""
    counts = ", ".join(f"{_ranks(ranks)} {count}" for count, ranks in by_count.items())
    if name == GROUPS_MADE:
        return f"ranks made different numbers of process groups ({counts})"
    return f"ranks started different numbers of collectives in process group {name!r} ({counts})"


def _kinds(name: str, uses: Mapping[int, GroupUse]) -> str:
    """The difference between ranks that started equally many collectives, and equally many of them
    in Python.

    If one rank made a call in Python and another made it in C++, they cannot be compared.
    """
    by_kinds: dict[Kinds, list[int]] = {}
    for rank, use in sorted(uses.items()):
        by_kinds.setdefault(use.kinds, []).append(rank)
    if len(by_kinds) < 2 or len({kinds.called for kinds in by_kinds}) > 1:
        return ""
    text = f"ranks started different collectives in process group {name!r}"
    if len({kinds.last for kinds in by_kinds}) == 1:
        return f"{text}, before the last {len(next(iter(by_kinds)).last)}"
    names = ", ".join(
        f"{_ranks(ranks)} {'... ' * (kinds.called > len(kinds.last))}{', '.join(kinds.last)}"
        for kinds, ranks in by_kinds.items()
    )
    return f"{text} ({names})"


def _messages(name: str, uses: Mapping[int, GroupUse]) -> str:
    for receiver, use in sorted(uses.items()):
        sends = {
            sender: uses[sender].sends.get(receiver, 0) for sender in use.members if sender in uses
        }
        if ANY in use.receives:
            pairs = [("its peers", sum(sends.values()), sum(use.receives.values()))]
        else:
            pairs = [
                (f"rank {sender}", count, use.receives.get(sender, 0))
                for sender, count in sorted(sends.items())
            ]
        for sender_name, count, received in pairs:
            if count != received:
                return (
                    f"rank {receiver} received {received} of {count} messages from {sender_name} "
                    f"in process group {name!r}"
                )
    return ""


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {','.join(map(str, ranks))}:"
