"""Copied as test_verdicts.py: skips, expected failures, and mixtures of verdicts."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from pytest_dcp._harness.rank.world_fixture import RankWorld

FOREVER_S = 600
pytestmark = pytest.mark.world_size(4, timeout=30)


# Skips.


def test_all_skip() -> None:
    pytest.skip("all of us")


def test_one_skips(rank: int) -> None:
    if rank == 0:
        pytest.skip("just me")


def test_one_passes(rank: int) -> None:
    if rank != 2:
        pytest.skip("not me")


def test_one_skips_one_fails(rank: int) -> None:
    if rank == 0:
        pytest.skip("just me")
    if rank == 1:
        raise ValueError("boom")


@pytest.fixture
def skip_in_setup() -> None:
    pytest.skip("from the fixture")


@pytest.fixture
def skip_in_setup_of_one(rank: int) -> None:
    if rank == 1:
        pytest.skip("from the fixture")


@pytest.mark.usefixtures("skip_in_setup")
def test_all_skip_in_setup() -> None:
    pass


@pytest.mark.usefixtures("skip_in_setup_of_one")
def test_one_skips_in_setup() -> None:
    pass


@pytest.mark.skip(reason="by mark")
def test_skip_mark() -> None:
    raise AssertionError("not to be run")


@pytest.mark.skipif("sys.version_info >= (3,)", reason="by condition")
def test_skipif_true() -> None:
    raise AssertionError("not to be run")


@pytest.mark.skipif("sys.version_info < (3,)", reason="by condition")
def test_skipif_false() -> None:
    pass


# pytest.xfail().


def test_all_xfail() -> None:
    pytest.xfail("known")


def test_one_xfails(rank: int) -> None:
    if rank == 0:
        pytest.xfail("known")


def test_one_xfails_one_fails(rank: int) -> None:
    if rank == 0:
        pytest.xfail("known")
    if rank == 1:
        raise ValueError("boom")


def test_one_xfails_one_dies(rank: int) -> None:
    if rank == 0:
        pytest.xfail("known")
    if rank == 1:
        os._exit(0)


def test_one_xfails_one_skips(rank: int) -> None:
    if rank == 0:
        pytest.xfail("known")
    if rank == 1:
        pytest.skip("just me")


# The xfail mark.


@pytest.mark.xfail(reason="known", strict=True)
def test_xfail_mark(rank: int) -> None:
    assert rank != 1


@pytest.mark.xfail(reason="known", strict=True)
def test_xfail_mark_one_dies(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.xfail(raises=ZeroDivisionError)
def test_xfail_raises_right(rank: int) -> None:
    if rank == 2:
        _ = 1 / 0


@pytest.mark.xfail(raises=ZeroDivisionError)
def test_xfail_raises_wrong(rank: int) -> None:
    if rank == 2:
        raise KeyError("x")


@pytest.mark.xfail(raises=ZeroDivisionError)
def test_xfail_raises_one_dies(rank: int) -> None:
    if rank == 2:
        os._exit(0)


@pytest.mark.xfail(raises=ZeroDivisionError)
def test_xfail_raises_right_then_wrong(rank: int) -> None:
    if rank == 2:
        _ = 1 / 0
    if rank == 0:
        time.sleep(0.1)
        raise KeyError("x")


@pytest.mark.xfail(raises=ZeroDivisionError)
def test_xfail_raises_right_then_one_dies(rank: int) -> None:
    if rank == 2:
        _ = 1 / 0
    if rank == 0:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.xfail(raises=ZeroDivisionError)
def test_xfail_raises_right_but_one_hangs(rank: int) -> None:
    if rank == 2:
        _ = 1 / 0
    if rank == 0:
        time.sleep(FOREVER_S)


@pytest.mark.xfail(raises=ZeroDivisionError)
def test_xfail_raises_right_but_some_wait(rank: int) -> None:
    if rank == 2:
        _ = 1 / 0
    dist.all_reduce(torch.ones(1))


@pytest.mark.xfail(raises=ZeroDivisionError)
def test_xfail_raises_right_and_the_others_are_reported(rank: int, world: RankWorld) -> None:
    if rank == 2:
        _ = 1 / 0
    world.barrier()


@pytest.mark.xfail(strict=True, reason="known")
def test_xpass_strict() -> None:
    pass


@pytest.mark.xfail(strict=False, reason="known")
def test_xpass() -> None:
    pass


@pytest.mark.xfail(False, reason="not here")
def test_xfail_condition_false(rank: int) -> None:
    assert rank != 1


@pytest.mark.xfail(run=False, reason="would take the machine down")
def test_xfail_without_run() -> None:
    raise AssertionError("not to be run")


def test_xfail_mark_added(request: pytest.FixtureRequest, rank: int) -> None:
    request.node.add_marker(pytest.mark.xfail(reason="known since now"))
    assert rank != 1


def test_xfail_mark_added_and_passes(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(pytest.mark.xfail(reason="known since now", strict=False))


def test_xfail_mark_added_without_reason_and_passes(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(pytest.mark.xfail(strict=False))


def test_xfail_mark_added_by_one_which_fails(request: pytest.FixtureRequest, rank: int) -> None:
    if rank == 0:
        request.node.add_marker(pytest.mark.xfail(reason="known to me"))
        raise ValueError("known")


def test_xfail_mark_added_strictly_and_passes(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(pytest.mark.xfail(reason="known since now", strict=True))


def test_xfail_mark_added_by_one_another_fails(request: pytest.FixtureRequest, rank: int) -> None:
    if rank == 0:
        request.node.add_marker(pytest.mark.xfail(reason="known since now"))
        raise ValueError("known")
    if rank == 1:
        raise ValueError("not known")


# A fixture that is not there, last: when the session breaks off here, all else was run.


def test_unknown_fixture(no_such_fixture: object) -> None:
    pass


def test_after_unknown_fixture() -> None:
    pass
