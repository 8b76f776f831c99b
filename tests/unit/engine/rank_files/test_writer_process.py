"""The process that writes one rank's files: what it does, fails at, and how it ends."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_dcp._engine.rank_files.builder import default_writer_init_fn
from pytest_dcp.checkpoint._experimental import (
    AsyncCheckpointer,
    CheckpointReader,
    CheckpointStagerConfig,
    CheckpointWriter,
    CheckpointWriterConfig,
    DefaultStager,
    RankInfo,
    make_async_checkpointer,
)
from pytest_dcp.checkpoint._experimental.checkpoint_process import (
    CheckpointProcess,
    CheckpointProcessConfig,
)

RANK = RankInfo(global_rank=0, global_world_size=1)
WAIT_S = 180.0


class Scripted(CheckpointWriter):
    """Does what the state says before it writes."""

    def __init__(self, rank_info: RankInfo, notes: str) -> None:
        super().__init__(CheckpointWriterConfig(), rank_info)
        self.notes = Path(notes)

    def write(self, path: str, state_dict: dict[str, Any], **kwargs: Any) -> Any:
        what = state_dict.get("do")
        if what == "fail":
            raise KeyError("no such thing")
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while what == "wait" and not (self.notes / "go").exists():
            time.sleep(0.01)
        super().write(path, state_dict, **kwargs)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def close(self) -> None:
        (self.notes / "closed").touch()


def note_start(folder: str) -> None:
    (Path(folder) / "initialized").touch()


def fail_to_start(*_: Any) -> None:
    raise ValueError("cannot be initialized")


def hang(*_: Any) -> None:
    time.sleep(3600)


def started(folder: Path, **other: Any) -> CheckpointProcess:
    options: dict[str, Any] = {
        "rank_info": RANK,
        "config": CheckpointProcessConfig(subprocess_init_timeout_secs=120),
        "subprocess_init_fn": note_start,
        "subprocess_init_args": (str(folder),),
        "checkpoint_writer_init_fn": Scripted,
        "checkpoint_writer_init_args": {"notes": str(folder)},
    }
    return CheckpointProcess(**(options | other))


def load(path: Path) -> dict[str, Any]:
    return CheckpointReader(RANK).read(str(path))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes")


@pytest.fixture(scope="module")
def process(folder: Path) -> Iterator[CheckpointProcess]:
    made = started(folder)
    yield made
    made.close()


def test_it_writes_the_received_state_and_ties_stay(
    process: CheckpointProcess, folder: Path, tmp_path: Path
) -> None:
    weight = torch.arange(6.0)
    state = {
        "w": weight, "tied": weight, "part": weight[2:], "0-d": torch.tensor(1),
        "empty": torch.empty(0, 2), "p": torch.nn.Parameter(torch.ones(2)), "n": {"step": 3},
    }  # fmt: skip
    process.write(state, str(tmp_path)).result(WAIT_S)
    loaded = load(tmp_path)
    assert all(torch.equal(loaded[k], state[k]) for k in state if k != "n")
    assert loaded["n"] == {"step": 3}
    assert loaded["tied"].data_ptr() == loaded["w"].data_ptr()
    # Each storage once: six floats are 24 bytes.
    assert loaded["w"].untyped_storage().nbytes() == 24
    assert (folder / "initialized").exists()


def test_a_future_of_a_state_is_waited_for_and_its_error_is_the_writes(
    process: CheckpointProcess, tmp_path: Path
) -> None:
    staged: Future[Any] = Future()
    first = process.write(staged, str(tmp_path / "1"))
    second = process.write({"n": 2}, str(tmp_path / "2"))
    assert not first.done()
    staged.set_result({"n": 1})
    first.result(WAIT_S)
    second.result(WAIT_S)
    assert (load(tmp_path / "1"), load(tmp_path / "2")) == ({"n": 1}, {"n": 2})
    unstaged: Future[Any] = Future()
    unstaged.set_exception(MemoryError("no room to stage"))
    with pytest.raises(MemoryError, match="no room to stage"):
        process.write(unstaged, str(tmp_path / "3")).result(WAIT_S)


def test_an_error_of_the_writer_is_the_writes_and_the_process_goes_on(
    process: CheckpointProcess, tmp_path: Path
) -> None:
    pid = process.process.process.pid  # type: ignore[union-attr]  # it has been started
    with pytest.raises(RuntimeError, match=r"Unexpected response from worker process: .*no such"):
        process.write({"do": "fail"}, str(tmp_path)).result(WAIT_S)
    process.write({"n": 1}, str(tmp_path)).result(WAIT_S)
    assert load(tmp_path) == {"n": 1}
    assert process.process.process.pid == pid  # type: ignore[union-attr]


def test_a_value_that_cannot_be_sent_fails_its_write_alone(
    process: CheckpointProcess, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="pickle"):
        process.write({"lock": threading.Lock()}, str(tmp_path)).result(WAIT_S)
    process.write({"n": 1}, str(tmp_path)).result(WAIT_S)


def test_two_saves_of_an_async_checkpointer_follow_one_another(
    process: CheckpointProcess, tmp_path: Path
) -> None:
    """The second waits for the first, whose state it does not touch; so does training's next."""
    stager = DefaultStager(CheckpointStagerConfig())
    checkpointer = AsyncCheckpointer(stager, process, CheckpointReader(RANK))
    weight = torch.zeros(5000)
    futures = []
    for n in range(3):
        weight.fill_(n)
        staging, writing = checkpointer.save(str(tmp_path / str(n)), {"w": weight})
        assert staging.result(WAIT_S) is None
        futures.append(writing)
    weight.fill_(-1)
    for n, writing in enumerate(futures):
        assert writing.result(WAIT_S) is None
        assert torch.equal(checkpointer.load(str(tmp_path / str(n)))["w"], torch.full((5000,), n))
    _, failing = checkpointer.save(str(tmp_path / "3"), {"do": "fail"})
    with pytest.raises(RuntimeError, match="no such thing"):
        checkpointer.save(str(tmp_path / "4"), {"n": 4})
    assert failing.exception(WAIT_S) is not None
    checkpointer.save(str(tmp_path / "5"), {"n": 5})[1].result(WAIT_S)
    assert checkpointer.load(str(tmp_path / "5")) == {"n": 5}
    stager.close()


def test_closing_ends_the_write_under_way_and_cancels_the_others(tmp_path: Path) -> None:
    """Also when an interrupt comes while it waits: it is raised after that."""
    made = started(tmp_path)
    under_way = made.write({"do": "wait"}, str(tmp_path / "1"))
    waiting = made.write({"n": 2}, str(tmp_path / "2"))
    while not under_way.running():
        time.sleep(0.01)
    pid = made.process.process.pid  # type: ignore[union-attr]  # it has been started

    def interrupt() -> None:
        with pytest.raises(CancelledError):  # So it is closing.
            waiting.result(WAIT_S)
        os.kill(os.getpid(), signal.SIGINT)
        (tmp_path / "go").touch()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        made.close()
    thread.join(WAIT_S)
    assert under_way.result(0) is None
    assert load(tmp_path / "1") == {"do": "wait"}
    assert (tmp_path / "closed").exists()
    assert not (tmp_path / "2").exists()
    assert_gone(pid)
    made.close()
    with pytest.raises(RuntimeError, match="is closed"):
        made.write({}, str(tmp_path))


def test_a_process_that_is_killed_fails_its_writes_and_closes_in_peace(tmp_path: Path) -> None:
    made = started(tmp_path)
    (tmp_path / "kept").mkdir()
    made.write({"n": 1}, str(tmp_path / "kept")).result(WAIT_S)
    pid = made.process.process.pid  # type: ignore[union-attr]
    dying = made.write({"do": "die"}, str(tmp_path / "kept"))
    after = made.write({"n": 2}, str(tmp_path / "kept"))
    with pytest.raises(RuntimeError, match=r"Child process terminated unexpectedly: .*SIGKILL"):
        dying.result(WAIT_S)
    with pytest.raises(RuntimeError, match="Child process terminated unexpectedly"):
        after.result(WAIT_S)
    made.close()
    assert load(tmp_path / "kept") == {"n": 1}
    assert_gone(pid)


def test_a_process_that_cannot_start_says_why_at_the_first_write(tmp_path: Path) -> None:
    broken = started(tmp_path, subprocess_init_fn=fail_to_start)
    hanging = started(
        tmp_path,
        subprocess_init_fn=hang,
        config=CheckpointProcessConfig(subprocess_init_timeout_secs=1),
    )
    with pytest.raises(RuntimeError, match="cannot be initialized"):
        broken.write({"n": 1}, str(tmp_path))
    with pytest.raises(TimeoutError, match="Timed out after 1s waiting for checkpoint subprocess"):
        hanging.write({"n": 1}, str(tmp_path))
    broken.close()
    hanging.close()


def test_one_that_is_forgotten_ends(tmp_path: Path) -> None:
    made = make_async_checkpointer(checkpoint_writer_init_fn=default_writer_init_fn)
    _, writing = made.save(str(tmp_path), {"n": 1})
    writing.result(WAIT_S)
    held: Any = made._checkpoint_process
    pid = held.process.process.pid
    del made, held
    gc.collect()
    assert_gone(pid)


def assert_gone(pid: int) -> None:
    """Also that it is no zombie: it has been waited for."""
    deadline_s = time.monotonic() + WAIT_S
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
