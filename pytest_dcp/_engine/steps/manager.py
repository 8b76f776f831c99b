"""The checkpoints of a training run: save steps, find the newest whole one, remove old ones.

The coordinator, rank 0 of the group, looks at the folders, decides, and sends its decision to the
others, so all ranks take the same step even if their listings differ. The folders themselves are
all that remains of a run (see `step_folders`), so it goes on after any crash, with any number of
ranks.

The ranks' parts:

    save          coordinator: refuses a step that is not after the newest whole one, moves a folder
                  aside that is not whole, writes the notes; all ranks: one save; coordinator:
                  removes the steps that no rule keeps
    load_latest   coordinator: names the newest whole step; all ranks: load it, and if its bytes are
                  damaged (the same error on every rank) begin again without it

Removal never leaves the run without a whole step: only steps that were found whole are counted,
and the newest of these is kept by every policy (`retention`). A step that is not whole is never
removed: a save that takes its number moves it aside, where the file system can rename folders.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from pytest_dcp._engine.background.async_save import async_save
from pytest_dcp._engine.coordinate import OperationCall, team_of
from pytest_dcp._engine.plan.match_keys import LoadReport
from pytest_dcp._engine.steps.inspect_step import CheckLevel, ListLevel
from pytest_dcp._engine.steps.known_steps import KnownSteps, Step
from pytest_dcp._engine.steps.retention import BestSteps, Direction, RetentionPolicy, require_count
from pytest_dcp._engine.steps.run_lock import RunLock
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp._engine.steps.step_folders import LAST_STEP
from pytest_dcp._engine.verbs.load import load
from pytest_dcp._engine.verbs.save import save
from pytest_dcp._engine.verbs.torch_arguments import without_single_process_warning
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointError,
)
from pytest_dcp.tracebacks import drop_inner_frames, warn_caller

if TYPE_CHECKING:  # Self is in `typing` from Python 3.11 on
    from typing_extensions import Self

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadedStep:
    """The step that `load_latest` has loaded."""

    number: int
    metrics: Mapping[str, float]
    report: LoadReport


class CheckpointManager:
    """The checkpoints of one training run, a folder for each step.

    folder: a path or a URL; made by the first save.
    keep_last: how many of the newest whole steps to keep; None: all steps are kept.
    keep_every: steps whose number is divisible by it are kept for good.
    best: (metric, "min" or "max", how many): the steps with its best values are kept, too.
    check: the test that a whole step passes: "sizes": its index is undamaged and its files are
        there and long enough; "checksums": every byte is read once. A load checks what it reads
        either way.
    process_group: whose ranks save and load together; None: the default group. no_dist: this
        process alone.

    Every method that saves, loads or removes is collective: all ranks call it, in the same order.

    >>> import torch
    >>> from pytest_dcp.checkpoint import CheckpointManager
    >>> manager = CheckpointManager("run", keep_last=2, no_dist=True)
    >>> for step in (10, 20, 30):
    ...     manager.save(step, {"w": torch.full((2,), float(step))}, metrics={"loss": 1 / step})
    >>> [step.number for step in manager.steps()]
    [20, 30]
    >>> state = {"w": torch.zeros(2)}
    >>> manager.load_latest(state).number, state["w"]
    (30, tensor([30., 30.]))
    >>> manager.close()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        best: tuple[str, Direction, int] | None = None,
        check: CheckLevel = "sizes",
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if check not in ("sizes", "checksums"):
            raise ValueError(f"check= takes 'sizes' or 'checksums', got {check!r}")
        if keep_last is None and (keep_every is not None or best is not None):
            raise ValueError("keep_every= and best= need keep_last=: without it all steps are kept")
        self.policy = RetentionPolicy(
            keep_last, keep_every, None if best is None else BestSteps(*best)
        )
        place = RunPlace(folder, dict(storage_options or {}))
        self._opened_steps = KnownSteps(place, self.policy, check)
        self._run = str(self._opened_steps.folders)
        self._process = os.getpid()
        self._group = process_group
        self._no_dist = no_dist or not (dist.is_available() and dist.is_initialized())
        self._warned: set[tuple[int, str]] = set()
        self._running: dict[int, Future[Any]] = {}
        self._lock = RunLock()

    # Saving.

    @drop_inner_frames
    def save(
        self,
        step: int,
        state_dict: dict[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        **keywords: Any,
    ) -> None:
        """Save a step, then remove the steps that no rule keeps. Collective.

        keywords: of `pytest_dcp.checkpoint.save`.

        Raises CheckpointExistsError, on every rank, unless `step` is after the newest whole step,
        CheckpointError if another process saves in the folder, and the errors of `save`; then
        the earlier steps are as they were.
        """
        self.wait()
        self._begin(step, metrics)
        with self._knowing_it_is_alone():
            save(state_dict, **self._target(step, keywords), **self._together())
        self._end(step)
        self._remove_old()

    @drop_inner_frames
    def async_save(
        self,
        step: int,
        state_dict: dict[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        **keywords: Any,
    ) -> Future[Metadata] | AsyncSaveResponse:
        """Save a step in the background; the result is that of `pytest_dcp.checkpoint.async_save`.

        One save runs at a time: it waits for the one before, whose failure it raises. Old steps are
        removed by the next call of `save`, `async_save` or `wait`.
        """
        self.wait()
        self._begin(step, metrics)
        with self._knowing_it_is_alone():
            running = async_save(state_dict, **self._target(step, keywords), **self._together())
        if isinstance(running, AsyncSaveResponse):
            self._running[step] = running.upload_completion
        else:
            self._running[step] = running
        return running

    @drop_inner_frames
    def wait(self) -> None:
        """Return when no save runs any more; raises the error of one that failed. Collective."""
        while self._running_saves():
            step, future = self._running.popitem()
            future.result()
            self._end(step)
            self._remove_old()

    # Loading.

    @drop_inner_frames
    def latest(self) -> Step | None:
        """The newest whole step; None without one. Collective.

        Rank 0 warns of each step after it that is not whole, once.
        """
        return self._choose_latest()

    @drop_inner_frames
    def load_latest(self, state_dict: dict[str, Any], **keywords: Any) -> LoadedStep | None:
        """Load the newest whole step; None if there is no step at all. Collective.

        A step that turns out to be damaged is passed over, and the one before is loaded; rank 0
        warns, once for each step, and says what is wrong with it. A step that another process
        removes meanwhile is passed over without a word.

        keywords: of `pytest_dcp.checkpoint.load`.

        Raises CheckpointCorruptError if there are steps and none is whole: a run that began anew
        would overwrite them. A state that does not fit raises the errors of `load`.
        """
        self.wait()
        while True:
            step = self._choose_latest()
            if step is None:
                self._require_none_lost()
                return None
            try:
                with self._knowing_it_is_alone():
                    source = self._source(step.number, keywords)
                    report = load(state_dict, **source, **self._together())
            except (OSError, CheckpointError) as error:
                if self._has_index(step.number):
                    if not isinstance(error, CheckpointCorruptError):
                        raise
                    # The next look passes it over, and warns.
                    self._steps.note_damage(step.number, str(error))
                continue
            return LoadedStep(step.number, step.metrics, report)

    @drop_inner_frames
    def steps(self, *, check: ListLevel | None = None) -> list[Step]:
        """All steps, whole or not, ascending. Collective.

        check: for this call; None: the manager's; "names": a step that has an index passes, and
            none is opened, which is for runs of thousands of steps.
        """
        if check not in (None, *get_args(ListLevel)):
            raise ValueError(f"check= takes 'names', 'sizes' or 'checksums', got {check!r}")
        return self._ask("list the steps", lambda: self._steps.list_steps(check))

    @drop_inner_frames
    def remove_after(self, step: int) -> list[int]:
        """Remove the steps after this one, to go on from it; returns their numbers. Collective.

        Raises ValueError if this step is not whole.
        """
        require_count("step", step, least=0)
        self.wait()

        def remove() -> list[int]:
            steps = self._steps
            found = steps.look_at(step, None)
            if not found.is_whole:
                raise ValueError(f"step {step} in {self._run} is not whole: {found.problem}")
            later = [number for number in steps.folders.numbers() if number > step]
            self._lock.take(steps.folders)
            for number in reversed(later):
                steps.remove(number)
            return later

        removed = self._ask("remove later steps", remove)
        for number in removed:
            self._steps.forget(number)
        return removed

    def close(self) -> None:
        """Wait for a running save, and let other processes save in the folder. Collective."""
        try:
            self.wait()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """All but the lock and the running saves: they are this process's."""
        return self.__dict__ | {"_lock": RunLock(), "_running": {}}

    # One rank's part.

    @property
    def _steps(self) -> KnownSteps:
        """What this process knows of the steps.

        A child process begins anew: the connections, the lock and the running saves are its
        parent's.
        """
        if self._process != os.getpid():
            self._process, self._lock, self._running = os.getpid(), RunLock(), {}
            self._opened_steps = KnownSteps(
                self._opened_steps.place, self.policy, self._opened_steps.check
            )
        return self._opened_steps

    def _running_saves(self) -> dict[int, Future[Any]]:
        return self._running if self._process == os.getpid() else {}

    def _begin(self, step: int, metrics: Mapping[str, float] | None) -> None:
        numbers = _checked_metrics(metrics)
        require_count("step", step, least=0)
        if step > LAST_STEP:
            raise ValueError(f"step takes a number up to {LAST_STEP}, got {step}")

        def begin() -> None:
            steps = self._steps
            self._lock.take(steps.folders)
            steps.require_after_newest(step)
            steps.move_aside(step)
            steps.folders.note_start(step, numbers)

        self._ask(f"begin step {step}", begin)
        self._steps.forget(step)

    def _end(self, step: int) -> None:
        if self._is_coordinator():
            try:
                self._steps.folders.note_end(step)
            except OSError as error:
                warn_caller(f"step {step} is saved, but {self._run} is not noted so: {error}")

    def _remove_old(self) -> None:
        """The coordinator's alone: a failure is a warning, since the step is saved."""
        if self.policy.keep_last is None or not self._is_coordinator():
            return
        try:
            self._steps.remove_old(self.policy.keep_last)
        except (OSError, CheckpointError) as error:
            warn_caller(f"old steps in {self._run} were not removed: {error}")

    def _has_index(self, number: int) -> bool:
        """Whether the step is still there, as the coordinator sees it."""
        return self._ask("look again", lambda: self._steps.has_index(number))

    def _choose_latest(self) -> Step | None:
        """The newest whole step, as the coordinator sees it."""
        step, problems = self._ask("look for the newest step", self._steps.find_latest)
        if self._is_coordinator():
            for number, problem in problems.items():
                self._warn_of_damage(number, problem)
        return step

    def _require_none_lost(self) -> None:
        if lost := self.steps():
            problems = "; ".join(f"step {step.number}: {step.problem}" for step in lost)
            raise CheckpointCorruptError(
                f"{self._run} has steps, and none of them is whole ({problems}); to begin "
                "anew, move the folder away"
            )

    def _warn_of_damage(self, number: int, problem: str) -> None:
        if (number, problem) in self._warned:
            return
        self._warned.add((number, problem))
        warn_caller(f"step {number} in {self._run} is not whole and is passed over: {problem}")

    # The ranks together.

    def _ask(self, step: str, decide: Callable[[], T]) -> T:
        """The coordinator's decision, on every rank; its error, too, and its warnings there."""
        if self._no_dist:
            return decide()
        call = OperationCall(f"steps of {self._run}")
        team = team_of(self._group, call, use_dist=True, coordinator_rank=0)
        with team.wait_for_turn() as together:
            together.pickles = True
            return together.broadcast(step, decide)

    def _knowing_it_is_alone(self) -> AbstractContextManager[None]:
        return without_single_process_warning() if self._no_dist else nullcontext()

    def _is_coordinator(self) -> bool:
        return self._no_dist or dist.get_rank(self._group) == 0

    def _together(self) -> dict[str, Any]:
        return {"process_group": self._group, "no_dist": self._no_dist}

    def _target(self, step: int, keywords: Mapping[str, Any]) -> dict[str, Any]:
        steps = self._steps
        return steps.place.for_saving(steps.folders.checkpoint_id(step)) | dict(keywords)

    def _source(self, step: int, keywords: Mapping[str, Any]) -> dict[str, Any]:
        steps = self._steps
        return steps.place.for_loading(steps.folders.checkpoint_id(step)) | dict(keywords)


def _checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    numbers = {}
    for name, value in (metrics or {}).items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"metrics= takes numbers, got {name}={value!r}") from None
        if math.isnan(numbers[str(name)]):
            warn_caller(f"metric {name!r} is NaN: no best step is chosen by it")
    return numbers
