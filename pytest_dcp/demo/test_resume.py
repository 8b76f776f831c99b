"""Resuming: a training run that is killed at any time goes on as if nothing had happened."""

import os
import random
import signal
import threading

import pytest
import torch
import torch.distributed as dist

from pytest_dcp import WorldError
from pytest_dcp.checkpoint import CheckpointManager
from pytest_dcp.demo.trainer import STEPS, train


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def train_and_be_killed(run, after_s, dropout=0.1):
    """Train, and kill this rank after some time, wherever it is then."""
    threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    train(run, steps=100_000, dropout=dropout)


def newest_step(run):
    with CheckpointManager(run, no_dist=True) as manager:
        step = manager.latest()
    return -1 if step is None else step.number


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)


def test_a_run_that_stops_and_resumes_ends_with_the_same_bits(worlds, tmp_path):
    with worlds(4) as world:
        expected, *_ = world.run(train, tmp_path / "uninterrupted")
    with worlds(4) as world:
        world.run(train, tmp_path / "run", STEPS // 2)
    with worlds(4) as world:
        found, *_ = world.run(train, tmp_path / "run")
    assert_same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kill", range(2))
def test_a_run_that_is_killed_at_any_time_loses_no_whole_step(worlds, run, kill):
    moment = random.Random(kill)
    with worlds(4) as world:
        world.run(train, run, 5)
    for _ in range(2):
        before = newest_step(run)
        with pytest.raises(WorldError, match="SIGKILL"), worlds(4) as world:
            world.run(train_and_be_killed, run, moment.uniform(0.05, 0.8))
        assert newest_step(run) >= before >= 4
    newest = newest_step(run)
    with worlds(4) as world:
        found, *_ = world.run(train, run, newest + 11)
        expected, *_ = world.run(train, run.parent / "uninterrupted", newest + 11)
    assert_same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_another_number_of_ranks_goes_on_with_the_same_batches(worlds, run, ranks):
    """Sums of gradients are rounded in another order, and dropout would differ."""
    with worlds(4) as world:
        expected, *_ = world.run(train, run.parent / "uninterrupted", STEPS, 0.0)
        world.run(train, run, STEPS // 2, 0.0)
    with worlds(ranks) as world:
        found, *_ = world.run(train, run, STEPS, 0.0)
    assert_same(found, expected, rtol=1e-4, atol=1e-5)


def test_a_scheduler_that_stops_one_rank_stops_all_with_a_last_step(worlds, run):
    def train_until_stopped(run):
        if dist.get_rank() == 1:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        train(run, steps=100_000)

    with worlds(2) as world:
        world.run(train_until_stopped, run)
    assert newest_step(run) >= 0
