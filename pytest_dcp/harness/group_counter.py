"""Counts a rank's collectives and messages, by process group.

Enters: this process's groups. Leaves: `GroupUse`s, counted from a moment on. A group's own sequence
number counts what it was asked for, in C++ too, but some backends (gloo) count messages with it,
and `monitored_barrier` by the messages that it is made of, which differ from rank to rank. So these
are counted apart, where Python calls them; nothing else starts them.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from pytest_dcp.harness.group_use import ANY, GROUPS_MADE, GroupUse

MESSAGES = ("send", "recv", "recv_anysource")

Totals = dict[str, GroupUse]
"""By the name of a group, all that this process has ever done in it."""


@dataclass(slots=True)
class _Messages:
    """Of one group."""

    apart: int = 0
    """How much of the group's sequence number is no collective."""
    sent: Counter[int] = field(default_factory=Counter)
    received: Counter[int] = field(default_factory=Counter)


NO_MESSAGES = _Messages()
Note = Callable[[_Messages, Any, str, Any], None]
"""Counts a call of a group's method: (where, group, the method's name, its arguments)."""


class GroupCounter:
    """The counts of this process; one per process, since it wraps methods of a class of torch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: WeakKeyDictionary[Any, _Messages] = WeakKeyDictionary()
        """By group: a name may be used again when its group was destroyed."""

    def install(self) -> None:
        """Count from here on what the sequence numbers do not tell."""
        from torch._C._distributed_c10d import ProcessGroup

        for name in MESSAGES:
            self._wrap(ProcessGroup, name, _note_message)
        self._wrap(ProcessGroup, "monitored_barrier", _note_barrier)

    def totals(self) -> Totals:
        """What was counted so far."""
        import torch.distributed as dist

        if not dist.is_initialized():
            return {}
        # Can go when torch lists its process groups.
        world: Any = dist.distributed_c10d._world
        found = {GROUPS_MADE: GroupUse(world.group_count)}
        with self._lock:
            for group, name in world.pg_names.items():
                messages = self._messages.get(group, NO_MESSAGES)
                found[name] = GroupUse(
                    _sequence_number(group) - messages.apart,
                    tuple(sorted(world.pg_group_ranks[group])),
                    dict(messages.sent),
                    dict(messages.received),
                )
        return found

    def since(self, before: Totals) -> dict[str, GroupUse]:
        """What was counted after `before`."""
        return {
            name: _difference(now, before[name]) if name in before else now
            for name, now in self.totals().items()
        }

    def _wrap(
        self, owner: Any, name: str, note: Callable[[_Messages, Any, str, Any], None]
    ) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counted(group: Any, *args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            before = _sequence_number(group)
            passed = False
            try:
                work = original(group, *args, **kwargs)
                passed = True
                return work
            finally:
                with self._lock:
                    messages = self._messages.setdefault(group, _Messages())
                    messages.apart += _sequence_number(group) - before
                    if passed:
                        note(messages, group, name, args)

        counted.__name__ = name
        setattr(owner, name, counted)


def _note_message(messages: _Messages, group: Any, name: str, args: Any) -> None:
    counts = messages.sent if name == "send" else messages.received
    counts[ANY if name == "recv_anysource" else _global_rank(group, args[1])] += 1


def _note_barrier(messages: _Messages, group: Any, name: str, args: Any) -> None:
    messages.apart -= 1


def _global_rank(group: Any, peer: int) -> int:
    import torch.distributed as dist

    return dist.get_global_rank(group, peer)


def _difference(now: GroupUse, before: GroupUse) -> GroupUse:
    return GroupUse(
        now.collectives - before.collectives,
        now.members,
        _more(now.sent, before.sent),
        _more(now.received, before.received),
    )


def _more(now: Mapping[int, int], before: Mapping[int, int]) -> dict[int, int]:
    return {peer: n - before.get(peer, 0) for peer, n in now.items() if n != before.get(peer, 0)}


def _sequence_number(group: Any) -> int:
    try:
        count: int = group._get_sequence_number_for_group()
    except RuntimeError:  # a backend that does not count
        return 0
    return count
