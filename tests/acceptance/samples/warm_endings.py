"""Copied as test_<ending>.py: a warm world whose fixtures fail at teardown, then an ending."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from session_recorder import note

ENDING = Path(__file__).stem.removeprefix("test_")
DIES = 'sleep 0.2; kill -9 "$1"'
warm = pytest.mark.world_size(2, isolation="module")


@pytest.fixture(scope="session")
def of_session() -> Iterator[None]:
    yield
    note("torn down", ending=ENDING, scope="session", rank=os.environ["RANK"])


@pytest.fixture(scope="module")
def of_module(of_session: None) -> Iterator[None]:
    note("set up", ending=ENDING, scope="module", rank=os.environ["RANK"])
    yield
    note("torn down", ending=ENDING, scope="module", rank=os.environ["RANK"])
    raise RuntimeError(f"torn down at the end of {ENDING}")


@warm
def test_first(of_module: None) -> None:
    pass


@warm
def test_owner(of_module: None) -> None:
    if ENDING == "death" and os.environ["RANK"] == "1":
        # No child of the rank: it would be ended with the test.
        subprocess.run(["sh", "-c", f"({DIES}) & :", "sh", str(os.getpid())], check=True)


if ENDING == "unmarked":

    def test_after() -> None:
        pass

elif ENDING in ("other_spec", "fails"):

    @pytest.mark.world_size(1, isolation="module")
    def test_after() -> None:
        assert ENDING != "fails"

    @warm
    def test_not_reached() -> None:
        assert ENDING != "other_spec"

    if ENDING == "other_spec":
        del test_not_reached

elif ENDING == "skipped":

    @warm
    @pytest.mark.skip(reason="by its marker")
    def test_after() -> None:
        pass

elif ENDING in ("interrupted", "exits", "stops"):

    def test_after(request: pytest.FixtureRequest) -> None:
        if ENDING == "interrupted":
            raise KeyboardInterrupt
        if ENDING == "exits":
            pytest.exit("enough", returncode=5)
        request.session.shouldstop = "enough"

    @warm
    def test_not_reached() -> None:
        pass

elif ENDING == "death":

    def test_between() -> None:
        time.sleep(1.0)

    @warm
    def test_after() -> None:
        note("after the death", rank=os.environ["RANK"])

elif ENDING == "property":

    @warm
    @settings(max_examples=20, database=None, derandomize=True)
    @given(x=st.integers(0, 100))
    def test_property(of_module: None, rank: int, x: int) -> None:
        if rank == 1 and x > 50:
            os._exit(3)

elif ENDING == "class":

    class TestAfter:
        @pytest.fixture(scope="class")
        def of_class(self) -> Iterator[None]:
            yield
            note("torn down", ending=ENDING, scope="class", rank=os.environ["RANK"])
            sys.stdout.write("the class is torn down\n")
            raise RuntimeError("torn down with the class")

        @warm
        def test_in_class(self, of_class: None) -> None:
            pass

    def test_unmarked() -> None:
        pass

    @warm
    def test_after(of_module: None) -> None:
        pass
