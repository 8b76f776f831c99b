"""Checkpoint folders to files of `torch.save` and back: their values, and the cost."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import format_utils as format_utils_of_torch
from torch.distributed.checkpoint.api import CheckpointException

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.conversion.command import main
from pytest_dcp.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError
from support.states import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.uint16,
    torch.float8_e4m3fn,
]


def state() -> dict[str, Any]:
    """Every shape and kind of value that a trainer keeps."""
    return {
        "model": {
            "w": torch.arange(12.0).reshape(3, 4),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            **{str(dtype): torch.ones(5).to(dtype) for dtype in DTYPES},
        },
        "optim": {"state": {0: {"exp": torch.randn(7), "step": 3}}, "lr": [0.1, 0.2]},
        "step": 7,
        "name": "run",
        "none": None,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(state(), checkpoint_id=tmp_path / "folder")
    return tmp_path / "folder"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state.pt"


class TestToAFile:
    @pytest.mark.parametrize("mapped", [False, True])
    def test_torch_loads_the_saved_state(self, folder: Path, file: Path, mapped: bool) -> None:
        torch.manual_seed(0)
        expected = dcp.load_without_template(checkpoint_id=folder)
        dcp_to_torch_save(folder, file)
        loaded = torch.load(file, mmap=mapped, weights_only=True)
        assert same(loaded, expected)
        assert list(loaded) == list(state())
        assert loaded["optim"]["state"].keys() == {0}

    def test_it_equals_the_result_of_torchs_own_conversion(
        self, tmp_path: Path, file: Path
    ) -> None:
        saved = {"a": {"w": torch.randn(3, 4), "n": 2}, "b": [torch.ones(2), torch.zeros(1)]}
        dcp.save(saved, checkpoint_id=tmp_path / "folder")
        dcp_to_torch_save(tmp_path / "folder", file)
        format_utils_of_torch.dcp_to_torch_save(tmp_path / "folder", tmp_path / "theirs.pt")
        assert same(torch.load(file), torch.load(tmp_path / "theirs.pt"))

    def test_the_archive_is_whole_and_its_checksums_are_true(
        self, folder: Path, file: Path
    ) -> None:
        dcp_to_torch_save(folder, file)
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
            assert len(archive.infolist()) > 10
        with dcp.open(file) as opened:  # Its records fill the file without a gap: checked here.
            opened.read(name for name in opened if isinstance(opened[name], dcp.LazyTensor))

    def test_a_value_that_holds_tensors_is_kept(self, tmp_path: Path, file: Path) -> None:
        weight = torch.ones(3)
        both = (weight, weight.view(3, 1))
        dcp.save({"pair": both, "w": torch.zeros(2)}, checkpoint_id=tmp_path / "folder")
        dcp_to_torch_save(tmp_path / "folder", file)
        loaded = torch.load(file)
        assert same(loaded["pair"], both)
        assert torch.equal(loaded["w"], torch.zeros(2))

    def test_an_older_file_is_replaced_at_once_or_not_at_all(
        self, folder: Path, file: Path
    ) -> None:
        file.write_bytes(b"old")
        (data,) = folder.glob("*.distcp")
        whole = data.read_bytes()
        data.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointException):
            dcp_to_torch_save(folder, file)
        assert file.read_bytes() == b"old"
        assert sorted(path.name for path in file.parent.iterdir()) == ["folder", "state.pt"]
        data.write_bytes(whole)
        dcp_to_torch_save(folder, file)
        assert torch.load(file)["step"] == 7

    def test_a_full_disk_is_an_error_and_leaves_nothing(self, folder: Path, file: Path) -> None:
        """Without room taken beforehand, a write into the map would end the process (SIGBUS)."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, hard))
        try:
            with pytest.raises((CheckpointException, OSError), match=r"File too large|Errno 27"):
                dcp_to_torch_save(folder, file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in file.parent.iterdir()] == ["folder"]

    def test_a_class_that_is_not_trusted_is_refused(self, tmp_path: Path, file: Path) -> None:
        with pytest.warns(UserWarning, match="weights_only"):
            dcp.save({"at": Stranger(3)}, checkpoint_id=tmp_path / "folder")
        with pytest.raises(CheckpointException, match="Stranger"):
            dcp_to_torch_save(tmp_path / "folder", file)
        dcp_to_torch_save(tmp_path / "folder", file, weights_only=False)
        assert torch.load(file, weights_only=False)["at"].value == 3


class Stranger:
    """Of a class that no checkpoint is trusted with."""

    def __init__(self, value: int) -> None:
        self.value = value


class TestToAFolder:
    def test_a_file_of_torch_becomes_a_folder_that_both_engines_load(
        self, tmp_path: Path, file: Path
    ) -> None:
        saved = state()
        torch.save(saved, file)
        torch_save_to_dcp(file, tmp_path / "folder")
        assert same(dcp.load_without_template(checkpoint_id=tmp_path / "folder"), saved)
        target = {"model": {"w": torch.zeros(3, 4)}}
        torch.distributed.checkpoint.load(target, checkpoint_id=tmp_path / "folder")
        assert torch.equal(target["model"]["w"], saved["model"]["w"])

    def test_there_and_back_changes_nothing(self, tmp_path: Path, file: Path) -> None:
        saved = state()
        torch.save(saved, file)
        torch_save_to_dcp(file, tmp_path / "folder")
        dcp_to_torch_save(tmp_path / "folder", tmp_path / "again.pt")
        assert same(torch.load(tmp_path / "again.pt"), saved)

    def test_views_and_shared_memory_are_saved_as_they_look(
        self, tmp_path: Path, file: Path
    ) -> None:
        base = torch.arange(6.0)
        torch.save({"t": base.reshape(2, 3).t(), "tail": base[4:], "base": base}, file)
        torch_save_to_dcp(file, tmp_path / "folder")
        loaded = dcp.load_without_template(checkpoint_id=tmp_path / "folder")
        assert torch.equal(loaded["t"], base.reshape(2, 3).t())
        assert torch.equal(loaded["tail"], base[4:])

    @pytest.mark.parametrize("content", [torch.ones(2), [1, 2]], ids=["tensor", "list"])
    def test_a_file_without_a_state_dict_is_refused(
        self, tmp_path: Path, file: Path, content: object
    ) -> None:
        torch.save(content, file)
        with pytest.raises(TypeError, match=f"expected a state dict in .*{file.name}"):
            torch_save_to_dcp(file, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()

    def test_code_in_a_file_is_not_run(self, tmp_path: Path, file: Path) -> None:
        torch.save({"w": torch.ones(2), "x": Touches(str(tmp_path / "touched"))}, file)
        with pytest.raises(UntrustedPickleError, match=r"mkdir.*weights_only=False"):
            torch_save_to_dcp(file, tmp_path / "folder")
        assert not (tmp_path / "touched").exists()

    def test_a_trusted_file_is_read_in_parts_too(
        self, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weight = torch.arange(6.0).reshape(2, 3)
        saved = {
            "at": Stranger(3),
            "module": torch.nn.Linear(2, 3),
            "w": torch.nn.Parameter(weight),
            "half": weight.bfloat16().t(),
            "small": weight.to(torch.uint16),
        }
        torch.save(saved, file)
        with pytest.raises(UntrustedPickleError):
            torch_save_to_dcp(file, tmp_path / "folder")
        with monkeypatch.context() as patch:
            patch.delattr(torch, "load")  # It would load the whole file.
            torch_save_to_dcp(file, tmp_path / "folder", weights_only=False)
        found = dcp.load_without_template(checkpoint_id=tmp_path / "folder", weights_only=False)
        assert found["at"].value == 3
        assert same(dict(found["module"]), dict(saved["module"].state_dict()))  # type: ignore[attr-defined]
        for name in ("w", "half", "small"):
            assert torch.equal(found[name], saved[name])

    @pytest.mark.filterwarnings("ignore:.*quantiz.*")
    def test_a_trusted_file_that_needs_its_elements_is_loaded_by_torch(
        self, tmp_path: Path, file: Path
    ) -> None:
        quantised = torch.quantize_per_tensor(torch.arange(6.0), 0.1, 0, torch.quint8)
        torch.save({"at": Stranger(3), "q": quantised, "w": torch.ones(2)}, file)
        torch_save_to_dcp(file, tmp_path / "folder", weights_only=False)
        found = dcp.load_without_template(checkpoint_id=tmp_path / "folder", weights_only=False)
        assert torch.equal(found["q"].dequantize(), quantised.dequantize())
        assert torch.equal(found["w"], torch.ones(2))

    def test_an_empty_state_dict_is_one(self, tmp_path: Path, file: Path) -> None:
        torch.save({}, file)
        torch_save_to_dcp(file, tmp_path / "folder")
        dcp_to_torch_save(tmp_path / "folder", tmp_path / "again.pt")
        assert torch.load(tmp_path / "again.pt") == {}

    def test_a_file_of_another_kind_is_refused(self, tmp_path: Path, file: Path) -> None:
        file.write_bytes(pickle.dumps({"w": 1}))
        with pytest.raises(CheckpointCorruptError, match=r"zip archive that torch.save writes"):
            torch_save_to_dcp(file, tmp_path / "folder")

    def test_damage_is_named(self, tmp_path: Path, file: Path) -> None:
        torch.save({"w": torch.arange(4000.0)}, file)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointCorruptError, match=r"CRC.*state\.pt"):
            torch_save_to_dcp(file, tmp_path / "folder")


class Picky:
    """An allowed class that refuses its arguments."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return Picky, (str(self.value), "too many")


def test_an_allowed_class_that_fails_is_an_error_of_the_file(tmp_path: Path, file: Path) -> None:
    torch.save({"p": Picky(3)}, file)
    with (
        torch.serialization.safe_globals([Picky]),
        pytest.raises(CheckpointCorruptError, match=r"cannot be made.*state\.pt"),
    ):
        torch_save_to_dcp(file, tmp_path / "folder")


class Touches:
    """Whose pickle makes a folder where it is loaded by a reader that runs code."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


MEMORY_PROGRAM = """
import sys, threading
import torch
import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

def anonymous_mib():
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

def growth_of(work):
    done, peak, before = threading.Event(), 0.0, anonymous_mib()
    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_mib() - before)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return round(peak)

folder, file, again = sys.argv[1:]
dcp.save({"first": torch.ones(1000)}, checkpoint_id=again)  # Threads and modules are there now.
dcp_to_torch_save(again, file)
torch_save_to_dcp(file, again)
print(growth_of(lambda: dcp_to_torch_save(folder, file)))
print(growth_of(lambda: torch_save_to_dcp(file, again)))
print(growth_of(lambda: torch.load(file)))
"""


def test_neither_direction_holds_the_state_in_memory(tmp_path: Path) -> None:
    """Of 256 MB that go there and back, the process never holds 64 MiB."""
    state = {f"w{i}": torch.full((32 << 18,), float(i)) for i in range(8)}
    dcp.save(state, checkpoint_id=tmp_path / "folder")
    paths = [str(tmp_path / name) for name in ("folder", "state.pt", "again")]
    command = [sys.executable, "-W", "ignore", "-c", MEMORY_PROGRAM, *paths]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    there, back, whole = map(int, ran.stdout.split())
    assert max(there, back) < 64
    assert whole > 200  # That is what is seen where the state is in memory.
    assert same(dcp.load_without_template(checkpoint_id=tmp_path / "again"), state)


class TestCommand:
    def test_both_directions(self, folder: Path, file: Path, tmp_path: Path) -> None:
        assert main(["dcp_to_torch", str(folder), str(file)]) == 0
        assert torch.load(file)["step"] == 7
        assert main(["torch_to_dcp", str(file), str(tmp_path / "again")]) == 0
        assert (tmp_path / "again" / ".metadata").exists()

    def test_a_mistake_is_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["dcp_to_torch", str(tmp_path / "nothing"), str(tmp_path / "f")]) == 1
        assert main(["torch_to_dcp", str(tmp_path / "nothing"), str(tmp_path / "f")]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert "no checkpoint" in lines[0]
        assert "No such file" in lines[-1]
        assert list(tmp_path.iterdir()) == []
