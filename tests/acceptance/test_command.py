"""The command `pytest-dcp`: its output, its JSON, its exit codes, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pytest_dcp.checkpoint as dcp
from pytest_dcp._cli import convert_command
from pytest_dcp._cli.main import main
from support.states import numbered, torch_dcp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


def state() -> dict[str, Any]:
    layers = [{"wq": numbered(40, 30)}, {"wq": numbered(6, 5, start=500)}]
    return {"model": {"layers": layers, "bias": torch.ones(3)}, "step": 7}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    dcp.save(state(), checkpoint_id=folder / "ours")
    torch_dcp.save(state(), checkpoint_id=folder / "torchs")
    changed = state()
    changed["model"]["layers"][0]["wq"][3, 4] += 0.5
    changed["model"]["bias"] = torch.ones(4)
    changed["new"] = torch.zeros(1)
    changed["step"] = 8
    dcp.save(changed, checkpoint_id=folder / "changed")
    return folder


class Command:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def run(self, *arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        output = self.capsys.readouterr()
        return code, output.out, output.err

    def read_json(self, *arguments: object, code: int = 0) -> Any:
        found, out, err = self.run(*arguments, "--json")
        assert (found, err) == (code, "")
        return json.loads(out)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


class TestList:
    def test_names_are_listed_with_their_facts(self, command: Command, samples: Path) -> None:
        code, out, _ = command.run("ls", samples / "ours")
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()] == [
            "name", "model.layers.0.wq", "model.layers.1.wq", "model.bias", "step",
        ]  # fmt: skip
        assert "float32  [40, 30]       1  4.7 KiB" in out

    def test_json_has_names_files_and_bytes(self, command: Command, samples: Path) -> None:
        found = command.read_json("ls", samples / "torchs")
        assert found["format"] == "dcp"
        assert found["files"] == ["__0_0.distcp"]
        assert found["names"][0] == {
            "name": "model.layers.0.wq", "kind": "tensor", "dtype": "float32",
            "shape": [40, 30], "shards": 1, "nbytes": 4800,
        }  # fmt: skip
        assert found["names"][-1]["kind"] == "value"

    def test_patterns_order_and_number(self, command: Command, samples: Path) -> None:
        found = command.read_json("ls", samples / "ours", "--glob", "*wq", "--sort", "name")
        assert [one["name"] for one in found["names"]] == ["model.layers.0.wq", "model.layers.1.wq"]
        found = command.read_json("ls", samples / "ours", "--sort", "size", "--top", "1")
        assert [one["name"] for one in found["names"]] == ["model.layers.0.wq"]

    def test_the_tree_sums_bytes(self, command: Command, samples: Path) -> None:
        _, out, _ = command.run("ls", samples / "ours", "--tree", "--glob", "model.layers.*")
        assert out.splitlines()[:3] == [
            "model  (4.8 KiB, 2 names)", "  layers  (4.8 KiB, 2 names)", "    0  (4.7 KiB)",
        ]  # fmt: skip

    def test_names_cannot_control_the_terminal(self, command: Command, tmp_path: Path) -> None:
        name = "\x1b[31mred[bold]\n\u202e"
        dcp.save({name: torch.ones(2)}, checkpoint_id=tmp_path)
        for arguments in (["ls", tmp_path], ["ls", tmp_path, "--tree"], ["show", tmp_path, name]):
            code, out, _ = command.run(*arguments)
            assert code == 0
            assert "\x1b" not in out
            assert "\u202e" not in out
            assert "\\x1b[31mred[bold]" in out


class TestShow:
    def test_a_tensor_with_its_layout_and_figures(self, command: Command, samples: Path) -> None:
        code, out, _ = command.run("show", samples / "ours", "model.layers.0.wq")
        assert code == 0
        assert "torch.float32 of (40, 30)" in out
        assert "A" * 30 in out
        assert "histogram" in out
        found = command.read_json("show", samples / "ours", "model.layers.0.wq")
        assert found["statistics"]["maximum"] == 1200
        assert found["layout"][0]["shape"] == [40, 30]

    def test_a_value(self, command: Command, samples: Path) -> None:
        assert command.run("show", samples / "ours", "step") == (0, "step: 7\n", "")
        assert command.read_json("show", samples / "ours", "step")["value"] == "7"


class TestVerify:
    def test_whole_checkpoints(self, command: Command, samples: Path, tmp_path: Path) -> None:
        code, out, _ = command.run("verify", samples / "ours")
        assert (code, "whole" in out, "without checksums" in out) == (0, True, False)
        assert command.read_json("verify", samples / "torchs")["unchecked"] == 4
        torch.save(state(), tmp_path / "state.pt")
        assert command.read_json("verify", tmp_path / "state.pt")["unchecked"] == 0

    def test_damage_is_named_and_gives_code_1(
        self, command: Command, samples: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(samples / "ours", tmp_path / "step")
        (data,) = (tmp_path / "step").glob("*.distcp")
        content = bytearray(data.read_bytes())
        content[len(content) // 3] ^= 1
        data.write_bytes(content)
        (tmp_path / "step/__9_9-0123456789ab.distcp").write_bytes(b"left over")
        code, out, _ = command.run("verify", tmp_path / "step")
        assert code == 1
        assert "model.layers.0.wq: the checksum differs" in out
        assert "__9_9-0123456789ab.distcp: a file that the checkpoint does not name" in out
        data.unlink()
        found = command.read_json("verify", tmp_path / "step", code=1)
        assert found["missing_files"] == [data.name]
        assert len(found["problems"]) == 5  # the file, and four names


class TestDiff:
    def test_equal_checkpoints_are_compared_without_reading(
        self, command: Command, samples: Path
    ) -> None:
        found = command.read_json("diff", samples / "ours", samples / "ours", "--checksums")
        assert (found["equal_by_checksums"], found["bytes_read"]) == (4, 0)

    def test_checkpoints_without_checksums_are_read(self, command: Command, samples: Path) -> None:
        found = command.read_json("diff", samples / "ours", samples / "torchs")
        assert (found["equal_by_checksums"], found["equal_by_reading"]) == (0, 4)
        code, out, _ = command.run("diff", samples / "ours", samples / "torchs", "--checksums")
        assert (code, out.count("unknown without reading")) == (1, 4)

    def test_differences_are_named_and_give_code_1(self, command: Command, samples: Path) -> None:
        code, out, _ = command.run("diff", samples / "ours", samples / "changed")
        assert code == 1
        assert out.splitlines() == [
            "only in the second: new",
            "model.layers.0.wq: 1 element differs, by at most 0.5",
            "model.bias: shape (3,), (4,)",
            "step: value 7, 8",
            "1 names equal, 3 differ",
        ]

    def test_nan_equals_itself_and_zeros_have_signs(self, command: Command, tmp_path: Path) -> None:
        for name, zero in (("a", 0.0), ("b", -0.0)):
            tensors = {
                "w": torch.tensor([zero, float("nan"), float("inf")]),
                "c": torch.tensor([complex(float("nan"), 1.0)], dtype=torch.complex128),
            }
            torch_dcp.save(tensors, checkpoint_id=tmp_path / name)
        found = command.read_json("diff", tmp_path / "a", tmp_path / "b", code=1)
        assert found["equal_by_reading"] == 1
        (one,) = found["differing"]
        assert (one["name"], one["elements"], one["largest"]) == ("w", 1, 0.0)


class TestConvert:
    def test_the_name_of_the_target_shows_the_format(
        self, command: Command, samples: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "a.safetensors"
        options = ["--skip-values", "--rename", "model.=", "--dtype", "bfloat16"]
        found = command.read_json("convert", samples / "ours", target, *options)
        assert (found["tensors"], found["left_out"]) == (3, ["step"])
        assert load_file(target)["layers.0.wq"].dtype is torch.bfloat16
        assert command.run("convert", target, tmp_path / "b.pt", "--include", "bias")[0] == 0
        assert torch.load(tmp_path / "b.pt").keys() == {"bias"}
        assert command.run("convert", tmp_path / "b.pt", tmp_path / "c", "--to", "dcp")[0] == 0
        assert command.run("ls", tmp_path / "c")[1].count("\n") == 2

    @pytest.mark.parametrize("target", ["a.safetensors", "folder", "b.pt", "dcp"])
    def test_every_tensor_moves_the_bar(
        self,
        command: Command,
        samples: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        target: str,
    ) -> None:
        bars: list[tuple[int, bool, list[str]]] = []

        @contextmanager
        def show(title: str, total: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
            names: list[str] = []
            bars.append((total, quiet, names))
            yield names.append

        monkeypatch.setattr(convert_command, "show_progress", show)
        format = {"folder": ["--to", "safetensors"], "dcp": ["--to", "dcp"]}.get(target, [])
        options = [*format, "--include", "model.*", "--exclude", "*.1.wq"]
        assert command.run("convert", samples / "ours", tmp_path / target, *options)[0] == 0
        options += ["--json", "--rename", "model.="]
        assert command.run("convert", samples / "ours", tmp_path / target, *options)[0] == 0
        tensors = ["bias", "layers.0.wq"]
        assert [(total, quiet, sorted(names)) for total, quiet, names in bars] == [
            (2, False, [f"model.{name}" for name in tensors]),
            (2, True, tensors),
        ]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["ls", "none"], "no checkpoint in none"),
            (["show", "SAMPLE", "modl.bias"], "nearest: 'model.bias'"),
            (
                ["convert", "SAMPLE", "x.pt", "--processes", "2"],
                "--processes is not for",
            ),
            (["convert", "SAMPLE", "x.pt", "--storage-option", "anon=true"], "is on a local disk"),
            (["convert", "SAMPLE", "memory://x/y.pt", "--storage-option", "no"], "KEY=VALUE"),
            (["convert", "SAMPLE", "x"], "name it with --to"),
            (["convert", "SAMPLE", "x.safetensors"], "hold tensors only"),
            (["convert", "SAMPLE", "x.pt", "--rename", "model"], "--rename takes OLD=NEW"),
            (["convert", "SAMPLE", "x.pt", "--dtype", "float"], ""),
            (["convert", "SAMPLE", "x.pt", "--dtype", "nonsense"], "name of a dtype of torch"),
            (["convert", "SAMPLE", "x.pt", "--include", "no.*"], "match nothing"),
            (["convert", "SAMPLE", "no/folder/x.pt"], "folder is missing"),
            (["diff", "SAMPLE", "s9000://x/y"], "s9000"),
            (["ls", "SAMPLE", "--storage-option", "anon=true"], "is on a local disk"),
            (["ls", "SAMPLE", "--storage-option", "anon"], "takes KEY=VALUE, got 'anon'"),
            (["ls", "memory://x", *["--storage-option=max_paths=1"] * 2], "given twice"),
            (["ls", "memory://x", "--storage-option=anon=1"], "does not know the storage option"),
        ],
    )
    def test_one_line_on_stderr_and_code_2(
        self,
        command: Command,
        samples: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        words: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        given = [str(samples / "ours") if one == "SAMPLE" else one for one in arguments]
        code, out, err = command.run(*given)
        if words:
            assert (code, out) == (2, "")
            assert err.startswith("pytest-dcp: ")
            assert err.count("\n") == 1
            assert words in err
            assert list(tmp_path.iterdir()) == []
        else:
            assert (code, err) == (0, "")

    def test_unknown_commands_and_options_give_code_2(self, command: Command) -> None:
        assert command.run("nonsense")[0] == 2
        assert command.run("ls", "--nonsense")[0] == 2
        assert command.run("--help")[0] == 0

    def test_without_the_extra_only_run_works(
        self, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "typer", None)
        monkeypatch.delitem(sys.modules, "pytest_dcp._cli.commands", raising=False)
        code, _, err = command.run("ls", "x")
        assert code == 2
        assert 'pip install "pytest-dcp[cli]"' in err


def test_the_module_is_the_command(samples: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "pytest_dcp", *map(str, arguments)]
        return subprocess.run(
            program, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
        )

    done = run("diff", samples / "ours", samples / "changed")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.endswith("1 names equal, 3 differ\n")
    (tmp_path / "program.py").write_text("import sys; print(sys.argv[1:])")
    assert run("run", "program.py", "--json").stdout == "['--json']\n"


def test_a_terminal_that_lacks_characters_gets_escapes(tmp_path: Path) -> None:
    dcp.save({"modèle": torch.arange(8.0)}, checkpoint_id=tmp_path / "c")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for words in (["ls"], ["ls", "--tree"], ["show", "modèle"], ["verify"]):
        program = [sys.executable, "-m", "pytest_dcp", words[0], str(tmp_path / "c"), *words[1:]]
        done = subprocess.run(
            program, capture_output=True, timeout=120, env=environment, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        if words[0] != "verify":
            assert rb"mod\xe8le" in done.stdout
        if words[0] == "show":
            assert b"histogram  |#" in done.stdout


def test_an_interrupt_amid_the_imports_prints_nothing(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGINT); raise ImportError('half')"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest_dcp", "ls", "x"],
        capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_the_folder_of_a_run_is_named_with_its_steps(command: Command, samples: Path) -> None:
    code, _, err = command.run("ls", samples)
    assert code == 2
    assert "it has folders (changed, ours, torchs): open one of them" in err


def test_a_reader_that_stops_early_is_no_error(samples: Path, tmp_path: Path) -> None:
    """As in `pytest-dcp ls ... | head -1`."""
    dcp.save({f"w{n}": torch.ones(1) for n in range(3000)}, checkpoint_id=tmp_path / "many")
    program = [sys.executable, "-m", "pytest_dcp", "ls", str(tmp_path / "many"), "--json"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.readline()
        command.stdout.close()
        assert command.stderr.read() == b""
        command.wait(120)
