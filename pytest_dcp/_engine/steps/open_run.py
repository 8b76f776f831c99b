"""A run as one process has it open: its steps, its lock, its running save, the other ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist

from pytest_dcp._engine.coordinate import OperationCall, team_of
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps.increments import Increments
from pytest_dcp._engine.steps.known_steps import KnownSteps
from pytest_dcp._engine.steps.preemption import StopRequest
from pytest_dcp._engine.steps.run_lock import RunLock
from pytest_dcp._engine.steps.running_save import RunningSave
from pytest_dcp._engine.verbs.torch_arguments import without_single_process_warning
from pytest_dcp.tracebacks import warn_caller

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunRanks:
    """The ranks that save and load a run together."""

    run: str
    """The folder or URL, for messages."""
    group: dist.ProcessGroup | None
    no_dist: bool

    @property
    def has_coordinator(self) -> bool:
        """Whether this rank is the coordinator, and looks at the folders."""
        return self.no_dist or dist.get_rank(self.group) == 0

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the verbs that name the ranks."""
        return {"process_group": self.group, "no_dist": self.no_dist}

    def without_warning(self) -> AbstractContextManager[None]:
        """No warning of a verb that this process is alone: the caller knows."""
        return without_single_process_warning() if self.no_dist else nullcontext()


class OpenRun:
    """One process's hold on a run.

    A child process begins anew: the connections, the lock and the running save are its parent's.
    """

    def __init__(
        self,
        steps: KnownSteps,
        ranks: RunRanks,
        stop: StopRequest | None = None,
        increments: Increments | None = None,
    ) -> None:
        """increments: None: every step is written in full."""
        self.increments = increments
        self.place = steps.place
        self.policy = steps.policy
        self.ranks = ranks
        self.stop = stop or StopRequest()
        self._lock = RunLock()
        self._has_warned = False
        """That the file system has no locks."""
        self._save: RunningSave | None = None
        self._given_up: RunningSave | None = None
        """A save that was not waited for to its end."""
        self._steps = steps
        self._process = os.getpid()

    def __str__(self) -> str:
        return self.ranks.run

    @property
    def steps(self) -> KnownSteps:
        """The steps, as this process has found them."""
        if self._process != os.getpid():
            self._process, self._lock, self._save = os.getpid(), RunLock(), None
            self._given_up = None
            self._steps = KnownSteps(self.place, self.policy, self._steps.check)
        return self._steps

    @property
    def running_save(self) -> RunningSave | None:
        """This process's save, until it has been waited for."""
        return self._save if self._process == os.getpid() else None

    @running_save.setter
    def running_save(self, save: RunningSave | None) -> None:
        self._save = save

    def ask_coordinator(
        self, step: str, decide: Callable[[], T], check: Callable[[], None] = lambda: None
    ) -> T:
        """The coordinator's decision, on every rank; its error, too, and its warnings there.

        check: each rank calls it first; its error is every rank's. Afterwards all ranks know
        whether any of them has been asked to stop.
        """
        ranks = self.ranks
        if ranks.no_dist:
            check()
            return decide()
        call = OperationCall(f"steps of {self}")
        team = team_of(ranks.group, call, use_dist=True, coordinator_rank=0)
        with team.wait_for_turn() as together:
            together.pickles = True

            def decide_here() -> tuple[float, T | None]:
                check()
                decision = decide() if together.is_coordinator else None
                return self.stop.seconds_left, decision

            def choose(rank_values: list[tuple[float, T | None]]) -> tuple[float, Any]:
                _, decision = rank_values[together.coordinator_rank]
                return min(left_s for left_s, _ in rank_values), decision

            left_s, decision = together.all_reduce(step, decide_here, choose)
        self.stop.agree(left_s)
        return cast("T", decision)

    def take_lock(self) -> None:
        """Keep other processes from saving in the folder, if it can. Raises as `RunLock.take`."""
        folders = self.steps.folders
        if self._lock.take(folders) or not isinstance(folders.root.disk, LocalDisk):
            return
        if not self._has_warned:
            self._has_warned = True
            warn_caller(
                f"the file system of {folders} has no locks: nothing keeps a second job from "
                "saving there, too"
            )

    def keep_lock_during(self, save: RunningSave) -> None:
        """Release the lock no sooner than this save, given up, has ended: it may yet write."""
        self._given_up = save

    def release_lock(self) -> None:
        """Let other processes save in the folder, if this one has kept them from it."""
        if self._process != os.getpid():
            return
        if self._given_up is None:
            self._lock.release()
        else:
            self._given_up.call_at_end(self._lock.release)

    def arguments_for(self, step: int, keywords: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `save` and `load` for this step, with the caller's own."""
        checkpoint_id = self.steps.folders.checkpoint_id(step)
        return self.place.arguments_for(checkpoint_id, keywords) | self.ranks.arguments

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock, the running save and the signals: they are this process's."""
        own = {"_lock": RunLock(), "_save": None, "_given_up": None, "stop": StopRequest()}
        return self.__dict__ | own
