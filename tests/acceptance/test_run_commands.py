"""`pytest-dcp latest`, `steps`, `prune` and `gc`: the steps of a run, from a shell."""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_dcp._cli.main import main
from support.runs import manager_of, save_steps, state_of, whole_steps

pytestmark = pytest.mark.filterwarnings("ignore:step .* is not whole")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(list(map(str, arguments)))
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def ask(command: Command, *arguments: object, code: int = 0) -> Any:
    found, out, err = command(*arguments, "--json")
    assert (found, err) == (code, "")
    return json.loads(out)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 10, 20, 30 and 40 with metrics; of 40 a data file is missing."""
    root = tmp_path / "run"
    with manager_of(root) as manager:
        for step in (10, 20, 30, 40):
            manager.save(step, state_of(step), metrics={"loss": abs(step - 12)})
    next((root / "step-00000040").glob("*.distcp")).unlink()
    return root


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def crash_while_saving(root: Path, step: int) -> None:
    """The folder of a save that has not committed."""
    save_steps(root, step).close()
    (root / f"step-{step:08d}" / ".metadata").unlink()


# latest


def test_latest_prints_the_newest_whole_step(command: Command, root: Path) -> None:
    code, out, _ = command("latest", root)
    first, last = out.splitlines()
    assert code == 0
    assert first.startswith("step-00000040: passed over: __0_0-")
    assert last == str(root / "step-00000030")


def test_latest_as_json(command: Command, root: Path) -> None:
    found = ask(command, "latest", root, "--check", "checksums")
    assert found["latest"]["number"] == 30
    assert found["latest"]["metrics"] == {"loss": 18.0}
    assert found["latest"]["checked"] == "checksums"
    assert found["latest"]["folder"] == str(root / "step-00000030")
    assert list(found["passed_over"]) == ["40"]


def test_latest_of_a_run_without_steps_ends_with_1(command: Command, tmp_path: Path) -> None:
    assert command("latest", tmp_path) == (1, "no step\n", "")
    assert ask(command, "latest", tmp_path, code=1)["latest"] is None


@pytest.mark.parametrize("name", ["latest", "steps", "gc", "prune"])
def test_a_folder_that_does_not_exist_is_refused(
    command: Command, tmp_path: Path, name: str
) -> None:
    more = ["--keep-last", 1] if name == "prune" else []
    code, _, err = command(name, tmp_path / "rum", *more)
    assert code == 2
    assert "rum is no folder" in err
    assert not (tmp_path / "rum").exists()


# steps


def test_steps_lists_all_with_the_test_that_each_passed(command: Command, root: Path) -> None:
    code, out, _ = command("steps", root)
    assert code == 1  # step 40
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [f"step-000000{n}0" for n in range(1, 5)]
    assert "loss 2" in lines[1]
    assert lines[1].rstrip().endswith("whole, by sizes")
    assert lines[4].rstrip().endswith("is missing")


@pytest.mark.parametrize(("check", "code"), [("names", 0), ("sizes", 1), ("checksums", 1)])
def test_steps_are_looked_at_as_closely_as_asked(
    command: Command, root: Path, check: str, code: int
) -> None:
    found = ask(command, "steps", root, "--check", check, code=code)["steps"]
    assert [step["checked"] for step in found] == [check] * 3 + [None if code else check]
    assert [step["is_whole"] for step in found] == [True] * 3 + [not code]


# prune


def test_prune_keeps_by_the_rules(command: Command, root: Path) -> None:
    options = ["--keep-last", 1, "--best", "loss:min:1"]
    dry = ask(command, "prune", root, *options, "--dry-run")
    assert (dry["removed"], dry["dry_run"]) == ([20], True)
    assert len(folders(root)) == 4
    assert ask(command, "prune", root, *options)["removed"] == [20]
    assert folders(root) == ["step-00000010", "step-00000030", "step-00000040"]
    code, out, _ = command("prune", root, "--keep-last", 1, "--keep-every", 15)
    assert (code, out) == (0, "step-00000010\n1 steps removed\n")
    assert folders(root) == ["step-00000030", "step-00000040"]  # the damaged one is not counted


def test_prune_never_removes_the_last_whole_step(command: Command, root: Path) -> None:
    ask(command, "prune", root, "--keep-last", 1)
    assert ask(command, "prune", root, "--keep-last", 1)["removed"] == []
    assert ask(command, "latest", root)["latest"]["number"] == 30


@pytest.mark.parametrize("best", ["loss", "loss:least:2", ":min:2", "loss:min:x", "loss:min:0"])
def test_prune_refuses_wrong_rules(command: Command, root: Path, best: str) -> None:
    code, _, err = command("prune", root, "--keep-last", 1, "--best", best)
    assert code == 2
    assert "best" in err
    assert len(folders(root)) == 4


# gc


def test_gc_removes_the_rest_of_crashed_saves_and_removals(
    command: Command, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    save_steps(root, 1, 2).close()
    crash_while_saving(root, 3)
    crash_while_saving(root, 4)
    (root / "step-00000004" / "removal.json").write_text('{"files": []}')
    (root / "latest.json.tmp").write_text("{")
    expected = ["step-00000003", "step-00000004", "latest.json.tmp"]
    dry = ask(command, "gc", root, "--dry-run")
    assert [one["name"] for one in dry["removed"]] == expected
    assert [one["kind"] for one in dry["removed"]] == ["save", "removal", "file"]
    assert dry["nbytes"] > 0
    assert folders(root) == [f"step-0000000{n}" for n in range(1, 5)]
    done = ask(command, "gc", root)
    assert (done["removed"], done["nbytes"]) == (dry["removed"], dry["nbytes"])
    assert folders(root) == ["step-00000001", "step-00000002"]
    assert command("gc", root) == (0, "0 leftovers, 0 B, removed\n", "")
    assert whole_steps(manager_of(root)) == [1, 2]


def test_gc_removes_the_notes_of_a_removal_that_a_crash_kept_from_beginning(
    command: Command, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    save_steps(root, 1, 2).close()
    names = ["step-00000001/removal.json", "step-00000001/removal.json.tmp"]
    for name in names:
        (root / name).write_text("{}")
    (root / "step-00000001" / "mine.json.tmp").write_text("mine")
    removed = ask(command, "gc", root)["removed"]
    assert removed == [{"name": name, "kind": "file", "nbytes": 2} for name in names]
    left = {path.name for path in (root / "step-00000001").iterdir()}
    assert {".metadata", "step.json", "mine.json.tmp"} < left
    assert not {"removal.json", "removal.json.tmp"} & left
    assert whole_steps(manager_of(root)) == [1, 2]


def test_gc_leaves_folders_with_an_index_and_strangers_alone(command: Command, root: Path) -> None:
    crash_while_saving(root, 50)
    (root / "step-00000050" / "notes.txt").write_text("mine")
    (root / "step-00000060").mkdir()
    (root / "step-00000060" / "__0.metadata").write_text("the index of a rank")
    (root / "logs").mkdir()
    before = sorted(root.rglob("*"))
    assert ask(command, "gc", root, "--quarantined")["removed"] == []
    assert [path for path in sorted(root.rglob("*")) if path.name != ".steps.lock"] == [
        path for path in before if path.name != ".steps.lock"
    ]


def test_gc_of_a_run_without_a_whole_step_removes_nothing(command: Command, tmp_path: Path) -> None:
    root = tmp_path / "run"
    crash_while_saving(root, 3)
    assert ask(command, "gc", root)["removed"] == []
    assert folders(root) == ["step-00000003"]


def test_gc_removes_quarantined_folders_on_request(command: Command, tmp_path: Path) -> None:
    root = tmp_path / "run"
    save_steps(root, 1).close()
    crash_while_saving(root, 2)
    save_steps(root, 2).close()
    (root / "not-whole" / "mine").mkdir()
    (aside,) = (root / "not-whole").glob("step-*")
    assert ask(command, "gc", root)["removed"] == []
    (found,) = ask(command, "gc", root, "--quarantined")["removed"]
    assert (found["name"], found["kind"]) == (f"not-whole/{aside.name}", "quarantined")
    assert [path.name for path in (root / "not-whole").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["gc", "prune"])
def test_a_run_in_which_a_job_saves_is_refused(command: Command, root: Path, name: str) -> None:
    more = ["--keep-last", 1] if name == "prune" else []
    with manager_of(root) as manager:
        manager.save(50, state_of(50))
        code, _, err = command(name, root, *more)
        assert code == 2
        assert "another run saves in" in err
        assert command(name, root, *more, "--dry-run")[0] == 0
    assert command(name, root, *more)[0] == 0


@pytest.mark.parametrize("name", ["prune", "gc"])
def test_a_folder_without_locks_needs_a_word_that_no_job_saves(
    command: Command, root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    arguments = [name, root, *(["--keep-last", 1] if name == "prune" else [])]
    before = folders(root)
    code, _, error = command(*arguments)
    assert (code, folders(root)) == (2, before)
    assert "has no lock: pass --idle if you know that no job saves in it" in error
    assert command(*arguments, "--idle")[0] == 0


def test_a_url_needs_a_word_that_no_job_saves(command: Command, tmp_path: Path) -> None:
    url = f"memory://commands-{tmp_path.name}"
    save_steps(url, 1, 2, 3).close()
    code, _, err = command("prune", url, "--keep-last", 1)
    assert code == 2
    assert "pass --idle if you know that no job saves in it" in err
    assert ask(command, "prune", url, "--keep-last", 1, "--idle")["removed"] == [1, 2]
    assert ask(command, "gc", url, "--idle", "--quarantined")["removed"] == []
    assert ask(command, "latest", url)["latest"]["number"] == 3
