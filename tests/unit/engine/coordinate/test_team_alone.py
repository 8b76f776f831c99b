"""A team of one rank: no process group, the same errors."""

from __future__ import annotations

import gc
import weakref

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from pytest_dcp._engine.coordinate import CoordinationError, OperationCall, StepError, Team, team_of


def alone() -> Team:
    return team_of(None, OperationCall("save"), use_dist=False, coordinator_rank=3)


def boom() -> None:
    raise ValueError("boom")


def test_one_rank_is_its_own_coordinator() -> None:
    with alone() as t:
        assert (t.rank, t.size, t.coordinator_rank, t.is_coordinator) == (0, 1, 0, True)
        assert t.group is None


def test_steps_return_the_results_of_the_functions() -> None:
    kept = object()
    with alone() as t:
        assert t.reduce_scatter("a", lambda: 1, lambda all_: [v + 1 for v in all_]) == 2
        assert t.all_reduce("b", lambda: kept, lambda all_: all_[0]) is kept
        assert t.all_gather("c", lambda: kept) == [kept]
        assert t.agree("d", lambda: kept) is kept
        assert t.broadcast("e", lambda: kept) is kept
        t.barrier("f")
        t.check()


def test_a_failure_has_the_shape_of_a_worlds() -> None:
    with alone() as t:
        with pytest.raises(CheckpointException) as caught:
            t.agree("write", boom)
        assert t.agree("after", lambda: 1) == 1
    assert isinstance(caught.value, StepError)
    assert caught.value.step == "write"
    error, stack = caught.value.failures[0]
    assert repr(error) == "ValueError('boom')"
    assert [frame.name for frame in stack] == ["boom"]
    assert str(caught.value).startswith("step 'write' of save failed on rank 0: ValueError: boom\n")


def test_a_failing_reduction_fails_the_step() -> None:
    with alone() as t, pytest.raises(StepError, match="expected one result per rank"):
        t.reduce_scatter("plan", lambda: 1, lambda _: [])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_stays_itself(kind: type[BaseException]) -> None:
    def stop() -> None:
        raise kind

    with alone() as t, pytest.raises(kind):
        t.agree("write", stop)


def test_a_closed_team_runs_no_step() -> None:
    t = alone()
    t.close()
    t.close()
    with pytest.raises(CoordinationError, match="has closed save before"):
        t.barrier("meet")


def test_a_team_that_is_dropped_is_freed() -> None:
    t = alone()
    with pytest.raises(StepError):
        t.agree("write", boom)
    gone = weakref.ref(t)
    del t
    gc.collect()
    assert gone() is None
