"""Any history of a run against a plain dict: saves, incremental or not, crashes, damage, restarts,
removals, strangers.

Promised: the newest whole step is found, with its values; no whole step that the rules keep is
lost; only the rules and `remove_after` remove; and files that are not the package's stay.

A crash is an exception from the n-th change of the disk on: nothing is cleaned up after it. Whether
a step is whole after a crash is decided by a plain load of its folder.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps import step_folders
from pytest_dcp._engine.steps.clean_run import remove_leftovers
from pytest_dcp._engine.steps.known_steps import KnownSteps
from pytest_dcp._engine.steps.retention import RetentionPolicy
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp.checkpoint import CheckpointManager
from support.retention_rules import Rules

IS_NIGHTLY = settings().max_examples >= 10_000
EXAMPLES, STEPS = (1_000, 30) if IS_NIGHTLY else (20, 12)
CHANGES = ("create", "replace", "remove", "make_folder", "sync_folder")


class CrashError(BaseException):
    """The process has ended here."""


@contextmanager
def crash_at(change: int) -> Iterator[list[int]]:
    """The disk refuses the n-th change and all later ones; the list gets their number."""
    made = [0]

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def refuse_or_do(*arguments: Any) -> Any:
            made[0] += 1
            if made[0] >= change:
                raise CrashError
            return method(*arguments)

        return refuse_or_do

    with (
        mock.patch.multiple(
            LocalDisk, **{name: wrap(getattr(LocalDisk, name)) for name in CHANGES}
        ),
        mock.patch.multiple(Path, rename=wrap(Path.rename), rmdir=wrap(Path.rmdir)),
    ):
        yield made


@dataclass
class Model:
    """The run as it should be."""

    losses: dict[int, float] = field(default_factory=dict)
    """Of the whole steps."""
    wrecks: set[int] = field(default_factory=set)
    """Damaged steps and begun saves: a run that has only these is refused."""


RULES = st.builds(
    Rules,
    keep_last=st.none() | st.integers(1, 3),
    keep_every=st.none() | st.integers(2, 4),
    best=st.integers(0, 2),
)


class AnyRun(RuleBasedStateMachine):
    @initialize(rules=RULES, incremental=st.booleans())
    def begin(self, rules: Rules, incremental: bool) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="dcp-any-run-")) / "run"
        self.model = Model()
        self.strangers: set[Path] = set()
        self.rules, self.incremental = rules, incremental
        self.manager = self._open()

    def _open(self) -> CheckpointManager:
        """The run, as its job opens it."""
        keywords = self.rules.keywords()
        return CheckpointManager(self.root, no_dist=True, incremental=self.incremental, **keywords)

    @property
    def newest(self) -> int:
        return max(self.model.losses, default=0)

    # What the run does.

    @rule(further=st.integers(1, 3), loss=st.integers(0, 4), in_background=st.booleans())
    def save(self, further: int, loss: int, in_background: bool) -> None:
        step = self.newest + further
        self._save(step, loss, in_background=in_background)
        self._note_saved(step, loss)

    def _save(self, step: int, loss: int, *, in_background: bool = False) -> None:
        save = self.manager.async_save if in_background else self.manager.save
        save(step, state_of(step, loss), metrics={"loss": float(loss)})
        self.manager.wait()

    def _note_saved(self, step: int, loss: int) -> None:
        self.model.wrecks.discard(step)
        self.model.losses[step] = float(loss)
        kept = self.rules.keep(self.model.losses)
        self.model.losses = {s: v for s, v in self.model.losses.items() if s in kept}

    @rule(back=st.integers(0, 3))
    def save_backwards(self, back: int) -> None:
        step = self.newest - back
        if not self.model.losses or step < 0:
            return
        with pytest.raises(dcp.CheckpointExistsError):
            self._save(step, 9)

    @rule(rules=RULES, incremental=st.booleans())
    def restart(self, rules: Rules, incremental: bool) -> None:
        self.manager.close()
        self.rules, self.incremental = rules, incremental
        self.manager = self._open()

    @rule(back=st.integers(1, 3))
    def go_back(self, back: int) -> None:
        earlier = sorted(self.model.losses)[:-1][-back:]
        if earlier:
            self.manager.remove_after(earlier[0])
            self._forget_after(earlier[0])

    def _forget_after(self, step: int) -> None:
        self.model.losses = {s: v for s, v in self.model.losses.items() if s <= step}
        self.model.wrecks = {s for s in self.model.wrecks if s <= step}
        self.strangers = {path for path in self.strangers if path.exists()}

    @rule(keep_last=st.integers(1, 3))
    def prune(self, keep_last: int) -> None:
        self._steps(keep_last).remove_old(keep_last)
        kept = Rules(keep_last).keep(self.model.losses)
        self.model.losses = {s: v for s, v in self.model.losses.items() if s in kept}

    def _steps(self, keep_last: int | None = None) -> KnownSteps:
        """As the commands open a run in which no job saves."""
        self.manager.close()
        return KnownSteps(RunPlace(self.root), RetentionPolicy(keep_last), "sizes")

    @rule()
    def clean(self) -> None:
        remove_leftovers(self._steps(), quarantined=True)
        self.model.wrecks = {step for step in self.model.wrecks if self._folder(step).exists()}

    # What happens to it.

    @rule(change=st.integers(1, 25), further=st.integers(1, 2), loss=st.integers(0, 4))
    def crash_in_save(self, change: int, further: int, loss: int) -> None:
        step = self.newest + further
        kept = self.rules.keep(self.model.losses | {step: float(loss)})
        with self._crashing(change, kept, {step: float(loss)}):
            self._save(step, loss)

    @rule(change=st.integers(1, 12))
    def crash_in_removal(self, change: int) -> None:
        earlier = sorted(self.model.losses)[:-1]
        if earlier:
            with self._crashing(change, {s for s in self.model.losses if s <= earlier[-1]}, {}):
                self.manager.remove_after(earlier[-1])

    @rule(change=st.integers(1, 12))
    def crash_in_prune(self, change: int) -> None:
        with self._crashing(change, Rules(1).keep(self.model.losses), {}):
            self._steps(1).remove_old(1)

    @rule(change=st.integers(1, 12))
    def crash_in_gc(self, change: int) -> None:
        with self._crashing(change, set(self.model.losses), {}):
            self.clean()

    @contextmanager
    def _crashing(self, change: int, kept: set[int], added: dict[int, float]) -> Iterator[None]:
        """A crash inside, or none, if it makes fewer changes; then a restart."""
        before = self.model.losses
        with crash_at(change), suppress(CrashError, dcp.CheckpointException):
            yield
        self.manager._run.release_lock()  # as the end of the process does
        self.manager = self._open()
        known = before | added
        whole = {step for step in known if self._is_loadable(step)}
        assert kept & set(before) <= whole, f"{sorted(whole)} of {sorted(before)}, kept {kept}"
        self.model.losses = {step: known[step] for step in whole}
        self.model.wrecks = {
            int(path.name[5:]) for path in self.root.glob("step-*") if path.is_dir()
        } - whole
        self.strangers = {path for path in self.strangers if path.exists()}

    def _is_loadable(self, step: int) -> bool:
        state = state_of(0, 0)
        try:
            dcp.load(state, checkpoint_id=self._folder(step), no_dist=True)
        except (OSError, dcp.CheckpointError):
            return False
        return True

    @rule(nth=st.integers(0, 3), kind=st.sampled_from(["lose", "cut", "lose index", "spoil index"]))
    def damage(self, nth: int, kind: str) -> None:
        if not self.model.losses:
            return
        step = sorted(self.model.losses)[-1 - nth % len(self.model.losses)]
        folder = self._folder(step)
        data = next(folder.glob("*.distcp"))
        index = folder / ".metadata"
        damaged = {step}
        if kind == "lose":
            data.unlink()
        elif kind == "cut":
            damaged = {other for other in self.model.losses if self._has(other, data)}
            data.write_bytes(data.read_bytes()[:20])
        elif kind == "lose index":
            index.unlink()
        else:
            index.write_bytes(index.read_bytes()[:-9] + bytes(9))
        self.model.losses = {s: v for s, v in self.model.losses.items() if s not in damaged}
        self.model.wrecks |= damaged

    def _has(self, step: int, data: Path) -> bool:
        """Whether the step has this very file, perhaps shared with others."""
        return any(data.samefile(path) for path in self._folder(step).glob("*.distcp"))

    @rule(name=st.sampled_from(["notes.txt", "step-3", "step-x", "steps", "not-whole/mine"]))
    def add_stranger(self, name: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        self.strangers.add(path)

    @rule(days=st.sampled_from([-40_000, -1, 1, 40_000]))
    def move_clock(self, days: int) -> None:
        """For the next save."""

        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.now(tz) + timedelta(days=days)

        with mock.patch.object(step_folders, "datetime", Clock):
            self.save(1, 2, in_background=False)

    # What must hold.

    @invariant()
    def the_newest_whole_step_is_found(self) -> None:
        if not hasattr(self, "manager"):
            return
        state = state_of(0, 0)
        fresh = CheckpointManager(self.root, no_dist=True)
        if not self.model.losses:
            if not self.model.wrecks:
                assert fresh.load_latest(state) is None
            return
        for manager in (fresh, self.manager):
            loaded = manager.load_latest(state)
            assert loaded is not None
            assert loaded.number == self.newest
            assert loaded.metrics == {"loss": self.model.losses[self.newest]}
        expected = state_of(self.newest, int(self.model.losses[self.newest]))
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        whole = {step.number for step in fresh.steps() if step.is_whole}
        assert whole == set(self.model.losses)

    @invariant()
    def the_files_of_others_stay(self) -> None:
        if hasattr(self, "strangers"):
            assert all(path.read_text() == "mine" for path in self.strangers)

    def _folder(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.manager.close()
            shutil.rmtree(self.root.parent)


def state_of(step: int, loss: int) -> dict[str, Any]:
    """A part of its own, and a larger one that every second step shares with the one before."""
    shared = torch.full((2000,), float(step // 2))
    return {"w": torch.tensor([float(step), float(loss), 1.0]), "s": shared}


AnyRun.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnyRun = pytest.mark.filterwarnings("ignore")(AnyRun.TestCase)
