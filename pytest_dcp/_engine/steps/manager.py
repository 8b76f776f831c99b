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

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from pytest_dcp._engine.steps.export_step import ExportReport, export_step
from pytest_dcp._engine.steps.increments import Increments
from pytest_dcp._engine.steps.inspect_step import CheckLevel, ListLevel
from pytest_dcp._engine.steps.known_steps import KnownSteps, Step
from pytest_dcp._engine.steps.load_step import LoadedStep, choose_latest, load_latest_step
from pytest_dcp._engine.steps.measure_steps import StepBytes, measure_steps
from pytest_dcp._engine.steps.open_run import OpenRun, RunRanks
from pytest_dcp._engine.steps.preemption import StopRequest
from pytest_dcp._engine.steps.remove_steps import remove_later_steps
from pytest_dcp._engine.steps.retention import BestSteps, Direction, RetentionPolicy, require_count
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp._engine.steps.running_save import SaveStatus
from pytest_dcp._engine.steps.save_step import save_step, start_save, wait_for_save
from pytest_dcp.tracebacks import drop_inner_frames

if TYPE_CHECKING:  # Self is in `typing` from Python 3.11 on
    from typing_extensions import Self


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
    on_signal: a signal, or several, by which a scheduler asks the run to stop; then `should_stop`
        returns True. None: signals are left alone. Needs the main thread; the handler calls the
        one that was there before, and `close` puts it back.
    grace_s: seconds from the signal until the process may be killed: a save that has not ended by
        then is given up.
    storage_options: for the file system of a URL, such as {"endpoint_url": ...}.
    incremental: a step shares the data files of the newest whole one, where its data is as before:
        unchanged data is neither written nor kept twice. In a local folder, by hard links,
        each step's folder stays a checkpoint of its own; in an object store `export` makes one.
    full_every: at least each save of this number is written in full, which bounds the cost of one
        damaged file; None: only where nothing is as before.

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
        on_signal: int | Sequence[int] | None = None,
        grace_s: float = 20.0,
        storage_options: Mapping[str, Any] | None = None,
        incremental: bool = False,
        full_every: int | None = None,
    ) -> None:
        if full_every is not None and not incremental:
            raise ValueError("full_every= needs incremental=True: otherwise every step is full")
        if check not in ("sizes", "checksums"):
            raise ValueError(f"check= takes 'sizes' or 'checksums', got {check!r}")
        if keep_last is None and (keep_every is not None or best is not None):
            raise ValueError("keep_every= and best= need keep_last=: without it all steps are kept")
        self.policy = RetentionPolicy(
            keep_last, keep_every, None if best is None else BestSteps(*best)
        )
        place = RunPlace(folder, dict(storage_options or {}))
        alone = no_dist or not (dist.is_available() and dist.is_initialized())
        increments = Increments(full_every) if incremental else None
        steps = KnownSteps(place, self.policy, check)
        ranks = RunRanks(str(steps.folders), process_group, alone)
        self._run = OpenRun(steps, ranks, StopRequest(on_signal, grace_s), increments)

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
        save_step(self._run, step, state_dict, metrics, keywords)

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
        return start_save(self._run, step, state_dict, metrics, keywords)

    @drop_inner_frames
    def wait(self) -> None:
        """Return when no save runs any more; raises the error of one that failed. Collective."""
        wait_for_save(self._run)

    @property
    def running_save(self) -> SaveStatus | None:
        """The save of this rank that runs, or has ended since the last call; None without one.

        Local: it asks no other rank, and any thread may read it. A save that has failed is raised
        by the next call of `save`, `async_save`, `wait`, `load_latest`, `remove_after` or `close`.
        """
        saving = self._run.running_save
        return None if saving is None else saving.status()

    # Stopping.

    @drop_inner_frames
    def should_stop(self) -> bool:
        """Whether any rank has received a signal of `on_signal`. Collective.

        All ranks get the same answer in the same call, wherever the signal arrived. It costs one
        small message between each rank and rank 0, and does not wait for a running save.
        """
        self._run.ask_coordinator("stop?", lambda: None)
        return self.is_preempted

    @property
    def is_preempted(self) -> bool:
        """Whether the ranks know of a signal, since the last collective call of this manager.

        Local; the same on all ranks. Every collective call looks for signals, as `should_stop`.
        """
        run = self._run
        return run.stop.is_agreed or (run.ranks.no_dist and run.stop.is_received)

    # Loading.

    @drop_inner_frames
    def latest(self) -> Step | None:
        """The newest whole step; None without one. Collective.

        Rank 0 warns of each step after it that is not whole, once.
        """
        return choose_latest(self._run)

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
        return load_latest_step(self._run, state_dict, keywords)

    @drop_inner_frames
    def steps(self, *, check: ListLevel | None = None) -> list[Step]:
        """All steps, whole or not, ascending. Collective.

        check: for this call; None: the manager's; "names": a step that has an index passes, and
            none is opened, which is for runs of thousands of steps.
        """
        if check not in (None, *get_args(ListLevel)):
            raise ValueError(f"check= takes 'names', 'sizes' or 'checksums', got {check!r}")
        run = self._run
        return run.ask_coordinator("list the steps", lambda: run.steps.list_steps(check))

    @drop_inner_frames
    def measure(self) -> list[StepBytes]:
        """The bytes on disk of each step, with and without the files that it shares. Collective."""
        run = self._run
        return run.ask_coordinator("measure", lambda: measure_steps(run.steps.folders))

    @drop_inner_frames
    def remove_after(self, step: int) -> list[int]:
        """Remove the steps after this one, to go on from it; returns their numbers. Collective.

        Raises ValueError if this step is not whole.
        """
        require_count("step", step, least=0)
        self.wait()
        return remove_later_steps(self._run, step)

    @drop_inner_frames
    def export(
        self,
        step: int,
        target: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> ExportReport:
        """Copy a step to a path or URL, without bytes of other steps in its files. Collective.

        Rank 0 copies, and compares the checksum of each block. The copy appears at once, when it is
        whole. storage_options: of the target's file system.

        Raises ValueError if the step is not whole, CheckpointExistsError if the target is a
        checkpoint, and CheckpointCorruptError if a block is damaged.
        """
        require_count("step", step, least=0)
        self.wait()
        return export_step(self._run, step, RunPlace(target, dict(storage_options or {})))

    def close(self) -> None:
        """Wait for a running save, and let other processes save in the folder. Collective.

        Puts back the signal handlers that were there before.
        """
        try:
            self.wait()
        finally:
            self._run.release_lock()
            self._run.stop.restore_handlers()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()
