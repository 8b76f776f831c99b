"""Where and when a fault acts. Pure (no I/O): names, patterns and counts.

Enters: the arguments of `inject`, and one event after the other. Leaves: whether the fault fires at
this event. Each rank counts for itself, so that an injection has the same effect in every run.

>>> from pytest_dcp.faults.kinds.operations import NoSpace, ShortRead
>>> full = Injection(NoSpace(), on="write_data", rank=1)
>>> sorted(full.hooks), full.kinds  # operations made while the hook runs
(['writer.write_data'], ('make_folder', 'create', 'write', 'allocate'))

Everything that is wrong is said at once:

>>> for line in problems(Injection(ShortRead(), on="finnish", nth=0)):
...     print(line)
on='finnish' is neither a hook nor the kind of an operation; ...
nth...
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from pytest_dcp.faults.kinds.base import Fault
from pytest_dcp.faults.tap.operation import OPERATION_KINDS

HOOKS: Mapping[str, tuple[str, ...]] = {
    "writer": (
        "reset", "set_up_storage_writer", "prepare_local_plan", "prepare_global_plan",
        "write_data", "finish", "storage_meta", "validate_checkpoint_id",
    ),
    "reader": (
        "reset", "read_metadata", "set_up_storage_reader", "prepare_local_plan",
        "prepare_global_plan", "read_data", "validate_checkpoint_id",
    ),
    "save_planner": (
        "set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "resolve_data",
    ),
    "load_planner": (
        "set_up_planner", "create_local_plan", "create_global_plan", "finish_plan", "load_bytes",
        "resolve_bytes", "resolve_tensor", "commit_tensor",
    ),
    "stager": ("should_synchronize_after_execute", "stage", "synchronize_staging", "close"),
}  # fmt: skip
"""The hooks of torch's storages, planners and stagers, by role."""

FUTURES = frozenset({"writer.write_data", "reader.read_data", "stager.stage"})
"""Hooks that may return a future."""


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault, and where and when it acts."""

    fault: Fault
    on: str
    """A hook, perhaps as `writer.finish`, or the kind of an operation; `close` is the operation."""
    rank: int | None = None
    """Only in this rank; None: in any."""
    thread: str | None = None
    """main, worker (any other), or a pattern of thread names."""
    path: str | None = None
    """A shell pattern, matched against the path below the watched folder if it contains a slash,
    else against the last name of the path. For a rename or link, either path may match.
    """
    nth: int = 1
    """The number of the matching event in a rank, counted from 1."""
    sticky: bool = False
    """Whether it also fires at every later event."""

    @property
    def hooks(self) -> frozenset[str]:
        """The selected hooks, as `role.hook`; none if `on` is the kind of an operation."""
        return frozenset() if self.on in OPERATION_KINDS else hooks_named(self.on)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of operations that it can act on; none if it acts at the hook itself."""
        if self.on in OPERATION_KINDS:
            return (self.on,)
        if self.fault.level == "hook":
            return ()
        return self.fault.operations if self.fault.during is None else self.fault.during

    @property
    def key(self) -> str:
        """A short name, the same in every process for the same injection."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Event:
    """A call of a hook, or an operation on storage."""

    name: str
    """`role.hook`, or the operation's kind."""
    rank: int
    thread: str
    is_main: bool
    """Whether the thread is the process's main one."""
    paths: tuple[str, ...] = ()
    """Paths of the operation, relative to the watched folder; a rename has two."""
    nbytes: int = 0
    hooks: frozenset[str] = frozenset()
    """For an operation: the hooks running in this process."""


@dataclass(frozen=True, slots=True)
class Firing:
    """A fault that acts now."""

    counted: bool = True
    """False if an earlier part of this firing was already counted."""
    room_bytes: int | None = None
    """Bytes that still fit; None if the fault has no budget."""


@dataclass(slots=True)
class Tally:
    """One rank's counts for one injection."""

    matches: int = 0
    used_bytes: int = 0
    """Bytes used of the budget."""
    owed: bool = False
    """The last write was cut short at the budget's end: the next one has no room at all."""


def hooks_named(on: str) -> frozenset[str]:
    """The hooks that a name selects; none for an unknown name."""
    return frozenset(
        f"{role}.{hook}"
        for role, hooks in HOOKS.items()
        for hook in hooks
        if on in (hook, f"{role}.{hook}")
    )


def problems(injection: Injection) -> list[str]:
    """Everything that is wrong with an injection."""
    fault, on = injection.fault, injection.on
    if not isinstance(fault, Fault):
        return [  # type: ignore[unreachable]  # callers need not be typed
            f"a fault is expected, such as NoSpace(); got {fault!r}"
        ]
    found = fault.problems()
    is_operation, hooks = on in OPERATION_KINDS, hooks_named(on)
    if not is_operation and not hooks:
        found.append(f"on={on!r} is neither a hook nor the kind of an operation; {_nearest(on)}")
    if is_operation and on not in fault.operations:
        can = ", ".join(fault.operations) or "hooks only"
        found.append(f"{fault!r} cannot act on {on!r}: it acts on {can}")
    if getattr(fault, "when", "before") == "future" and (is_operation or not hooks <= FUTURES):
        found.append(f"when='future' is for {', '.join(sorted(FUTURES))}; got on={on!r}")
    if injection.path is not None and hooks and fault.level == "hook":
        found.append(f"path={injection.path!r}: {fault!r} on a hook meets no path")
    for name, value, low in (("nth", injection.nth, 1), ("rank", injection.rank, 0)):
        if value is not None and (not isinstance(value, int) or value < low):
            found.append(f"{name} takes a whole number >= {low}; got {value!r}")
    return found


def matches(injection: Injection, event: Event) -> bool:
    """Whether the injection counts the event."""
    if event.paths or event.name in OPERATION_KINDS:
        if event.name not in injection.kinds:
            return False
        if injection.hooks and not injection.hooks & event.hooks:
            return False
    elif event.name not in injection.hooks or injection.fault.level != "hook":
        return False
    return (
        injection.rank in (None, event.rank)
        and _is_thread(injection.thread, event)
        and (injection.path is None or any(is_path(injection.path, path) for path in event.paths))
    )


def count(injection: Injection, tally: Tally, event: Event) -> Firing | None:
    """Count a matching event; whether the fault fires at it."""
    budget: int | None = getattr(injection.fault, "after_bytes", None)
    if budget is None:
        return Firing() if _is_due(injection, tally) else None
    if tally.owed:
        tally.owed = False
        return Firing(counted=False, room_bytes=0)
    room = budget - tally.used_bytes
    if event.nbytes <= room:
        tally.used_bytes += event.nbytes if event.name == "write" else 0
        return None
    if not _is_due(injection, tally):
        return None
    if event.name != "write":
        return Firing(room_bytes=0)
    tally.used_bytes = budget
    tally.owed = room > 0
    return Firing(room_bytes=room)


def is_path(pattern: str, path: str) -> bool:
    """Whether a path, relative to the watched folder, matches the pattern."""
    return fnmatchcase(path if "/" in pattern else PurePosixPath(path).name, pattern)


def _is_due(injection: Injection, tally: Tally) -> bool:
    tally.matches += 1
    if injection.sticky:
        return tally.matches >= injection.nth
    return tally.matches == injection.nth


def _is_thread(pattern: str | None, event: Event) -> bool:
    if pattern is None:
        return True
    if pattern in ("main", "worker"):
        return event.is_main == (pattern == "main")
    return fnmatchcase(event.thread, pattern)


def _nearest(on: str) -> str:
    every = [hook for hooks in HOOKS.values() for hook in hooks]
    every += [f"{role}.{hook}" for role, hooks in HOOKS.items() for hook in hooks]
    near = difflib.get_close_matches(str(on), dict.fromkeys([*every, *OPERATION_KINDS]), n=3)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"operations are {', '.join(OPERATION_KINDS)}"
