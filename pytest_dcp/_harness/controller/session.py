"""State shared by all worlds of one pytest session: the launcher, the leases, the warm worlds.

Lives in the controller only. Enters: the collected session. Leaves: started worlds. `close` ends
everything that was started, in any state.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
import warnings
import zlib
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pytest_dcp._harness.controller.lease_errors import GpusUnavailable, LeaseRequest, LeaseTimeout
from pytest_dcp._harness.controller.leases import (
    Lease,
    LeasePool,
    default_max_processes,
    visible_gpus,
)
from pytest_dcp._harness.controller.options import Options, cpu_count
from pytest_dcp._harness.controller.report import exception_of_end
from pytest_dcp._harness.controller.warm_worlds import WarmWorlds
from pytest_dcp._harness.protocol.launcher import Launcher, LauncherLostError
from pytest_dcp._harness.protocol.world_spec import WorldSpec
from pytest_dcp._harness.rank import coverage
from pytest_dcp._harness.rank.this_rank import current
from pytest_dcp._harness.world.outcome import Outcome, SessionEnd
from pytest_dcp._harness.world.terminal import Terminal
from pytest_dcp._harness.world.world import World
from pytest_dcp._harness.world.world_settings import WorldSettings
from pytest_dcp._pytest_internals import tmp_path_factory_of
from pytest_dcp.errors import WorldError

LEASE_S = 600.0
"""How long a world may wait for others on the machine to end."""
HARMLESS_THREADS = frozenset({"execnet", "pytest_rerunfailures"})
"""Packages of pytest's world whose threads only wait on sockets of their own, which ranks let go
of."""
HARNESS_KEY = pytest.StashKey["Harness"]()
W = TypeVar("W", bound=World)


class Harness:
    """The controller's state. One per session."""

    def __init__(self, session: pytest.Session, options: Options) -> None:
        self.session = session
        self.config = session.config
        self.options = options
        self.notes: list[str] = []
        """Lines for the user, said once."""
        self.warm = WarmWorlds()
        self.folders_made = 0
        self._launcher: Launcher | None = None
        self._pool: LeasePool | None = None
        self._open: dict[int, World] = {}
        self._ending: BaseException | None = None
        factory = tmp_path_factory_of(self.config)
        if factory is None:
            raise pytest.UsageError("worlds need pytest's tmpdir plugin: drop `-p no:tmpdir`")
        # Made here, before any rank: ranks that made it would race for its number.
        self.basetemp: Path = factory.getbasetemp()
        self.folder = self.basetemp / "dcp"
        self.folder.mkdir(exist_ok=True, mode=0o700)
        self.settings = WorldSettings(
            session=uuid.uuid4().hex,
            folder=self.folder,
            grace_s=options.grace_s,
            output_limit_bytes=options.output_limit_bytes,
            terminal=self._terminal(),
            launcher=self.launcher,
            root=str(self.config.rootpath),
        )

    def _terminal(self) -> Terminal:
        if hasattr(self.config, "workerinput"):
            missing = "pytest-xdist's workers have no terminal for a debugger; run with -n0"
            return Terminal(missing=missing)
        return Terminal(group=os.getpgrp(), rank=self.options.pdb_rank)

    # The session's end.

    def end_after_item(self, end: SessionEnd, where: str) -> None:
        """End the session after the running item's report, as a rank asked; another rank failed."""
        self._ending = self._ending or exception_of_end(end, where, failed=True)

    @property
    def is_ending(self) -> bool:
        """Whether `check_end` will raise."""
        return self._ending is not None

    def check_end(self) -> None:
        """Raise the exception that ends the session, if a rank has requested it."""
        ending, self._ending = self._ending, None
        if ending is not None:
            raise ending

    # Worlds.

    def launcher(self) -> Launcher:
        """The launcher of ranks; started on first use."""
        if self._launcher is not None and self._launcher.lost:
            self._replace_lost(self._launcher)
        if self._launcher is None:
            reason = self._unsafe_to_fork()
            if self.options.launch == "fork" and reason:
                raise pytest.UsageError(f"--dcp-launch=fork, but forking is unsafe here: {reason}")
            if self.options.launch == "spawn" or reason:
                from pytest_dcp._harness.launchers.spawn import SpawnLauncher

                if reason:
                    self.notes.append(f"pytest_dcp: ranks are spawned, not forked: {reason}")
                self._launcher = SpawnLauncher.start(self.session, self.folder)
            else:
                from pytest_dcp._harness.launchers.fork import start_zygote

                self._launcher = start_zygote(self.session, self.folder)
        return self._launcher

    def prepare_launcher(self) -> None:
        """Wait until ranks can be started, before a test's own time begins.

        A launcher that is lost is `open`'s to replace: only inside the test are warnings recorded.
        """
        if self._launcher is not None:
            with contextlib.suppress(LauncherLostError):
                self._launcher.await_ready()

    def _replace_lost(self, lost: Launcher) -> None:
        """Go on with fresh interpreters: this process has run tests and must not be forked now."""
        from pytest_dcp._harness.launchers.spawn import SpawnLauncher

        lost.close()
        self._launcher = SpawnLauncher.start(self.session, self.folder)
        warnings.warn(
            pytest.PytestWarning(f"{lost.lost}; ranks are spawned from here on"), stacklevel=2
        )

    def _unsafe_to_fork(self) -> str:
        cuda: Any = sys.modules.get("torch.cuda")
        if cuda is not None and cuda.is_initialized():
            return "CUDA was initialised at collection"
        extra = [thread for thread in threading.enumerate() if not _may_be_forked(thread)]
        if extra:
            names = ", ".join(repr(thread.name) for thread in extra)
            return f"threads were started at collection ({names})"
        return ""

    def open(self, spec: WorldSpec, seed: int) -> tuple[World, Outcome]:
        """A started world and how its boot went. Skips or fails where GPUs are missing."""
        return self.open_as(World, spec, seed)

    def open_as(self, kind: type[W], spec: WorldSpec, seed: int) -> tuple[W, Outcome]:
        """`open` for a class of worlds."""
        self.launcher().await_ready()
        lease = self._lease(spec)
        world: W | None = None

        def end() -> None:
            if lease is not None:
                lease.release()
            if world is not None:
                self._open.pop(world.number, None)

        try:
            gpus = lease.gpus if lease is not None else ()
            world = kind(spec, self.settings, seed=seed, gpus=gpus, on_end=end)
            self._open[world.number] = world
            return world, self._start(world)
        except BaseException:
            if world is not None:
                world.kill()
            end()
            raise

    def _start(self, world: World) -> Outcome:
        """Start a world; tell of it when it is ready."""
        started = time.monotonic()
        booted = world.start()
        if booted.kind == "passed":
            ready_s = time.monotonic() - started
            self.config.hook.pytest_dcp_world_started(size=world.spec.size, ready_s=ready_s)
        return booted

    def _lease(self, spec: WorldSpec) -> Lease | None:
        """Lease the resources that the world needs; None for a second world that runs without a
        lease.

        A test that opens a world inside another must not wait while it holds slots itself: two such
        tests would wait for each other. Only GPUs are worth that, and the wait is bounded.
        """
        gpus = 0
        if spec.device == "cuda":
            # NCCL refuses two ranks on one device; gloo ranks may share a card.
            gpus = spec.size if spec.backend == "nccl" else 1
        wait_s = 0.0 if self._open and not gpus else LEASE_S
        try:
            request = LeaseRequest(processes=spec.size, gpus=gpus)
            return self._leases(needs_gpus=gpus > 0).acquire(request, wait_s)
        except LeaseTimeout:
            if wait_s:
                raise
            return None
        except GpusUnavailable as exc:
            if self.options.require_gpus:
                raise pytest.fail.Exception(f"--dcp-require-gpus: {exc}", pytrace=False) from None
            raise pytest.skip.Exception(str(exc), _use_item_location=True) from None

    def _leases(self, *, needs_gpus: bool) -> LeasePool:
        if self._pool is None or needs_gpus:
            budget = self.options.max_procs or default_max_processes(cpu_count())
            gpus = visible_gpus(os.environ, _gpu_count()) if needs_gpus else ()
            self._pool = LeasePool(max_processes=budget, visible_gpus=gpus)
        return self._pool

    def seed_of(self, name: str) -> int:
        """The seed of a test: the option's, or one derived from its name."""
        if self.options.seed is not None:
            return self.options.seed
        return zlib.crc32(name.encode())

    def close(self, *, hurried: bool = False) -> None:
        """End every world and the launcher; `hurried` when the session was interrupted."""
        try:
            self.warm.end_all(hurried=hurried)
        finally:
            for world in list(self._open.values()):
                world.kill()
            if self._launcher is not None:
                self._launcher.close()
                self._launcher = None
            coverage.gather(self.folder)


def harness_of(config: pytest.Config) -> Harness:
    """The session's harness. Raises where there is none: inside a rank, or when none was begun."""
    if current() is not None:
        raise WorldError("worlds are started by the controller, not inside a rank")
    harness = config.stash.get(HARNESS_KEY, None)
    if harness is None:
        raise WorldError(
            "no test of this session was seen to need worlds when it began: name the fixture "
            "`worlds` in the arguments of a test or a fixture, not only in getfixturevalue()"
        )
    return harness


def _may_be_forked(thread: threading.Thread) -> bool:
    """Whether a thread is known to hold nothing that a forked child would need."""
    target: Any = getattr(thread, "_target", None)
    modules = (type(thread).__module__, str(getattr(target, "__module__", "")))
    return thread is threading.main_thread() or any(
        module.partition(".")[0] in HARMLESS_THREADS for module in modules
    )


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()
