"""The progress of a save and a load, as a user sees it."""

from __future__ import annotations

import builtins
import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io.progress_observer import Progress
from pytest_dcp._engine.verbs.progress_bar import progress_bar

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_the_bar_ends_full_for_a_save_and_a_load(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1 << 18)}
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress_bar(console=screen) as bar:
        dcp.save(state, checkpoint_id=tmp_path, progress=bar)
        dcp.load(state, checkpoint_id=tmp_path, progress=bar)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.file.getvalue())  # type: ignore[attr-defined]  # StringIO
    last = shown.splitlines()[-2:]
    assert "save, rank 0" in last[0]
    assert "load, rank 0" in last[1]
    assert all("1.0/1.0 MB" in line for line in last)


def test_the_bar_is_shown_without_a_block_of_its_own(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1 << 18)}
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    bar = progress_bar(console=screen)
    dcp.save(state, checkpoint_id=tmp_path, progress=bar)
    dcp.load(state, checkpoint_id=tmp_path, progress=bar)
    text = screen.file.getvalue()  # type: ignore[attr-defined]  # StringIO
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    for operation in ("save", "load"):
        assert re.search(rf"{operation}, rank 0 .* 1\.0/1\.0 MB", shown)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0, "the cursor stays hidden"


def test_the_bar_ends_when_the_work_fails(tmp_path: Path) -> None:
    state = {"w": torch.zeros(1 << 18)}
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    dcp.save(state, checkpoint_id=tmp_path)
    for file in tmp_path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(dcp.CheckpointException, match="ends here"):
        dcp.load(state, checkpoint_id=tmp_path, progress=progress_bar(console=screen))
    text = screen.file.getvalue()  # type: ignore[attr-defined]  # StringIO
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0


def test_a_bar_in_a_block_shows_each_save_anew(tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    with progress_bar(console=screen) as bar:
        for size in (1 << 18, 1 << 19):
            dcp.save({"w": torch.zeros(size)}, checkpoint_id=tmp_path / str(size), progress=bar)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.file.getvalue())  # type: ignore[attr-defined]  # StringIO
    last = shown.splitlines()[-2:]
    assert "1.0/1.0 MB" in last[0]
    assert "2.1/2.1 MB" in last[1]


def test_an_argument_that_cannot_be_called_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="progress takes a function of a Progress; got True"):
        dcp.save({"w": torch.zeros(1)}, checkpoint_id=tmp_path, progress=True)  # type: ignore[arg-type]  # that is the mistake


def test_only_the_chosen_rank_shows_a_bar() -> None:
    screen = Console(file=io.StringIO(), width=120)
    with progress_bar(rank=1, console=screen) as bar:
        bar(Progress("save", 0, 1, 2))
    assert "save" not in screen.file.getvalue()  # type: ignore[attr-defined]  # StringIO


def test_the_error_for_a_missing_rich_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = builtins.__import__

    def without_rich(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return found(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    with pytest.raises(ImportError, match=r"pip install 'pytest-dcp\[progress\]'"), progress_bar():
        pass


def test_each_phase_is_logged_with_its_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"w": torch.zeros(1000)}
    with caplog.at_level(logging.INFO, logger="pytest_dcp.checkpoint"):
        dcp.save(state, checkpoint_id=tmp_path)
        dcp.load(state, checkpoint_id=tmp_path)
    saved, loaded = caplog.messages
    time = r"\d+\.\d ms"
    assert re.search(rf"rank 0: saved .*: 0\.004 MB in {time} ", saved)
    assert re.search(rf"\(plan {time}, write {time}, commit {time}\)", saved)
    assert re.search(rf"\(plan {time}, read {time}\), 4000 bytes read, 4000 verified", loaded)
