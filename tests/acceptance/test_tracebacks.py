"""For a caller's mistake, a traceback shows the caller's line and one error text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

LINES = 21
"""Of a whole report: arguments, the test's few lines, the error, its output."""
PACKAGE = f"{os.sep}pytest_dcp{os.sep}"
"""In the paths of the package's own frames, wherever the sessions have it installed."""
MISTAKES = {
    "test_missing_key": "CheckpointMismatchError: Missing key in checkpoint state_dict: other",
    "test_missing_key_in_ranks": "CheckpointMismatchError: Missing key in checkpoint state_dict",
    "test_damaged_file": "CheckpointCorruptError: expected a .metadata file",
    "test_state_of_another_kind": "state_dict must be a mapping of names to values, got list",
    "test_state_of_another_kind_in_the_background": "state_dict must be a mapping of names",
    "test_id_of_another_kind": "checkpoint_id must be a str or an os.PathLike, got int",
    "test_no_checkpoint": "no checkpoint in ",
    "test_worlds_of_none": "worlds(...) takes a size from 1 to 1024; got 0",
    "test_worlds_keyword": "worlds(...) has no keyword 'backnd'",
    "test_worlds_rank": "(): rank must be from 0 to 1, got 7",
    "test_world_rank": "(): rank must be from 0 to 1, got 7",
    "test_world_function": "there is no module 'no_such_package'",
    "test_inject": "did you mean 'write_data'",
    "test_inject_in_ranks": "did you mean 'write_data'",
    "test_never_fired": "never fired: ",
    "test_another_state": "w: 3 of 3 elements differ",
    "test_budget": "or a number; got 'many'",
    "test_law": "Missing key in checkpoint state_dict: other",
    "test_law_in_ranks": "Missing key in checkpoint state_dict: other",
}


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    suite = make_suite({"test_caller_errors.py": "caller_errors.py"})
    return suite.run("-p", "no:randomly")


@pytest.mark.parametrize("test", MISTAKES)
def test_a_mistake_of_the_caller_is_one_clear_text(session: SessionResult, test: str) -> None:
    text = session.bad(test).text
    assert len(text.splitlines()) <= LINES, text
    assert PACKAGE not in text
    assert "hook(item" not in text
    assert "contextlib.py" not in text
    assert "direct cause" not in text
    errors = [line for line in text.splitlines() if line.startswith("E  ")]
    assert sum(MISTAKES[test] in line for line in errors) == 1, text


def test_a_failure_in_the_background_shows_no_frame_of_the_package(session: SessionResult) -> None:
    text = session.bad("test_background").text
    assert PACKAGE not in text
    errors = [line for line in text.splitlines() if line.startswith("E  ")]
    assert sum("NotADirectoryError: " in line for line in errors) == 1, text


@pytest.mark.parametrize(
    ("test", "function", "said"),
    [
        ("test_missing_key_in_a_function", "save_and_load", "Missing key in checkpoint state_dict"),
        ("test_budget_in_a_function", "test_budget", "or a number; got 'many'"),
    ],
)
def test_a_mistake_in_a_function_of_worlds_shows_the_functions_line(
    session: SessionResult, test: str, function: str, said: str
) -> None:
    text = session.bad(test).text
    assert len(text.splitlines()) <= LINES, text
    assert text.count("Traceback (most recent call last)") == 1
    assert f"in {function}\n" in text
    assert PACKAGE not in text
    assert text.count(said) == 2  # the heading's, and the traceback's end


def test_a_failure_in_the_callers_planner_shows_the_callers_frames(session: SessionResult) -> None:
    text = session.bad("test_own_planner").text
    assert "return [].pop()" in text
    assert "IndexError: pop from empty list" in text
    assert PACKAGE not in text


def test_a_failure_in_the_callers_fixture_shows_the_callers_frames(session: SessionResult) -> None:
    text = session.phases("test_own_fixture")["teardown"].text
    assert re.search(r'^> +raise ValueError\("broken fixture"\)$', text, re.M)
    assert PACKAGE not in text
    assert "hook(item" not in text


def test_a_failure_in_a_library_shows_the_librarys_frames(session: SessionResult) -> None:
    assert "distributed_c10d.py" in session.bad("test_library").text


def test_a_bug_of_the_package_shows_all_that_led_to_it(session: SessionResult) -> None:
    text = session.bad("test_bug_of_ours").text
    assert PACKAGE in text
    assert "TypeError: " in text
    assert "Traceback (most recent call last)" in text


AT_COLLECTION = """
import pytest_dcp.checkpoint as dcp

reader = dcp.FileSystemReader("/nowhere", verify="nope")
"""


def test_a_mistake_at_collection_shows_the_callers_line_alone(make_suite: MakeSuite) -> None:
    session = make_suite({"test_mine.py": AT_COLLECTION}).run()
    assert "test_mine.py:4: in <module>" in session.output
    assert "E   ValueError: verify must be 'auto', 'full' or 'off', got 'nope'" in session.output
    assert PACKAGE not in session.output


PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import pytest_dcp.checkpoint as dcp

dcp.save({"w": torch.ones(3)}, checkpoint_id=sys.argv[1])
dcp.load({"other": torch.ones(3)}, checkpoint_id=sys.argv[1])
"""


def test_a_program_prints_its_own_line_and_the_text(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    first, *frames, last = ended.stderr.rstrip().splitlines()
    assert first == "Traceback (most recent call last):"
    assert frames == ['  File "<string>", line 8, in <module>']
    assert last.count("Missing key in checkpoint state_dict: other") == 1
