"""The engine where Linux's own calls are hidden, under the names of macOS and Windows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent

import pytest

from support import other_system

SYSTEMS = ("darwin", "win32")
PROGRAM = Path(other_system.__file__)
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", str(PROGRAM), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Of a world or of torchrun, where the tests themselves run in one.
        env={
            name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
        },
    )


def outputs_of(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Their outputs; none outlives the call."""
    try:
        return [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("system", SYSTEMS)
def test_one_process_imports_saves_and_loads(system: str, tmp_path: Path) -> None:
    process = start(system, tmp_path)
    (output,) = outputs_of([process])
    assert output.splitlines()[-1:] == ["used"], output
    assert process.returncode == 0


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_ranks_save_and_load(system: str, tmp_path: Path) -> None:
    processes = [start(system, tmp_path, rank) for rank in range(2)]
    for output in outputs_of(processes):
        assert output.splitlines()[-1:] == ["used"], output


SUITE = """
    import pytest

    def test_plain():
        pass

    @pytest.mark.world_size(2)
    def test_marked():
        pass

    @pytest.mark.world_size([2, 3])
    def test_each_size():
        pass

    def test_with_fixture(worlds):
        pass
"""
HIDING = """
    from support import other_system

    other_system.become({system!r})
"""


@pytest.mark.parametrize("system", SYSTEMS)
def test_worlds_are_refused_in_one_sentence_and_other_tests_run(
    system: str, tmp_path: Path
) -> None:
    (tmp_path / "hiding.py").write_text(dedent(HIDING.format(system=system)))
    (tmp_path / "test_suite.py").write_text(dedent(SUITE))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join(map(str, (tmp_path, PROGRAM.parent.parent)))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "hiding", "-p", "pytest_dcp", "-q", "-s",
         "-p", "no:cacheprovider", "-p", "no:randomly", "test_suite.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert "1 passed, 4 errors" in run.stdout, run.stdout + run.stderr
    sentence = f"worlds need Linux (memfds, parent-death signals, /proc), and this is {system}"
    assert run.stdout.count(f"\n{sentence}") == 4
    assert "Traceback" not in run.stdout + run.stderr
