"""Finds out which of an operation's missing ranks have ended.

Four signs show it:

- the rank's idle connection from an earlier operation broke (see peer_listener);
- the process that it named in the store at its first operation has ended, or torchrun wrote an
  error file for it (see presence): on the same machine, or with a shared folder of logs;
- nothing listens any more at the address that it left there (see probe): on another machine;
- nothing listens any more where gloo did when the group was made (see gloo_listener): a rank that
  ended before it called its first operation.

Two ends leave no sign: a machine vanishes from the network before its rank has a connection, or a
rank ends before its first operation of a group without gloo. The others wait for such ranks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence

import torch.distributed as dist

from pytest_dcp._engine.coordinate import rendezvous
from pytest_dcp._engine.coordinate.gloo_listener import GlooListener
from pytest_dcp._engine.coordinate.peer_listener import PeerListener
from pytest_dcp._engine.coordinate.probe import Probe, QuietProbe

AT_ONCE = 32
"""Ranks to look for at a time: each may take a request to the store, and a descriptor."""
LOOK_S = 0.1
"""How long one look may take if addresses do not answer; the next look begins with other ranks."""


class Absence:
    """One missing rank."""

    def __init__(self, group: dist.ProcessGroup, rank: int) -> None:
        self._group = group
        self._rank = rank
        self._probe: Probe | None = None
        self._by_gloo = False
        """Whether the probe is of gloo's address."""

    @property
    def is_under_way(self) -> bool:
        """Whether an attempt to connect holds a descriptor."""
        return self._probe is not None and self._probe.is_under_way

    def look(self, *, may_begin: bool = True) -> str | None:
        """The sign that the rank has ended, or None.

        Waits only for a quiet attempt (see probe). may_begin: whether it may open a descriptor.
        """
        presence = rendezvous.presence_of(self._group, self._rank)
        where = None
        if presence is not None:
            if (how := presence.how_ended()) is not None or presence.is_visible:
                return how
            where = presence.listens_at()
        if self._probe is None or (where is not None and self._by_gloo):
            self.close()
            self._by_gloo = where is None
            self._probe = self._probe_of_gloo() if where is None else Probe(*where)
        if self._probe is None or not (may_begin or self._probe.is_under_way):
            return None
        return self._probe.look()

    def _probe_of_gloo(self) -> Probe | None:
        if not QuietProbe.is_possible():
            return None
        own = rendezvous.gloo_listener_of(self._group, dist.get_rank(self._group))
        other = rendezvous.gloo_listener_of(self._group, self._rank)
        if own is None or other is None:
            return None
        leads_there = own.can_reach(other) or self._neighbour_answers(other)
        return QuietProbe(other, leads_there=leads_there)

    def _neighbour_answers(self, listener: GlooListener) -> bool:
        """Whether the next or the previous rank lives, at the same address.

        If so, the address leads to their common network: ranks with one address share one.
        """
        size = self._group.size()
        for rank in ((self._rank - 1) % size, (self._rank + 1) % size):
            neighbour = rendezvous.gloo_listener_of(self._group, rank)
            if neighbour is None or neighbour.host != listener.host or rank == self._rank:
                continue
            with contextlib.closing(QuietProbe(neighbour, leads_there=False)) as probe:
                probe.look()
                if probe.was_answered:
                    return True
        return False

    def close(self) -> None:
        """End the attempt under way."""
        if self._probe is not None:
            self._probe.close()
            self._probe = None


class Absences:
    """Looks for signs that missing ranks have ended."""

    def __init__(self, group: dist.ProcessGroup, key: str, peer_listener: PeerListener) -> None:
        self._group = group
        self._key = key
        self._peer_listener = peer_listener
        self._absent: dict[int, Absence] = {}
        self._turn = 0
        """The rank with which the next look begins."""

    def find_ended(self, missing: Sequence[int]) -> dict[int, str]:
        """The missing ranks that are known to have ended, and how."""
        self._forget_others(missing)
        end_reasons = {
            rank: how
            for rank in missing
            if (how := self._peer_listener.broken_connection(self._key, rank)) is not None
        }
        self._turn += AT_ONCE
        at = self._turn % max(1, len(missing))
        turn = [*missing[at:], *missing[:at]][:AT_ONCE]
        until_s = time.monotonic() + LOOK_S
        for rank in dict.fromkeys([*self._under_way(), *turn]):
            if rank not in end_reasons and (how := self._look(rank)) is not None:
                end_reasons[rank] = how
            if time.monotonic() > until_s:
                break
        return end_reasons

    def _look(self, rank: int) -> str | None:
        if rank not in self._absent:
            self._absent[rank] = Absence(self._group, rank)
        return self._absent[rank].look(may_begin=len(self._under_way()) < AT_ONCE)

    def _under_way(self) -> list[int]:
        return [rank for rank, absence in self._absent.items() if absence.is_under_way]

    def _forget_others(self, missing: Collection[int]) -> None:
        for rank in self._absent.keys() - set(missing):
            self._absent.pop(rank).close()

    def close(self) -> None:
        """End all attempts."""
        self._forget_others(())
