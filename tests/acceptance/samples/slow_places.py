"""Copied as test_slow_places.py: what takes long is no part of the test's own work."""

from __future__ import annotations

import os
import time

import pytest


class SlowToShow:
    """A test's argument, which pytest shows when it writes the report of a failure."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __repr__(self) -> str:
        time.sleep(self.seconds)
        return f"<shown after {self.seconds:g} s>"


class SlowToTellError(Exception):
    """Its text takes longer than peers get once a rank has failed."""

    def __str__(self) -> str:
        time.sleep(1.5)
        return "told late"


class FatalToShow:
    def __repr__(self) -> str:
        os._exit(4)


@pytest.fixture
def slow(rank: int) -> SlowToShow:
    return SlowToShow(3.0 if rank else 0.0)


@pytest.fixture
def fatal() -> FatalToShow:
    return FatalToShow()


@pytest.mark.world_size(2)
def test_first(rank: int) -> None:
    assert rank in (0, 1)


@pytest.mark.world_size(3, timeout=60)
def test_peers_report_slowly(rank: int, slow: SlowToShow) -> None:
    raise ValueError("boom" if rank != 2 else "another")


@pytest.mark.world_size(2, timeout=2)
def test_reports_beyond_the_limit(rank: int, slow: SlowToShow) -> None:
    assert rank == 0


@pytest.mark.world_size(2, timeout=60)
def test_text_is_slow(rank: int) -> None:
    raise SlowToTellError if rank == 1 else ValueError("boom")


def raise_slow_text() -> None:
    raise SlowToTellError if os.environ["RANK"] == "1" else ValueError("boom")


def test_text_is_slow_in_a_function(worlds: object) -> None:
    with worlds(2) as w:  # type: ignore[operator]  # the fixture
        w.run(raise_slow_text)


@pytest.mark.world_size(2)
def test_dies_while_it_reports(rank: int, fatal: FatalToShow) -> None:
    if rank == 1:
        raise ValueError("boom")
