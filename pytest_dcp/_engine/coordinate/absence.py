"""Which of the ranks that have not come to an operation have ended.

Three things tell, and none of them waits:

- the rank's idle connection from an earlier operation broke (see reception);
- the process that it left in the store at its first operation has ended, or torchrun's error file
  of it is there (see presence): on the same machine, or with a shared folder of logs;
- nothing listens any more at the address that it left there (see probe): on another machine.

Nothing is known of a rank that ended before its first operation of the group began, nor of a
machine that vanished from the network before the rank had a connection: they are waited for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.distributed as dist

from pytest_dcp._engine.coordinate import rendezvous
from pytest_dcp._engine.coordinate.probe import Probe
from pytest_dcp._engine.coordinate.reception import Reception

AT_ONCE = 32
"""Ranks that are looked at together: each may be a request to the store, and a descriptor."""


class Absences:
    """What is known of ranks that have not come."""

    def __init__(self, group: dist.ProcessGroup, key: str, reception: Reception) -> None:
        self._group = group
        self._key = key
        self._reception = reception
        self._probes: dict[int, Probe] = {}
        self._turn = 0
        """At which of the ranks the next look begins."""

    def find_ended(self, missing: Sequence[int]) -> dict[int, str]:
        """How those of the missing ranks ended of which it is known."""
        self._end_probes(missing)
        ended = {
            rank: how
            for rank in missing
            if (how := self._reception.broken_connection(self._key, rank)) is not None
        }
        self._turn += AT_ONCE
        at = self._turn % max(1, len(missing))
        turn = [*missing[at:], *missing[:at]][:AT_ONCE]
        for rank in dict.fromkeys([*self._under_way(), *turn]):
            if rank not in ended and (how := self._look(rank)) is not None:
                ended[rank] = how
        return ended

    def _look(self, rank: int) -> str | None:
        presence = rendezvous.presence_of(self._group, rank)
        if presence is None:
            return None
        if (how := presence.how_ended()) is not None or presence.is_visible:
            return how
        probe = self._probes.get(rank)
        if probe is None:
            if (where := presence.listens_at()) is None:
                return None
            probe = self._probes[rank] = Probe(*where)
        if not probe.is_under_way and len(self._under_way()) >= AT_ONCE:
            return None
        return probe.look()

    def _under_way(self) -> list[int]:
        return [rank for rank, probe in self._probes.items() if probe.is_under_way]

    def _end_probes(self, missing: Collection[int]) -> None:
        for rank in self._probes.keys() - set(missing):
            self._probes.pop(rank).close()

    def close(self) -> None:
        """End all tries."""
        self._end_probes(())
