"""Any history of a run whose jobs have 1, 2 or 4 ranks, against a plain dict.

As `test_any_run` does it for one process: each job goes on from the newest whole step, which ranks
of another number may have saved, incrementally or not; later ones may have been damaged since.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from pytest_dcp._engine.steps.clean_run import remove_leftovers
from pytest_dcp._engine.steps.known_steps import KnownSteps
from pytest_dcp._engine.steps.retention import RetentionPolicy
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp.checkpoint import CheckpointManager
from support.retention_rules import Rules

IS_NIGHTLY = settings().max_examples >= 10_000
EXAMPLES, STEPS = (300, 30) if IS_NIGHTLY else (15, 12)
SIZES = st.sampled_from([1, 2, 4])
RULES = st.builds(Rules, keep_last=st.none() | st.integers(1, 3))
FULL = torch.arange(4000.0).reshape(1000, 4)
FROZEN = torch.arange(3000.0).reshape(750, 4)


@cache
def group_of(size: int) -> Any:
    """The first ranks. Collective, once in a process."""
    return dist.group.WORLD if size == 4 else dist.new_group(list(range(size)))


def state_of(step: int, size: int) -> dict[str, Any]:
    """A part that changes and one that does not, each spread over the ranks."""
    whole = {"w": FULL + step, "f": FROZEN}
    if size == 1:
        return {**whole, "step": step}
    mesh = DeviceMesh.from_group(group_of(size), "cpu")
    spread = {
        n: distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for n, t in whole.items()
    }
    return {**spread, "step": step}


def is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, DTensor):
        return torch.equal(one.to_local(), other.to_local())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


class AnyRanks(RuleBasedStateMachine):
    """In a world of 4; a job has the first of its ranks."""

    @initialize(size=SIZES, rules=RULES, incremental=st.booleans())
    def begin(self, size: int, rules: Rules, incremental: bool) -> None:
        for each in (2, 4):
            group_of(each)
        names = [tempfile.mkdtemp(prefix="dcp-any-ranks-") if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(names)
        self.root = Path(names[0]) / "run"
        self.whole: set[int] = set()
        self._open(size, rules, incremental)

    def _open(self, size: int, rules: Rules, incremental: bool) -> None:
        self.size, self.rules, self.incremental = size, rules, incremental
        self.is_member = dist.get_rank() < size
        if self.is_member:
            ranks: Any = {"no_dist": True} if size == 1 else {"process_group": group_of(size)}
            self.manager = CheckpointManager(
                self.root, incremental=incremental, **ranks, **rules.keywords()
            )

    def _on_ranks(self, act: Callable[[], object]) -> None:
        """On the ranks of the job; the others wait."""
        if self.is_member:
            act()
        dist.barrier()

    def _on_first(self, act: Callable[[], object]) -> None:
        if dist.get_rank() == 0:
            act()
        dist.barrier()

    @rule(size=SIZES, rules=RULES, incremental=st.booleans())
    def restart(self, size: int, rules: Rules, incremental: bool) -> None:
        self._on_ranks(lambda: self.manager.close())
        self._open(size, rules, incremental)

    @rule(further=st.integers(1, 2), in_background=st.booleans())
    def save(self, further: int, in_background: bool) -> None:
        step = max(self.whole, default=0) + further

        def act() -> None:
            state = state_of(step, self.size)
            save = self.manager.async_save if in_background else self.manager.save
            save(step, state, metrics={"loss": 1.0})
            self.manager.wait()

        self._on_ranks(act)
        self.whole = self.rules.keep(dict.fromkeys(self.whole | {step}, 1.0))

    @rule(nth=st.integers(0, 2), loses_index=st.booleans())
    def damage(self, nth: int, loses_index: bool) -> None:
        """Lose the index, as a killed save has none, or a data file."""
        if len(self.whole) < 2:
            return
        step = sorted(self.whole)[-1 - nth % len(self.whole)]
        folder = self.root / f"step-{step:08d}"
        self.whole.remove(step)
        self._on_first(
            lambda: (folder / ".metadata" if loses_index else min(folder.glob("*.distcp"))).unlink()
        )

    @rule(back=st.integers(1, 2))
    def go_back(self, back: int) -> None:
        earlier = sorted(self.whole)[:-1][-back:]
        if earlier:
            self._on_ranks(lambda: self.manager.remove_after(earlier[0]))
            self.whole = {step for step in self.whole if step <= earlier[0]}

    @rule(keep_last=st.integers(1, 2), collects=st.booleans())
    def prune(self, keep_last: int, collects: bool) -> None:
        """As the commands do between two jobs."""
        self._on_ranks(lambda: self.manager.close())

        def act() -> None:
            known = KnownSteps(RunPlace(self.root), RetentionPolicy(keep_last), "sizes")
            known.remove_old(keep_last)
            if collects:
                remove_leftovers(known, quarantined=True)

        self._on_first(act)
        self.whole = Rules(keep_last).keep(dict.fromkeys(self.whole, 1.0))
        self._open(self.size, self.rules, self.incremental)

    @invariant()
    def every_rank_finds_its_part_of_the_newest_whole_step(self) -> None:
        if not self.whole:
            return

        def act() -> None:
            state = state_of(0, self.size)
            loaded = self.manager.load_latest(state)
            newest = max(self.whole)
            assert loaded is not None
            assert loaded.number == newest
            expected = state_of(newest, self.size)
            assert all(is_equal(state[name], value) for name, value in expected.items())
            assert {step.number for step in self.manager.steps() if step.is_whole} == self.whole

        self._on_ranks(act)

    def teardown(self) -> None:
        if hasattr(self, "root"):
            self._on_ranks(lambda: self.manager.close())
            self._on_first(lambda: shutil.rmtree(self.root.parent))


AnyRanks.TestCase.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None
)
TestAnyRanks = pytest.mark.filterwarnings("ignore")(pytest.mark.world_size(4)(AnyRanks.TestCase))
