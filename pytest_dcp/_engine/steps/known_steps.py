"""The steps of a run as one process knows them: looked at, chosen, removed. No collectives."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from pytest_dcp._engine.io.commit import METADATA
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.threads import StopFlag, run_all
from pytest_dcp._engine.steps.inspect_step import CheckLevel, ListLevel, find_problem
from pytest_dcp._engine.steps.retention import RetentionPolicy
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp._engine.steps.step_names import step_name
from pytest_dcp.errors import CheckpointExistsError

ASIDE = "not-whole"
STORE_THREADS = 16
"""Steps of a store that are looked at together: each costs some requests, and waits for them. Local
files are in memory; there the time is Python's own."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a run, as it was found."""

    number: int
    metrics: Mapping[str, float]
    saved_at: datetime | None
    """When its save began, by the coordinator's clock."""
    problem: str | None
    """Why it is not whole; None if it is."""
    checked: ListLevel | None
    """The closest test that this process has seen it pass: "names" (it has an index), "sizes" or
    "checksums"; None if it is not whole."""

    @property
    def is_verified(self) -> bool:
        """Whether this process has checked every byte of it."""
        return self.checked == "checksums"

    @property
    def is_whole(self) -> bool:
        """Whether it can be loaded, as far as it was checked."""
        return self.problem is None


class KnownSteps:
    """One process's knowledge of a run's steps, beside the folders themselves."""

    def __init__(self, place: RunPlace, policy: RetentionPolicy, check: CheckLevel) -> None:
        self.place = place
        self.policy = policy
        self.folders = place.open_folders()
        self.check: CheckLevel = check
        self._damaged: dict[int, str] = {}
        """Steps in which a load of this process found damage."""
        self._verified: set[int] = set()
        self._mentioned: set[tuple[int, str]] = set()
        self._found_whole: dict[int, Mapping[str, float]] = {}
        """The metrics of steps that were whole when this process looked; for retention."""

    def list_steps(self, check: ListLevel | None) -> list[Step]:
        """All steps, whole or not, ascending."""
        jobs = [partial(self._look_at_one, step, check) for step in self.folders.numbers()]
        is_local = isinstance(self.folders.root.disk, LocalDisk)
        found = run_all(jobs, 1 if is_local else STORE_THREADS)
        return [step for step in found if step.is_whole or not self.folders.is_gone(step.number)]

    def _look_at_one(self, step: int, check: ListLevel | None, stop: StopFlag) -> Step:
        stop.check()
        return self.look_at(step, check)

    def is_news(self, step: int, problem: str) -> bool:
        """Whether this is the first time that this problem of the step is mentioned."""
        is_new = (step, problem) not in self._mentioned
        self._mentioned.add((step, problem))
        return is_new

    def has_index(self, step: int) -> bool:
        """Whether the step is still there."""
        return self.folders.folder(step).exists(METADATA)

    def note_damage(self, step: int, problem: str) -> None:
        """Remember damage that a load has found."""
        self._damaged[step] = problem
        self._found_whole.pop(step, None)

    def forget(self, step: int) -> None:
        """Nothing is known of the step any more: it is saved again, or removed."""
        self._damaged.pop(step, None)
        self._found_whole.pop(step, None)
        self._verified.discard(step)

    def remove_old(self, keep_last: int) -> list[int]:
        """Remove the steps that no rule keeps; returns their numbers.

        Ends removals that a crash has interrupted.
        """
        chosen = self.policy.steps_to_remove(self._find_whole(keep_last, ends_removals=True))
        removed = [number for number in chosen if self.look_at(number, None).is_whole]
        for number in removed:
            self.remove(number)
        return removed

    def steps_to_remove(self, keep_last: int) -> list[int]:
        """The steps that `remove_old` would remove."""
        return self.policy.steps_to_remove(self._find_whole(keep_last, ends_removals=False))

    def _find_whole(self, keep_last: int, *, ends_removals: bool) -> dict[int, Mapping[str, float]]:
        """The whole steps that the rules are about, with their metrics.

        The newest `keep_last` are looked at anew. The others are looked at once in a process, and
        not at all if they are kept whatever they are: a run may have thousands.
        """
        whole: dict[int, Mapping[str, float]] = {}
        for number in reversed(self.folders.numbers()):
            if len(whole) >= keep_last and self.policy.keeps_for_good(number):
                continue
            if len(whole) < keep_last or number not in self._found_whole:
                step = self.look_at(number, None)
                if not step.is_whole:
                    if ends_removals and self.folders.is_half_removed(number):
                        self.remove(number)
                    continue
                self._found_whole[number] = step.metrics
            whole[number] = self._found_whole[number]
        return whole

    def remove(self, number: int) -> None:
        """Remove a step."""
        self.forget(number)
        self.folders.remove(number)

    def find_latest(self) -> tuple[Step | None, dict[int, str]]:
        """The newest whole step, and why later ones are not."""
        problems: dict[int, str] = {}
        for number in reversed(self.folders.numbers()):
            step = self.look_at(number, None)
            if step.problem is None:
                return step, problems
            if not (self.folders.is_half_removed(number) or self.folders.is_gone(number)):
                problems[number] = step.problem
        return None, problems

    def look_at(self, number: int, check: ListLevel | None) -> Step:
        """The step as it is now. check: None: the manager's."""
        level = check or self.check
        problem = self._damaged.get(number)
        if problem is None:
            # The bytes of a step are read once; its files may have gone since.
            is_read = level == "checksums" and number in self._verified
            depth: ListLevel = "sizes" if is_read else level
            where = self.folders.checkpoint_id(number)
            problem = find_problem(self.folders.folder(number), where, depth, self.place.options)
            if problem is None and depth == "checksums":
                self._verified.add(number)
        if problem is not None and self.folders.is_half_removed(number):
            problem = "its removal has not ended"
        notes = self.folders.notes(number)
        checked: ListLevel | None = None
        if problem is None:
            checked = "checksums" if number in self._verified else level
        return Step(number, notes.metrics, notes.saved_at, problem, checked)

    def require_after_newest(self, step: int) -> None:
        """Raise CheckpointExistsError unless the step is after the newest whole one."""
        for number in reversed(self.folders.numbers()):
            if number < step:
                return
            if self.look_at(number, None).is_whole:
                again = "again" if number == step else f"after step {number}"
                raise CheckpointExistsError(
                    f"step {step} cannot be saved {again}: step {number} in {self.folders} is "
                    f"whole; remove_after({min(step, number) - 1}) or of an earlier step removes it"
                )

    def move_aside(self, step: int) -> None:
        """A folder of that number that is not whole: it is kept under another name."""
        folder = self.folders.folder(step)
        if not folder.names() or not isinstance(folder.disk, LocalDisk):
            return
        if self.folders.is_half_removed(step):
            self.folders.remove(step)
            return
        aside = Path(self.folders.root.path) / ASIDE
        aside.mkdir(exist_ok=True)
        Path(folder.path).rename(aside / f"{step_name(step)}-{secrets.token_hex(4)}")
        self.folders.root.sync()
