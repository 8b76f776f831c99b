"""The cases that move data: loads, verified loads, saves, and how much memory they take.

Each function is the job of one rank of a world: it prepares the checkpoint of the case, runs every
method once untimed and compares the result bit by bit, and then times the methods in turn. An
answer is {"ms": {method: [ms, ...]}, "notes": {name: number}}.
"""

import cProfile
import io
import os
import pstats
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_peers as peers
import engine_states as states
from engine_cases import (
    AUTO,
    FOREIGN,
    FULL,
    MEMORY,
    OFF,
    ONE_RANK,
    OURS,
    PACKAGE,
    RAW,
    READ_RATIO,
    TORCH,
    Case,
)
from engine_ranks import World, alternate

from pytest_dcp._engine.io.mapped_windows import HUGE_PAGE_BYTES
from pytest_dcp._engine.io.read_copies import STAGING_BYTES, WINDOW_BYTES
from pytest_dcp._engine.io.write_files import WRITE_BYTES

Answer = dict[str, dict[str, Any]]
Step = Callable[[], object]

PROFILE_LINES = 45
VERIFY = {FULL: "full", AUTO: "auto", OFF: "off"}
FRESH_PEAK = "5"  # written to /proc/PID/clear_refs, resets VmHWM: man 5 proc


class Moves:
    """One rank's part in a case: its state, its folders, and how often each method runs."""

    def __init__(
        self, case: Case, world: World, folder: Path, rounds: int, quick: bool, profile: bool
    ) -> None:
        self.case = case
        self.world = world
        self.folder = folder
        self.rounds = rounds
        self.profile = profile
        self.shapes = states.shapes(case.state, quick=quick)
        missing = peers.absent()
        self.methods = [method for method in case.methods if method not in missing]
        self.manager = peers.package_manager() if PACKAGE in self.methods else None
        self.whole = (
            states.empty(self.shapes, states.UNSHARDED, None)
            if ONE_RANK in self.methods and world.rank == 0
            else {}
        )
        states.fill(self.whole)

    def measured(self, steps: dict[str, Step], after: Callable[[str], None]) -> Answer:
        """The answer of the methods' rounds, and our profile where it is asked for."""
        ms = alternate(self.world, steps, self.rounds, after)
        notes: dict[str, object] = {}
        if self.profile and OURS in steps:
            step_profile = profiled(steps[OURS])
            self.world.barrier()
            after(OURS)
            notes["profile"] = step_profile
        return {"ms": ms, "notes": notes}

    # Loads.

    def load(self) -> Answer:
        """Load in every way that the case names."""
        self.prepare()
        target = self.target()
        reports: list[Any] = []
        steps: dict[str, Step] = {
            OURS: lambda: reports.append(peers.load_ours(target, self.folder / "ours")),
            TORCH: lambda: peers.load_torch(target, self.folder / "torch"),
            FOREIGN: lambda: peers.load_ours(target, self.folder / "torch"),
            PACKAGE: lambda: peers.load_package(self.manager, target, self.folder / "package"),
            ONE_RANK: lambda: peers.load_whole(self.world, self.whole, self.folder),
        }
        if RAW in self.methods:
            reads = peers.raw_reads(target, self.folder / "ours")
            steps[RAW] = peers.raw_reader(reads, self.folder / "ours")
        steps = {name: steps[name] for name in self.methods}
        self.compare(steps, target)
        self.drop_files()
        answer = self.measured(steps, lambda _: self.drop_files())
        needed = self.world.total(reports[-1].bytes_needed)
        read = self.world.total(reports[-1].bytes_read)
        answer["notes"] |= {READ_RATIO: read / needed, "bytes needed": needed, "bytes read": read}
        verified = self.world.total(reports[-1].bytes_verified)
        answer["notes"]["bytes verified / read"] = verified / max(read, 1)
        return answer

    def drop_files(self) -> None:
        """The files are on the disk only, where the case reads them cold. Collective."""
        if not self.case.cold:
            return
        self.world.barrier()
        if self.world.rank == 0:
            for path in self.folder.rglob("*"):
                if path.is_file():
                    descriptor = os.open(path, os.O_RDONLY)
                    # Pages that have not been written back would stay.
                    os.fsync(descriptor)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(descriptor)
        self.world.barrier()

    def verify(self) -> Answer:
        """Load with each degree of verification."""
        self.prepare()
        target = self.target()
        ours = self.folder / "ours"

        def step(degree: str) -> Step:
            return lambda: peers.load_ours(target, ours, degree)

        steps = {name: step(VERIFY[name]) for name in self.methods}
        self.compare(steps, target)
        return self.measured(steps, lambda _: None)

    def target(self) -> states.State:
        """Memory of the wanted layout."""
        return states.empty(self.shapes, self.case.wanted, self.world.mesh)

    def prepare(self) -> None:
        """The checkpoints that the methods read, unless an earlier case left them. Collective."""
        alone = self.case.saved == states.UNSHARDED
        folder = self.folder
        savers: dict[str, Callable[[states.State], None]] = {
            "ours": lambda state: peers.save_ours(state, folder / "ours", sync=True, alone=alone),
        }
        if {TORCH, FOREIGN} & set(self.methods):
            savers["torch"] = lambda state: peers.save_torch(
                state, folder / "torch", sync=True, alone=alone
            )
        if self.manager is not None:
            savers["package"] = lambda state: peers.save_package(
                self.manager, state, folder / "package"
            )
        missing = [name for name in savers if not (folder / name).exists()]
        self.world.barrier()
        source = self.source(alone) if missing else {}
        for name in missing:
            if source:
                savers[name](source)
            self.world.barrier()
        if ONE_RANK in self.methods:
            peers.save_whole(self.world, self.whole, folder, sync=True)
        self.world.barrier()

    def source(self, alone: bool) -> states.State:
        """The state in the saved layout; if one rank saves alone, it is empty on the others."""
        if alone and self.world.rank:
            return {}
        mesh = None if alone else self.world.mesh
        state = states.empty(self.shapes, self.case.saved, mesh)
        states.fill(state)
        return state

    def compare(self, steps: dict[str, Step], target: states.State) -> None:
        """Run every method once; raises RuntimeError if it does not load the saved values."""
        for name, step in steps.items():
            filled = self.whole if name == ONE_RANK else target
            states.clear(filled)
            self.world.barrier()
            step()
            states.check(filled, f"{self.case.name}, {name}")
            self.world.barrier()

    # Saves.

    def save(self) -> Answer:
        """Save in every way that the case names, each to a folder of its own."""
        case, world = self.case, self.world
        state = self.source(alone=False)
        sync = case.sync
        ours, theirs, raw, one, package = (
            self.folder / name for name in ("ours", "torch", "raw", "one", "package")
        )
        metadata_bytes = [0]
        steps: dict[str, Step] = {
            OURS: lambda: peers.save_ours(state, ours, sync=sync),
            TORCH: lambda: peers.save_torch(state, theirs, sync=sync),
            RAW: lambda: peers.raw_write(world, state, raw, sync=sync, more=metadata_bytes[0]),
            ONE_RANK: lambda: peers.save_whole(world, self.whole, one, sync=sync),
            PACKAGE: lambda: peers.save_package(self.manager, state, package),
        }
        folders = {OURS: ours, TORCH: theirs, RAW: raw, ONE_RANK: one, PACKAGE: package}
        steps = {name: steps[name] for name in self.methods}
        target = self.target_of_save()
        for name, step in steps.items():
            world.barrier()
            step()
            world.barrier()
            if name == OURS:
                metadata_bytes[0] = (ours / ".metadata").stat().st_size
            if name in (OURS, TORCH):
                # The other engine reads it.
                load = peers.load_torch if name == OURS else peers.load_ours
                states.clear(target)
                load(target, folders[name])
                states.check(target, f"{case.name}, {name}")
            if not case.overwrite:
                self.remove(folders[name])

        def after(name: str) -> None:
            if not case.overwrite:
                self.remove(folders[name])

        answer = self.measured(steps, after)
        for folder in folders.values():
            self.remove(folder)
        return answer

    def target_of_save(self) -> states.State:
        """Memory to load the saved state into, for the comparison."""
        return states.empty(self.shapes, self.case.saved, self.world.mesh)

    def remove(self, folder: Path) -> None:
        """The folder is gone, also from the file system's journal. Collective."""
        self.world.barrier()
        if self.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        self.world.barrier()


def extra_memory(
    case: Case, world: World, folder: Path, method: str, quick: bool
) -> dict[str, float]:
    """How much more memory a rank holds at the peak of one save or load, the most of all ranks.

    The ranks are fresh: they have saved or loaded one small tensor, for the imports. The peak is
    VmHWM, reset just before through /proc/self/clear_refs, less VmRSS at that moment. Our figures
    exclude the staging that is allowed: a mapped window where the layout changes (pages of the
    cache that count as resident), or the buffer that a save gathers for a write.
    """
    moves = Moves(case, world, folder, rounds=1, quick=quick, profile=False)
    saves = case.kind == "save memory"
    if saves:
        state = moves.source(alone=False)
    else:
        moves.prepare()
        state = moves.target()
    small = states.empty([states.Shape("small", 8, 8)], case.saved, world.mesh)
    if method == OURS:
        save: Any = peers.save_ours
        load: Any = peers.load_ours
    else:
        save, load = peers.save_torch, peers.load_torch
    save(small, folder / f"warm {method}", sync=False)
    load(small, folder / f"warm {method}")
    world.barrier()
    name = "ours" if method == OURS else "torch"
    before = _begin_peak()
    if saves:
        save(state, folder / f"peak {method}", sync=False)
    else:
        load(state, folder / name)
    extra = max(_status_bytes("VmHWM") - before, 0)
    moves.remove(folder / f"peak {method}")
    changed = case.wanted != case.saved
    window = max(STAGING_BYTES, WINDOW_BYTES + 2 * HUGE_PAGE_BYTES)
    staging = WRITE_BYTES if saves else window if changed else 0
    local = states.local_bytes(state)
    most = world.most(extra)
    allowed = staging if method == OURS else 0
    return {
        "extra": most,
        "state": local,
        "staging": staging,
        "share": max(most - allowed, 0) / local,
    }


def _begin_peak() -> int:
    """The resident bytes now; VmHWM counts from here on."""
    Path("/proc/self/clear_refs").write_text(FRESH_PEAK)
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def profiled(step: Step) -> str:
    """Where the step spent its time on this rank: functions by cumulative, then by own time."""
    profile = cProfile.Profile()
    profile.runcall(step)
    text = io.StringIO()
    stats = pstats.Stats(profile, stream=text)
    stats.sort_stats("cumulative").print_stats(PROFILE_LINES)
    stats.sort_stats("tottime").print_stats(PROFILE_LINES)
    return text.getvalue()


def run(case: Case, world: World, folder: Path, rounds: int, quick: bool, profile: bool) -> Answer:
    """The answer of a rank of a load, verify or save case."""
    moves = Moves(case, world, folder, rounds, quick, profile)
    jobs = {"load": moves.load, "verify": moves.verify, "save": moves.save}
    return jobs[case.kind]()


def memory_notes(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """The notes of a memory case from what each method took. Pure (no I/O)."""
    notes = {MEMORY: found[OURS]["share"], "staging bytes": found[OURS]["staging"]}
    for method, figures in found.items():
        notes[f"{method}: extra bytes"] = figures["extra"]
        notes[f"{method}: bytes of a rank's state"] = figures["state"]
        notes[f"{method}: share"] = figures["share"]
    return notes
