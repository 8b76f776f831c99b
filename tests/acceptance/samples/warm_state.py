"""Copied as test_warm_state.py: tests that change their process, then tests that look at it."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from session_recorder import note
from state_changes import CHANGES, look

pytestmark = pytest.mark.world_size(1, isolation="module")
left_open: list[torch.inference_mode] = []
QUICK = sorted(CHANGES.keys() - {"logging", "new logger", "functions"})


@pytest.fixture(scope="module")
def at_first() -> dict[str, str]:
    return {name: look(name) for name in CHANGES}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str, at_first: dict[str, str]) -> None:
    CHANGES[name][0]()
    assert look(name) != at_first[name], "this changes nothing"


@pytest.mark.parametrize("name", CHANGES)
def test_sees(name: str, at_first: dict[str, str]) -> None:
    assert look(name) == at_first[name]
    note("world of the restored", pid=os.getpid())


@pytest.mark.parametrize("name", QUICK)
def test_examples(name: str) -> None:
    seen = []

    @settings(max_examples=3, database=None)
    @given(st.integers())
    def examples(x: int) -> None:
        seen.append(look(name))
        CHANGES[name][0]()

    examples()
    assert len({*seen}) == 1
    note("world of the restored", pid=os.getpid())


@pytest.mark.parametrize("time", [1, 2])
def test_state_of_a_logger_that_an_import_set_up(time: int) -> None:
    import logs_at_import  # type: ignore[import-not-found]  # noqa: F401  # written by the suite

    assert logging.getLogger("logs_at_import.inner").level == logging.ERROR


# Fixtures of wider scope make the state that tests find.


@pytest.fixture(scope="module", params=["one", "two"])
def of_module(request: pytest.FixtureRequest) -> Iterator[str]:
    os.environ["OF_MODULE"] = request.param
    torch.set_default_dtype(torch.float64)
    yield request.param
    del os.environ["OF_MODULE"]
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def of_test(of_module: str) -> None:
    os.environ["OF_TEST"] = of_module


@pytest.mark.parametrize("time", [1, 2])
def test_state_of_a_module(of_module: str, of_test: None, time: int) -> None:
    assert os.environ["OF_MODULE"] == of_module
    assert torch.get_default_dtype() is torch.float64
    os.environ["OF_MODULE"] = "changed"


def test_state_after_the_module_fixture() -> None:
    assert "OF_TEST" not in os.environ


class TestLate:
    @pytest.fixture(scope="class")
    def late(self) -> Iterator[None]:
        os.environ["LATE"] = "1"
        yield
        del os.environ["LATE"]

    def test_asks_late(self, request: pytest.FixtureRequest) -> None:
        os.environ["EARLY"] = "1"
        request.getfixturevalue("late")

    def test_has_it_still(self) -> None:
        assert os.environ["LATE"] == "1"
        assert "EARLY" not in os.environ


def test_after_the_class() -> None:
    assert "LATE" not in os.environ


# State that cannot be restored.


def test_interop_threads() -> None:
    note("before", pid=os.getpid())
    torch.set_num_interop_threads(3)


def test_after_interop_threads() -> None:
    note("after", pid=os.getpid())
    assert torch.get_num_interop_threads() != 3


def test_thread() -> None:
    note("before", pid=os.getpid())
    threading.Thread(target=threading.Event().wait, daemon=True, name="left").start()


def test_after_thread() -> None:
    note("after", pid=os.getpid())


def test_child() -> None:
    note("before", pid=os.getpid())
    subprocess.Popen(["sleep", "60"])


def test_after_child() -> None:
    note("after", pid=os.getpid())


def test_mode() -> None:
    note("before", pid=os.getpid())
    left_open.append(torch.inference_mode())
    left_open[-1].__enter__()


def test_after_mode() -> None:
    note("after", pid=os.getpid())
    assert not torch.is_inference_mode_enabled()


@pytest.fixture(scope="module")
def quiet_loggers() -> None:
    logging.getLogger("torch.fx").setLevel(logging.ERROR)


def test_sets_a_logger_then_asks_late(request: pytest.FixtureRequest) -> None:
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    request.getfixturevalue("quiet_loggers")


def test_state_of_loggers(quiet_loggers: None) -> None:
    assert logging.getLogger("torch.fx").level == logging.ERROR
    assert logging.getLogger("torch._dynamo").level != logging.ERROR
