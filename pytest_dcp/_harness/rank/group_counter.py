"""Counts a rank's collectives and messages, by process group, and keeps which they were.

Enters: this process's groups. Leaves: `GroupUse`s, counted from a moment on. A group's own sequence
number counts the requests, in C++ too, but some backends (gloo) count messages with it, and
`monitored_barrier` by the messages that it is made of, which differ from rank to rank. So these are
counted apart, where Python calls them; nothing else starts them.

Names are recorded only for collectives called from Python: DTensor and DDP call others in C++,
which are only counted.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from pytest_dcp._harness.protocol.group_use import ANY, GROUPS_MADE, GroupUse, Kinds

MESSAGES = ("send", "recv", "recv_anysource")
KINDS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce_coalesced",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather_coalesced",
    "_allgather_base": "all_gather_into_tensor",
    "all_gather_single": "all_gather_into_tensor",
    "allgather_into_tensor_coalesced": "all_gather_into_tensor_coalesced",
    "all_gather_single_coalesced": "all_gather_into_tensor_coalesced",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all_single",
    "all_to_all_single": "all_to_all_single",
    "barrier": "barrier",
    "broadcast": "broadcast",
    "gather": "gather",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "scatter": "scatter",
}
"""A group's methods that start collectives, and how `torch.distributed` calls them."""
LAST = 8
"""How many names of collectives are kept, for people."""

Totals = dict[str, GroupUse]
"""By the name of a group, all that this process has ever done in it."""


@dataclass(slots=True)
class _Messages:
    """Of one group."""

    apart: int = 0
    """The part of the group's sequence number that does not count collectives."""
    sends: Counter[int] = field(default_factory=Counter)
    receives: Counter[int] = field(default_factory=Counter)
    called: int = 0
    """Collectives that Python called since the last mark."""
    digest: int = 0
    """Of their names, in order."""
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST))

    def forget_kinds(self) -> None:
        """Set a mark."""
        self.called = self.digest = 0
        self.last.clear()

    @property
    def kinds(self) -> Kinds:
        """Which collectives there were since the mark."""
        return Kinds(self.called, self.digest, tuple(self.last))


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
        """From now on, count calls that the sequence numbers do not show."""
        from pytest_dcp._torch_internals.process_groups import ProcessGroup

        for name in MESSAGES:
            self._wrap(ProcessGroup, name, _note_message)
        self._wrap(ProcessGroup, "monitored_barrier", _note_barrier)
        for name, kind in KINDS.items():
            if hasattr(ProcessGroup, name):
                self._wrap_collective(ProcessGroup, name, kind)

    def mark(self) -> Totals:
        """Mark the counts so far; `since` returns later ones. An earlier mark is forgotten.

        Counts can also be compared with an earlier mark, but not the names of collectives.
        """
        with self._lock:
            for messages in self._messages.values():
                messages.forget_kinds()
        return self.totals()

    def totals(self) -> Totals:
        """The counts so far."""
        import torch.distributed as dist

        if not dist.is_initialized():
            return {}
        from pytest_dcp._torch_internals.process_groups import group_registry, sequence_number

        world = group_registry()
        found = {GROUPS_MADE: GroupUse(world.group_count)}
        with self._lock:
            for group, name in world.pg_names.items():
                messages = self._messages.get(group, NO_MESSAGES)
                found[name] = GroupUse(
                    sequence_number(group) - messages.apart,
                    tuple(sorted(world.pg_group_ranks[group])),
                    dict(messages.sends),
                    dict(messages.receives),
                    messages.kinds,
                )
        return found

    def since(self, before: Totals) -> dict[str, GroupUse]:
        """The counts after `before`."""
        return {
            name: _difference(now, before[name]) if name in before else now
            for name, now in self.totals().items()
        }

    def _wrap(
        self, owner: Any, name: str, note: Callable[[_Messages, Any, str, Any], None]
    ) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        from pytest_dcp._torch_internals.process_groups import sequence_number

        def counted(group: Any, *args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            before = sequence_number(group)
            passed = False
            try:
                work = original(group, *args, **kwargs)
                passed = True
                return work
            finally:
                with self._lock:
                    messages = self._messages.setdefault(group, _Messages())
                    messages.apart += sequence_number(group) - before
                    if passed:
                        note(messages, group, name, args)

        counted.__name__ = name
        setattr(owner, name, counted)

    def _wrap_collective(self, owner: Any, name: str, kind: str) -> None:
        """As `_wrap`, but quick: collectives are counted by the group itself."""
        original: Callable[..., Any] = getattr(owner, name)
        found, lock, encoded = self._messages, self._lock, kind.encode()

        def counted(group: Any, *args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            work = original(group, *args, **kwargs)
            with lock:
                messages = found.get(group)
                if messages is None:
                    messages = found[group] = _Messages()
                messages.called += 1
                messages.digest = zlib.crc32(encoded, messages.digest)
                messages.last.append(kind)
            return work

        counted.__name__ = name
        setattr(owner, name, counted)


def _note_message(messages: _Messages, group: Any, name: str, args: Any) -> None:
    counts = messages.sends if name == "send" else messages.receives
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
        _more(now.sends, before.sends),
        _more(now.receives, before.receives),
        now.kinds,
    )


def _more(now: Mapping[int, int], before: Mapping[int, int]) -> dict[int, int]:
    return {peer: n - before.get(peer, 0) for peer, n in now.items() if n != before.get(peer, 0)}
