"""A handler of `dcp_logger` hears of saves and loads what torch's engine would tell it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.verbs import call_events
from pytest_dcp.checkpoint.logger import _dcp_logger, _dcp_method_logger

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

torch_dcp: Any = importlib.import_module("torch.distributed.checkpoint")


class Listener(logging.Handler):
    """Keeps the events that it hears."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.msg, dict)
        self.events.append(dict(record.msg))

    def names(self, event: str) -> list[str]:
        return [one["func_name"] for one in self.events if one["event"] == event]

    def of(self, function: str) -> list[dict[str, Any]]:
        return [one for one in self.events if one["func_name"] == function]


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    _dcp_logger.addHandler(made)
    yield made
    _dcp_logger.removeHandler(made)


class Counter:
    """A Stateful object."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_the_logger_is_torchs() -> None:
    assert _dcp_logger is importlib.import_module(f"{torch_dcp.__name__}.logger")._dcp_logger


@pytest.mark.parametrize("verb", ["save", "load"])
def test_a_call_has_torchs_events_in_torchs_order(
    listener: Listener, tmp_path: Path, verb: str
) -> None:
    """Except for one pair of events per key, and only one of "global_step" in a load of ours."""
    heard = []
    for engine in (torch_dcp, dcp):
        folder = tmp_path / engine.__name__
        engine.save({"a": torch.ones(2), "s": Counter()}, checkpoint_id=folder)
        if verb == "load":
            listener.events.clear()
            engine.load({"a": torch.zeros(2), "s": Counter()}, checkpoint_id=folder)
        heard.append(
            [
                (one["func_name"], one["event"], sorted(one.keys() - {"storage_writer"}))
                for one in listener.events
                if not one["func_name"].startswith("_stateful_to_state_dict.")
            ]
        )
        listener.events.clear()
    assert heard[1] == heard[0]
    assert len(heard[0]) >= 8


def test_the_events_of_a_save_name_the_checkpoint(listener: Listener, tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path, planner=dcp.DefaultSavePlanner())
    start, end = listener.of("save")
    assert start["checkpoint_id"] == end["checkpoint_id"] == str(tmp_path)
    assert start["planner"] == "DefaultSavePlanner"
    assert start["uuid"] == end["uuid"]
    assert end["time"] - start["time"] == end["times_spent"] > 0
    assert "times_spent" not in start
    for step in ("local_step", "global_step", "write_data", "finish_checkpoint"):
        assert [one["checkpoint_id"] for one in listener.of(step)] == [str(tmp_path)] * 2
    assert len({one["uuid"] for one in listener.events}) == len(listener.names("start"))


def test_a_given_storage_names_the_checkpoint(listener: Listener, tmp_path: Path) -> None:
    dcp.save({"a": torch.ones(2)}, storage_writer=dcp.FileSystemWriter(tmp_path))
    (start, _) = listener.of("save")
    assert start["checkpoint_id"] == str(tmp_path)
    assert start["storage_writer"] == "FileSystemWriter"
    dcp.load({"a": torch.ones(2)}, storage_reader=dcp.FileSystemReader(tmp_path))
    assert listener.of("load")[0]["storage_reader"] == "FileSystemReader"


def test_a_failure_is_heard_once_and_raised(listener: Listener, tmp_path: Path) -> None:
    with pytest.raises(dcp.CheckpointException, match="no checkpoint in"):
        dcp.load({"a": torch.zeros(1)}, checkpoint_id=tmp_path / "nothing")
    assert listener.names("exception") == ["load"]
    assert "no checkpoint in" in listener.of("load")[1]["error"]
    assert listener.names("end") == []


def test_an_interrupt_is_heard(listener: Listener, tmp_path: Path) -> None:
    class Interrupted(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dcp.save({"a": torch.ones(1)}, checkpoint_id=tmp_path, planner=Interrupted())
    assert listener.names("exception") == ["save"]


def test_a_background_save_is_heard_from_its_call_to_its_end(
    listener: Listener, tmp_path: Path
) -> None:
    future: Any = dcp.async_save({"a": torch.ones(1)}, checkpoint_id=tmp_path)
    future.result(60)
    begun = listener.names("start")
    assert begun[:3] == ["async_save", "_stateful_to_state_dict", "stage_state_dict"]
    assert set(listener.names("end")) == set(begun) >= {"save", "finish_checkpoint"}
    assert listener.of("async_save")[0]["checkpoint_id"] == str(tmp_path)
    assert listener.of("save")[0]["checkpoint_id"] == str(tmp_path)


def test_a_decorated_function_is_heard(listener: Listener) -> None:
    @_dcp_method_logger(log_exceptions=True, checkpoint_id="of the decorator")
    def work(fails: bool, *, checkpoint_id: str = "") -> int:
        if fails:
            raise ValueError("as asked")
        return 3

    assert work(False) == 3
    assert work(False, checkpoint_id="of the call") == 3
    with pytest.raises(ValueError, match="as asked"):
        work(True)
    assert [(one["event"], one["checkpoint_id"]) for one in listener.of("work")] == [
        ("start", "of the decorator"), ("end", "of the decorator"),
        ("start", "of the call"), ("end", "of the call"),
        ("start", "of the decorator"), ("exception", "of the decorator"),
    ]  # fmt: skip


def test_an_event_that_a_handler_keeps_does_not_change(tmp_path: Path) -> None:
    kept: list[Any] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record.msg)

    keeper = Keeper()
    _dcp_logger.addHandler(keeper)
    try:
        dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path)
    finally:
        _dcp_logger.removeHandler(keeper)
    assert kept[0]["event"] == "start"
    assert kept[-1]["event"] == "end"


def test_without_a_listener_nothing_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("built for nobody")

    # pytest puts handlers of its own on loggers that do not propagate.
    monkeypatch.setattr(_dcp_logger, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(call_events, "describe_call", never)
    dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path)
    dcp.load({"a": torch.ones(2)}, checkpoint_id=tmp_path)
