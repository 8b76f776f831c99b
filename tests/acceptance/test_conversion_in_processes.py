"""Conversions in several processes: their results, deaths of a process, interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine import operating_system
from pytest_dcp._engine.background.saver_process import SaverProcess
from pytest_dcp._engine.conversion import worker_processes
from pytest_dcp._engine.conversion.worker_processes import SourceToOpen, choose_processes
from pytest_dcp.checkpoint import convert
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointReplacedError,
    SaverProcessError,
)
from support.states import numbered

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.skipif(
        not operating_system.has_saver_processes(), reason="such processes need Linux"
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tensors = {f"w{n}": numbered(300, 10, start=n) for n in range(9)}
    dcp.save({"net": {**tensors, "empty": torch.empty(0, 3)}, "step": 7}, checkpoint_id=folder)
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    with dcp.open(folder) as opened:
        return opened.read(list(opened))


def test_two_processes_write_the_files_that_one_writes(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "include": "net.*",
        "rename": lambda name: name.removeprefix("net."),
        "dtype": torch.float64,
        "max_file_bytes": 50_000,
        "metadata": {"made": "by a test"},
    }
    reports, names = [], []
    for processes in (1, 2):
        seen: list[str] = []
        names.append(seen)
        target = tmp_path / str(processes)
        reports.append(
            convert.to_safetensors(
                source, target, processes=processes, report=seen.append, **options
            )
        )
    one, two = (read_all(tmp_path / name) for name in ("1", "2"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    sizes = [sorted((f.name, f.stat().st_size) for f in (tmp_path / n).iterdir()) for n in "12"]
    assert sizes[0] == sizes[1]
    assert len(sizes[0]) == 6
    assert reports[0] == reports[1]
    assert sorted(names[1]) == sorted(one)


def test_a_process_that_is_killed_is_named_and_the_target_stays(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.to_safetensors(source, tmp_path / "folder", include="net.w0")
    before = {file.name: file.read_bytes() for file in (tmp_path / "folder").iterdir()}
    processes: list[SaverProcess] = []
    ask = SaverProcess.ask

    def kill_first(line: SaverProcess, *order: Any, **options: Any) -> Any:
        processes.append(line)
        if len(processes) == 1:
            os.kill(line.process.pid, signal.SIGKILL)
        return ask(line, *order, **options)

    monkeypatch.setattr(SaverProcess, "ask", kill_first)
    with pytest.raises(SaverProcessError, match=r"was killed by SIGKILL.*lack of memory"):
        convert.to_safetensors(
            source, tmp_path / "folder", include="net.*", max_file_bytes=20_000, processes=2
        )
    assert {f.name: f.read_bytes() for f in (tmp_path / "folder").iterdir()} == before
    assert all(line.process.poll() is not None for line in processes)


def test_two_processes_save_the_checkpoint_that_one_saves(source: Path, tmp_path: Path) -> None:
    reports, names = [], []
    for processes in (1, 2):
        seen: list[str] = []
        target = tmp_path / str(processes)
        reports.append(
            convert.to_dcp(
                source, target, processes=processes, dtype=torch.bfloat16, report=seen.append
            )
        )
        names.append(sorted(seen))
    one, two = (dcp.load_without_template(checkpoint_id=tmp_path / name) for name in ("1", "2"))
    assert one["step"] == two["step"] == 7
    assert one["net"].keys() == two["net"].keys()
    assert all(torch.equal(one["net"][name], two["net"][name]) for name in one["net"])
    with dcp.open(tmp_path / "2", verify="full") as opened:
        assert not opened.find_coverage_problems()
        assert not opened.find_stray_files()
        assert opened.count_without_checksums() == 0
        assert len(opened.files) == 3  # one of values, one of each process
    assert reports[0].tensors == reports[1].tensors
    assert reports[1].bytes_read >= sum(300 * 10 * 4 for _ in range(9))
    assert names[0] == names[1]


def test_a_failure_in_one_process_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    torch.save({"a": numbered(900), "b": numbered(901)}, tmp_path / "state.pt")
    convert.to_dcp(tmp_path / "state.pt", tmp_path / "step")
    before = sorted(os.listdir(tmp_path / "step"))
    stored = (tmp_path / "state.pt").read_bytes()
    place = stored.index(numbered(900).numpy().tobytes())
    (tmp_path / "state.pt").write_bytes(stored[:place] + b"??" + stored[place + 2 :])
    with pytest.raises(CheckpointCorruptError, match="CRC"):
        convert.to_dcp(tmp_path / "state.pt", tmp_path / "step", processes=2)
    assert sorted(os.listdir(tmp_path / "step")) == before


PROGRAM = """
import sys
from pytest_dcp._cli.main import main
from pytest_dcp._engine.background.saver_process import SaverProcess
from pytest_dcp._engine.conversion.safetensors_folder import WriteSafetensorsFile
ask = SaverProcess.ask
def watched(line, order, *rest, **options):
    if isinstance(order, WriteSafetensorsFile):
        print("writes", flush=True)
    return ask(line, order, *rest, **options)
SaverProcess.ask = watched
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_ends_all_processes_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    arguments = ["convert", source, tmp_path / "folder", "--to", "safetensors", "--skip-values"]
    arguments += ["--processes", "2", "--max-file-bytes", "1000"]
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as converting:
        assert converting.stdout is not None
        assert converting.stdout.readline() == "writes\n"
        workers = psutil.Process(converting.pid).children()
        os.killpg(converting.pid, signal.SIGINT)  # As a terminal does: to all of them.
        _, err = converting.communicate(timeout=120)
    assert (converting.returncode, err) == (130, "interrupted\n")
    assert len(workers) == 2
    assert not any(worker.is_running() for worker in workers)
    assert list(tmp_path.iterdir()) == []


def test_a_process_refuses_another_save_than_the_one_opened_here(tmp_path: Path) -> None:
    for name, save in (("dcp", dcp_save), ("state.pt", torch_save)):
        save(tmp_path / name, 1)
        with dcp.open(tmp_path / name) as opened:
            found = SourceToOpen.of(opened)
            found.open().close()
            save(tmp_path / name, 2)
            with pytest.raises(CheckpointReplacedError, match="while it was converted"):
                found.open()


def dcp_save(path: Path, value: float) -> None:
    dcp.save({"w": torch.full((3,), value)}, checkpoint_id=path)


def torch_save(path: Path, value: float) -> None:
    torch.save({"w": torch.full((int(value),), value)}, path)


def test_how_many_processes_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operating_system, "usable_cores", lambda: 64)
    large = worker_processes.WORTH_BYTES
    assert choose_processes(None, large - 1, 100) == 1
    assert choose_processes(None, large, 100) == worker_processes.MOST_PROCESSES
    assert choose_processes(None, large, 2) == 2
    assert choose_processes(None, large, 100, "memory://x") == 1
    assert choose_processes(8, 0, 3) == 3
    with pytest.raises(ValueError, match="must be 1 or more"):
        choose_processes(0, 0, 3)
    with pytest.raises(ValueError, match="is in the memory of this process"):
        choose_processes(2, 0, 3, Path("x"), "memory://x")
    monkeypatch.setattr(operating_system, "has_saver_processes", lambda: False)
    assert choose_processes(None, large, 100) == 1
    with pytest.raises(ValueError, match="need Linux"):
        choose_processes(2, 0, 3)
