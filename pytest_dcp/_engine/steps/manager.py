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
import secrets
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePath
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import filelock
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from pytest_dcp._engine.background.async_save import async_save
from pytest_dcp._engine.coordinate import OperationCall, team_of
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.plan.match_keys import LoadReport
from pytest_dcp._engine.steps.inspect_step import CheckLevel, find_problem
from pytest_dcp._engine.steps.retention import BestSteps, Direction, RetentionPolicy, require_count
from pytest_dcp._engine.steps.step_folders import StepFolders, step_name
from pytest_dcp._engine.storages.local_filesystem import disk_of
from pytest_dcp._engine.verbs.load import load
from pytest_dcp._engine.verbs.save import save
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError, CheckpointExistsError
from pytest_dcp.tracebacks import drop_inner_frames, warn_caller

if TYPE_CHECKING:  # Self is in `typing` from Python 3.11 on
    from typing_extensions import Self

T = TypeVar("T")
LOCK = ".steps.lock"
ASIDE = "not-whole"


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run, as it was found."""

    number: int
    metrics: Mapping[str, float]
    saved_at: datetime | None
    """When its save began, by the coordinator's clock."""
    problem: str | None
    """Why it is not whole; None if it is."""
    is_verified: bool
    """Whether this process has checked every byte of it."""

    @property
    def is_whole(self) -> bool:
        """Whether it can be loaded, as far as it was checked."""
        return self.problem is None


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
        self._folders = _folders_of(folder, dict(storage_options or {}))
        self._check: CheckLevel = check
        self._group = process_group
        self._no_dist = no_dist or not (dist.is_available() and dist.is_initialized())
        self._damaged: dict[int, str] = {}
        """Steps in which a load of this process found damage."""
        self._verified: set[int] = set()
        self._warned: set[tuple[int, str]] = set()
        self._running: dict[int, Future[Any]] = {}
        self._lock: filelock.BaseFileLock | None = None

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
            save(state_dict, **self._place_of(step), **self._together(), **keywords)
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
            running = async_save(state_dict, **self._place_of(step), **self._together(), **keywords)
        if isinstance(running, AsyncSaveResponse):
            self._running[step] = running.upload_completion
        else:
            self._running[step] = running
        return running

    @drop_inner_frames
    def wait(self) -> None:
        """Return when no save runs any more; raises the error of one that failed. Collective."""
        while self._running:
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
        warns, once for each step, and says what is wrong with it.

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
                    report = load(
                        state_dict, **self._place_of(step.number), **self._together(), **keywords
                    )
            except CheckpointCorruptError as error:
                self._damaged[step.number] = str(error)
                continue  # and warn of it there
            return LoadedStep(step.number, step.metrics, report)

    @drop_inner_frames
    def steps(self, *, check: CheckLevel | None = None) -> list[Step]:
        """All steps, whole or not, ascending. Collective.

        check: for this call; None: the manager's.
        """
        return self._ask(
            "list the steps",
            lambda: [self._look_at(step, check) for step in self._folders.numbers()],
        )

    @drop_inner_frames
    def remove_after(self, step: int) -> list[int]:
        """Remove the steps after this one, to go on from it; returns their numbers. Collective.

        Raises ValueError if this step is not whole.
        """
        require_count("step", step, least=0)
        self.wait()

        def remove() -> list[int]:
            found = self._look_at(step, None)
            if not found.is_whole:
                raise ValueError(f"step {step} in {self._folders} is not whole: {found.problem}")
            later = [number for number in self._folders.numbers() if number > step]
            self._take_lock()
            for number in reversed(later):
                self._folders.remove(number)
            return later

        removed = self._ask("remove later steps", remove)
        for number in removed:
            self._damaged.pop(number, None)
        return removed

    def close(self) -> None:
        """Wait for a running save, and let other processes save in the folder. Collective."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    # One rank's part.

    def _begin(self, step: int, metrics: Mapping[str, float] | None) -> None:
        numbers = _checked_metrics(metrics)
        require_count("step", step, least=0)

        def begin() -> None:
            self._take_lock()
            self._require_after_newest(step)
            self._move_aside(step)
            self._folders.note_start(step, numbers)

        self._ask(f"begin step {step}", begin)
        self._damaged.pop(step, None)

    def _end(self, step: int) -> None:
        if self._is_coordinator():
            try:
                self._folders.note_end(step)
            except OSError as error:
                warn_caller(f"step {step} is saved, but {self._folders} is not noted so: {error}")

    def _remove_old(self) -> None:
        """The coordinator's alone: a failure is a warning, since the step is saved."""
        if self.policy.keep_last is None or not self._is_coordinator():
            return
        try:
            numbers = self._folders.numbers()
            for step in numbers:
                if self._folders.is_half_removed(step):
                    self._folders.remove(step)
            found = [self._look_at(step, None) for step in numbers]
            whole = {step.number: step.metrics for step in found if step.is_whole}
            for number in self.policy.steps_to_remove(whole):
                self._folders.remove(number)
        except (OSError, CheckpointError) as error:
            warn_caller(f"old steps in {self._folders} were not removed: {error}")

    def _choose_latest(self) -> Step | None:
        """The newest whole step, as the coordinator sees it."""
        step, problems = self._ask("look for the newest step", self._find_latest)
        if self._is_coordinator():
            for number, problem in problems.items():
                self._warn_of_damage(number, problem)
        return step

    def _find_latest(self) -> tuple[Step | None, dict[int, str]]:
        """The newest whole step, and why later ones are not."""
        problems: dict[int, str] = {}
        for number in reversed(self._folders.numbers()):
            step = self._look_at(number, None)
            if step.problem is None:
                return step, problems
            if not self._folders.is_half_removed(number):
                problems[number] = step.problem
        return None, problems

    def _look_at(self, number: int, check: CheckLevel | None) -> Step:
        level = check or self._check
        problem = self._damaged.get(number)
        if problem is None and self._folders.is_half_removed(number):
            problem = "its removal has not ended"
        if problem is None and not (number in self._verified and level == "checksums"):
            where = self._folders.checkpoint_id(number)
            problem = find_problem(self._folders.folder(number), where, level)
            if problem is None and level == "checksums":
                self._verified.add(number)
        notes = self._folders.notes(number)
        verified = problem is None and number in self._verified
        return Step(number, notes.metrics, notes.saved_at, problem, verified)

    def _require_after_newest(self, step: int) -> None:
        for number in reversed(self._folders.numbers()):
            if number < step:
                return
            if self._look_at(number, None).is_whole:
                again = "again" if number == step else f"after step {number}"
                raise CheckpointExistsError(
                    f"step {step} cannot be saved {again}: step {number} in {self._folders} is "
                    f"whole; remove_after({min(step, number) - 1}) or of an earlier step removes it"
                )

    def _require_none_lost(self) -> None:
        if lost := self.steps():
            problems = "; ".join(f"step {step.number}: {step.problem}" for step in lost)
            raise CheckpointCorruptError(
                f"{self._folders} has steps, and none of them is whole ({problems}); to begin "
                "anew, move the folder away"
            )

    def _move_aside(self, step: int) -> None:
        """A folder of that number that is not whole: it is kept under another name."""
        folder = self._folders.folder(step)
        if not folder.names() or not isinstance(folder.disk, LocalDisk):
            return
        if self._folders.is_half_removed(step):
            self._folders.remove(step)
            return
        aside = Path(self._folders.root.path) / ASIDE
        aside.mkdir(exist_ok=True)
        Path(folder.path).rename(aside / f"{step_name(step)}-{secrets.token_hex(4)}")
        self._folders.root.sync()

    def _warn_of_damage(self, number: int, problem: str) -> None:
        if (number, problem) in self._warned:
            return
        self._warned.add((number, problem))
        warn_caller(f"step {number} in {self._folders} is not whole and is passed over: {problem}")

    def _take_lock(self) -> None:
        """Keep other processes from saving in the folder, if it is local."""
        root = self._folders.root
        if self._lock is not None or not isinstance(root.disk, LocalDisk):
            return
        root.make()
        path = Path(root.path) / LOCK
        lock = filelock.FileLock(path, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            holder = ""
            with suppress(OSError):
                holder = path.read_text().strip()
            raise CheckpointError(
                f"another run saves in {self._folders}"
                f"{f' ({holder})' if holder else ''}: one run at a time can"
            ) from error
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock = lock

    # The ranks together.

    def _ask(self, step: str, decide: Callable[[], T]) -> T:
        """The coordinator's decision, on every rank; its error, too, and its warnings there."""
        if self._no_dist:
            return decide()
        call = OperationCall(f"steps of {self._folders}")
        team = team_of(self._group, call, use_dist=True, coordinator_rank=0)
        with team.wait_for_turn() as together:
            together.pickles = True
            return together.broadcast(step, decide)

    @contextmanager
    def _knowing_it_is_alone(self) -> Iterator[None]:
        """Without the verbs' warning that torch.distributed is not initialized."""
        if not self._no_dist:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield

    def _is_coordinator(self) -> bool:
        return self._no_dist or dist.get_rank(self._group) == 0

    def _together(self) -> dict[str, Any]:
        return {"process_group": self._group, "no_dist": self._no_dist}

    def _place_of(self, step: int) -> dict[str, Any]:
        return {"checkpoint_id": self._folders.checkpoint_id(step)}


def _folders_of(folder: str | os.PathLike[str], options: dict[str, Any]) -> StepFolders:
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise TypeError(f"the folder of a run is a path or a URL, got {folder!r}")
    if isinstance(folder, PurePath) or "://" not in os.fspath(folder):
        path = Path(os.path.abspath(folder))
        return StepFolders(Folder(LocalDisk(), path), path)
    from pytest_dcp._engine.storages.fsspec import FileSystem, open_filesystem

    fs, path_or_url = open_filesystem(folder, options)
    if not isinstance(fs, FileSystem):
        path = Path(os.fspath(path_or_url))
        return StepFolders(Folder(LocalDisk(), path), path)
    own_path = fs.path_of[os.fspath(folder)]
    return StepFolders(Folder(disk_of(fs), own_path), os.fspath(folder))


def _checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    numbers = {}
    for name, value in (metrics or {}).items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"metrics= takes numbers, got {name}={value!r}") from None
        if math.isnan(numbers[str(name)]):
            warnings.warn(f"metric {name!r} is NaN: no best step is chosen by it", stacklevel=4)
    return numbers
