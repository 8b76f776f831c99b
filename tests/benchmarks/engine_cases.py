"""The cases of the engine's benchmark and their targets, as a table. Pure (no I/O)."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine_states import MIXED, REPLICATE, SHARD_0, SHARD_1, UNSHARDED

DISK = "disk"
TMPFS = "tmpfs"
PLACES = (DISK, TMPFS)

OURS = "ours"
TORCH = "torch"
FOREIGN = "ours, torch's checkpoint"
"""Our load of the checkpoint that torch wrote: it has no checksums."""
OURS_IN_PROCESS = "ours, in a process"
"""Our async_save with AsyncCheckpointerType.PROCESS."""
RAW = "raw"
"""pread into, write from, or copy from, the same memory."""
ONE_RANK = "torch.save"
"""torch.save, or torch.load(mmap=True) and a copy, of the whole state on one rank."""
PACKAGE = "torch_checkpointing"
"""The package of that name: synchronous saves, never synced, and loads of the same layout."""
FULL, AUTO, OFF = "verify=full", "verify=auto", "verify=off"
OUR_OWN = (OURS, OURS_IN_PROCESS, RAW, FULL, AUTO, OFF)
"""Methods that need no peer package."""

READ_RATIO = "bytes read / needed"
MEMORY = "extra peak memory / state"


@dataclass(frozen=True, slots=True)
class Goal:
    """One promise: a ratio of two methods' medians, or a number that a case told."""

    limit: float | None
    """The promised ratio; None: no promise, the figure is for information."""
    over: str = TORCH
    under: str = OURS
    at_most: bool = False
    """Whether the ratio may be at most the limit; else it is to be at least that."""
    note: str | None = None
    """The name of the number, where it is no ratio of times."""


@dataclass(frozen=True, slots=True)
class Case:
    """Methods that are timed together, one after another in each round."""

    name: str
    kind: str
    """load, verify, save, async, load memory, save memory, plan, plan again or index: selects
    the function."""
    goals: tuple[Goal, ...]
    methods: tuple[str, ...] = (OURS, TORCH)
    place: str = DISK
    state: str = "medium"
    saved: str = SHARD_0
    """The layout of what is saved."""
    wanted: str = SHARD_0
    """The layout that is loaded."""
    sync: bool = True
    overwrite: bool = False
    cold: bool = False
    """Whether the files are dropped from the page cache before each method."""
    ranks: int = 4
    """Of the world; for plans, the number of simulated ranks."""

    @property
    def checkpoint(self) -> tuple[str, str, str] | None:
        """The checkpoint that the case reads, shared between cases; None if it reads none."""
        loads = self.kind in ("load", "verify", "load memory")
        return (self.place, self.state, self.saved) if loads else None


def _faster(limit: float | None) -> Goal:
    return Goal(limit)


NEAR_READ = Goal(1.2, over=OURS, under=RAW, at_most=True)
NEAR_WRITE = Goal(1.1, over=OURS, under=RAW, at_most=True)
NO_WASTE = Goal(1.01, at_most=True, note=READ_RATIO)
FOREIGN_GOAL = Goal(None, over=TORCH, under=FOREIGN)
ONE_RANK_GOAL = Goal(None, over=ONE_RANK)
PACKAGE_GOAL = Goal(None, over=PACKAGE)
LITTLE_MEMORY = Goal(0.01, at_most=True, note=MEMORY)
FULL_GOAL = Goal(1.25, over=FULL, under=OFF, at_most=True)
AUTO_GOAL = Goal(1.25, over=AUTO, under=OFF, at_most=True)

NO_RAW = (OURS, TORCH, FOREIGN)
WITH_RAW = (*NO_RAW, RAW)
SAME = (*WITH_RAW, PACKAGE)
ALL = (*SAME, ONE_RANK)


def _loads(place: str) -> list[Case]:
    def case(name: str, goals: Sequence[Goal], methods: tuple[str, ...], **more: str) -> Case:
        peers = {FOREIGN: FOREIGN_GOAL, PACKAGE: PACKAGE_GOAL, ONE_RANK: ONE_RANK_GOAL}
        goals = (*goals, *(goal for method, goal in peers.items() if method in methods))
        return Case(f"load {name}", "load", goals, methods, place, **more)  # type: ignore[arg-type] # only names

    raw = Goal(None, over=OURS, under=RAW)
    across = 4.0 if place == DISK else 2.5
    whole = {"saved": UNSHARDED}
    small = {"saved": MIXED, "wanted": MIXED}
    return [
        case("same 4-16 MB", (_faster(2.5), NEAR_READ, NO_WASTE), ALL),
        case("same 64 MB", (_faster(4), NEAR_READ, NO_WASTE), SAME, state="large"),
        case("unsharded to Shard(0)", (_faster(15), raw, NO_WASTE), WITH_RAW, **whole),
        case("unsharded to Shard(1)", (_faster(6), NO_WASTE), NO_RAW, wanted=SHARD_1, **whole),
        case(
            "unsharded to Replicate",
            (_faster(5), raw, NO_WASTE),
            WITH_RAW,
            wanted=REPLICATE,
            **whole,
        ),
        case("Shard(0) to Shard(1)", (_faster(across), NO_WASTE), NO_RAW, wanted=SHARD_1),
        case("small 8 kB", (_faster(40), raw), ALL, state="tiny", **small),
        case("small 0.4-16 kB", (_faster(40), raw), ALL, state="assorted", **small),
    ]


def _cold() -> list[Case]:
    goals = (_faster(None), Goal(None, over=OURS, under=RAW))
    methods = (OURS, TORCH, RAW)
    return [
        Case("load cold, same 4-16 MB", "load", goals, methods, cold=True),
        Case(
            "load cold, unsharded to Shard(0)", "load", goals, methods, saved=UNSHARDED, cold=True
        ),
    ]


def _checks(place: str) -> list[Case]:
    methods, goals = (FULL, AUTO, OFF), (FULL_GOAL, AUTO_GOAL)
    return [
        Case("verify same", "verify", goals, methods, place),
        Case("verify Shard(0) to Shard(1)", "verify", goals, methods, place, wanted=SHARD_1),
        Case("verify small 8 kB", "verify", goals, methods, place, "tiny", MIXED, MIXED),
    ]


def _saves() -> list[Case]:
    raw = Goal(None, over=OURS, under=RAW)
    methods = (OURS, TORCH, RAW, ONE_RANK)
    small = (_faster(25), raw, ONE_RANK_GOAL)
    return [
        Case("save fsync", "save", (_faster(1.4), NEAR_WRITE, ONE_RANK_GOAL), methods),
        Case(
            "save",
            "save",
            (_faster(2), NEAR_WRITE, PACKAGE_GOAL, ONE_RANK_GOAL),
            (*methods, PACKAGE),
            sync=False,
        ),
        Case("save fsync, overwrite", "save", (_faster(None),), overwrite=True),
        Case("save, overwrite", "save", (_faster(None),), sync=False, overwrite=True),
        Case("save small 8 kB", "save", small, methods, state="tiny", saved=MIXED),
        Case("save small 0.4-16 kB", "save", small, methods, state="assorted", saved=MIXED),
    ]


def _async() -> list[Case]:
    methods = (OURS, OURS_IN_PROCESS, TORCH, RAW)
    goals = (
        _faster(None),
        Goal(None, under=OURS_IN_PROCESS),
        Goal(None, over=OURS, under=RAW, at_most=True),
    )
    return [
        Case("async_save, waiting", "async", goals, methods, sync=False),
        Case("async_save, waiting, small 8 kB", "async", goals, methods, state="tiny", saved=MIXED),
    ]


def _memory() -> list[Case]:
    goals = (LITTLE_MEMORY,)
    return [
        Case("memory, load same", "load memory", goals, state="large"),
        Case(
            "memory, load Shard(0) to Shard(1)", "load memory", goals, state="large", wanted=SHARD_1
        ),
        Case("memory, save", "save memory", goals, state="large"),
    ]


def _metadata() -> list[Case]:
    plans = [
        Case(f"plan {ranks:,} ranks", "plan", (_faster(100),), ranks=ranks)
        for ranks in (64, 256, 1_024)
    ]
    again = [
        Case(f"plan again, {ranks:,} ranks", "plan again", (_faster(100),), ranks=ranks)
        for ranks in (64, 256)
    ]
    return [
        *plans,
        *again,
        Case("open index", "index", (_faster(500), FOREIGN_GOAL), NO_RAW),
        Case("open index, all columns", "index", (_faster(None),)),
        Case("write index", "index", (_faster(20),)),
        Case("open index, 1 MB chunks", "index", (_faster(500), FOREIGN_GOAL), NO_RAW),
        Case("open index, 1 MB chunks, all columns", "index", (_faster(None),)),
        Case("write index, 1 MB chunks", "index", (_faster(20),)),
    ]


def cases() -> list[Case]:
    """Every case in running order; cases that read the same checkpoint are adjacent."""
    placed = [case for place in PLACES for case in (*_loads(place), *_checks(place))]
    return [*placed, *_cold(), *_saves(), *_async(), *_memory(), *_metadata()]
