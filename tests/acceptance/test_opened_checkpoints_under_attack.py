"""Opened checkpoints whose files are written over, cut off, closed under a read, or odd inside."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint._extension import ZStandard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io import transformed_entries
from pytest_dcp._engine.io.local_file import LocalIn
from pytest_dcp._engine.lazy_reading import catalog_contents, torch_save_file
from pytest_dcp.checkpoint import convert
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointReplacedError,
    NotACheckpointError,
)
from support.states import numbered, torch_dcp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]
EVIL = "a\nb\x1b[31m<script>alert(1)</script>"


class TestFilesOfTorchSave:
    def test_one_that_is_written_over_is_noticed_and_does_not_end_the_process(
        self, tmp_path: Path
    ) -> None:
        # In a process of its own: a read through the mapping ends it by SIGBUS.
        program = """
import os, time, torch, pytest_dcp.checkpoint as dcp
from pytest_dcp.errors import CheckpointReplacedError
w = torch.ones(1 << 20)
for overwrite in (
    lambda: torch.save({"w": torch.zeros(3)}, "state.pt"),
    lambda: os.truncate("state.pt", 100),
    lambda: torch.save({"w": w + 1}, "state.pt"),
):
    torch.save({"w": w}, "state.pt")
    opened = dcp.open("state.pt")
    time.sleep(0.05)  # another time of modification
    overwrite()
    try:
        opened["w"].tensor()
    except CheckpointReplacedError as error:
        print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        line = "state.pt was written over since it was opened: open it again"
        assert done.stdout.splitlines() == [line] * 3

    def test_one_that_is_cut_off_while_it_is_converted_or_sent_is_an_error(
        self, tmp_path: Path
    ) -> None:
        program = """
import os, time, torch, pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.conversion.broadcast_reader import BroadcastingTorchSaveReader
from pytest_dcp.checkpoint import FileSystemWriter
from pytest_dcp.checkpoint.format_utils import DynamicMetaLoadPlanner, torch_save_to_dcp
def cutting(function):
    def cut(*args, **kwargs):
        os.truncate("state.pt", 5000)
        return function(*args, **kwargs)
    return cut
FileSystemWriter.prepare_local_plan = cutting(FileSystemWriter.prepare_local_plan)
Reader = BroadcastingTorchSaveReader
Reader.prepare_global_plan = cutting(Reader.prepare_global_plan)
for convert in (
    lambda: torch_save_to_dcp("state.pt", "folder"),
    lambda: dcp.load({"w": torch.zeros(1 << 20)}, storage_reader=Reader(),
                     planner=DynamicMetaLoadPlanner(), checkpoint_id="state.pt"),
):
    torch.save({"w": torch.ones(1 << 20)}, "state.pt")
    time.sleep(0.05)  # another time of modification
    try:
        convert()
    except dcp.CheckpointError as error:
        print("was written over since it was opened" in str(error), os.path.exists("folder"))
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True,
            text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["True False"] * 2

    def test_damage_is_found_when_the_record_is_read_and_not_before(self, tmp_path: Path) -> None:
        path = tmp_path / "state.pt"
        state = {"a": numbered(3000), "b": numbered(4000, start=7), "pair": (numbered(5), 1)}
        torch.save(state, path)
        content = path.read_bytes()
        place = content.index(numbered(4000, start=7).numpy().tobytes())
        path.write_bytes(content[: place + 900] + b"?" + content[place + 901 :])
        with dcp.open(path) as opened:
            assert torch.equal(opened.read(["a"])["a"], state["a"])
            assert opened["pair"].value()[1] == 1  # type: ignore[union-attr]  # a value
            for part in (slice(None), slice(5), slice(3990, None)):
                for _ in range(2):
                    with pytest.raises(CheckpointCorruptError, match=r"CRC.*'data/1'.*state\.pt"):
                        opened["b"][part]  # type: ignore[index]  # a tensor
        with dcp.open_checkpoint(path, verify="off") as opened:
            assert torch.equal(opened["b"][:5], state["b"][:5])  # type: ignore[index]

    def test_opening_reads_no_elements(self, tmp_path: Path) -> None:
        path = tmp_path / "state.pt"
        torch.save({"w": torch.ones(1 << 22), "step": 3}, path)
        with dcp.open(path) as opened:
            assert opened["w"].shape == (1 << 22,)  # type: ignore[union-attr]  # a tensor
            assert opened["step"].value() == 3  # type: ignore[union-attr]  # a value
        holes = os.open(path, os.O_RDWR)
        try:
            os.pwrite(holes, b"\1" * (1 << 20), 1 << 20)
        finally:
            os.close(holes)
        with dcp.open(path) as opened:
            assert opened["step"].value() == 3  # type: ignore[union-attr]  # a value

    def test_values_that_hold_tensors_are_read_whole_and_checked(self, tmp_path: Path) -> None:
        path = tmp_path / "state.pt"
        weight = numbered(40, 30)
        state = {
            "pair": (weight, weight.t()[3], 1),
            "parameter": (torch.nn.Parameter(numbered(4)), {"deep"}),
            "sparse": (torch.eye(3).to_sparse(),),
            "conjugate": (torch.complex(weight, -weight).conj(),),
            "array": weight.numpy()[3:7],
            "w": weight,
        }
        torch.save(state, path)
        with dcp.open(path) as opened:
            found = {name: lazy.value() for name, lazy in opened.items()
                     if isinstance(lazy, dcp.LazyValue)}  # fmt: skip
        assert found.keys() == state.keys() - {"w"}
        assert torch.equal(found["pair"][0], weight)
        assert torch.equal(found["pair"][1], weight.t()[3])
        assert found["pair"][0].untyped_storage() is not None
        one, two = (tensor.untyped_storage().data_ptr() for tensor in found["pair"][:2])
        assert one == two  # they share their memory, as they did
        assert type(found["parameter"][0]) is torch.nn.Parameter
        assert found["parameter"][0].requires_grad
        assert torch.equal(found["parameter"][0], numbered(4))
        assert torch.equal(found["sparse"][0].to_dense(), torch.eye(3))
        assert torch.equal(found["conjugate"][0], state["conjugate"][0])
        assert (found["array"] == weight.numpy()[3:7]).all()

    def test_a_file_that_got_its_name_from_another_stays_readable(self, tmp_path: Path) -> None:
        path = tmp_path / "state.pt"
        torch.save({"w": numbered(1000)}, path)
        with dcp.open(path) as opened:
            torch.save({"w": numbered(1000, start=9)}, tmp_path / "new.pt")
            os.replace(tmp_path / "new.pt", path)
            assert torch.equal(opened.read(["w"])["w"], numbered(1000))

    @pytest.mark.parametrize("window", [16 << 20, 256])
    def test_views_of_any_strides_are_read_as_they_look(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
    ) -> None:
        monkeypatch.setattr(torch_save_file, "WINDOW_BYTES", window)
        monkeypatch.setattr(torch_save_file, "SMALL_BYTES", window // 4)
        full = numbered(40, 30)
        whole = torch.complex(full, -full)
        state = {
            "plain": full,
            "transposed": full.t(),
            "column": full[:, 3],
            "steps": full[::3, ::7],
            "tail": full[30:, 25:],
            "expanded": full[0].expand(50, 30),
            "conjugate": whole.conj(),
            "negative": torch.complex(full, -full).conj().imag,
            "scalar": full[3, 4],
            "bytes": full.clone().view(torch.uint8)[:, 1::4],
        }
        torch.save(state, tmp_path / "state.pt")
        with dcp.open(tmp_path / "state.pt") as opened:
            for name, tensor in state.items():
                lazy = opened[name]
                assert isinstance(lazy, dcp.LazyTensor)
                assert torch.equal(lazy.tensor(), tensor), name
                assert torch.equal(lazy[..., -2:] if lazy.ndim else lazy[()],
                                   tensor[..., -2:] if tensor.ndim else tensor)  # fmt: skip
                double = tensor.to(torch.complex128)
                assert torch.equal(lazy.tensor(dtype=torch.complex128), double), name

    def test_a_slice_of_a_large_tensor_reads_little_more_than_itself(self, tmp_path: Path) -> None:
        torch.save({"w": torch.ones(1000, 10_000)}, tmp_path / "state.pt")
        with dcp.open(tmp_path / "state.pt") as opened:
            lazy = opened["w"]
            assert isinstance(lazy, dcp.LazyTensor)
            assert lazy[:, :100].shape == (1000, 100)
            assert opened.bytes_needed == 400_000
            assert opened.bytes_read <= 3_200_000

    def test_sparse_tensors_are_listed_and_refused_in_words(self, tmp_path: Path) -> None:
        torch.save({"s": torch.eye(3).to_sparse(), "w": numbered(2)}, tmp_path / "state.pt")
        with dcp.open(tmp_path / "state.pt") as opened:
            with pytest.raises(CheckpointMismatchError, match=r"'s' is sparse \(torch.sparse_coo"):
                opened.read(["s"])
            assert torch.equal(opened.read(["w"])["w"], numbered(2))

    @pytest.mark.parametrize(
        ("state", "words"),
        [([1], "expected a state dict in"), ({1: 1, "1": 2}, "duplicated flatten key '1'")],
    )
    def test_a_file_without_a_state_dict_is_no_checkpoint(
        self, tmp_path: Path, state: Any, words: str
    ) -> None:
        torch.save(state, tmp_path / "state.pt")
        before = os.listdir("/proc/self/fd")
        with pytest.raises(NotACheckpointError, match="is no checkpoint: ") as raised:
            dcp.open(tmp_path / "state.pt")
        assert words in str(raised.value)
        assert len(os.listdir("/proc/self/fd")) <= len(before)


class TestClosing:
    @pytest.mark.parametrize("name", ["step", "state.pt"])
    def test_a_read_in_progress_ends_well_and_the_last_one_closes_the_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        # A number of a descriptor that is closed too early belongs to any other file.
        dcp.save({"w": numbered(1000)}, checkpoint_id=tmp_path / "step")
        torch.save({"w": numbered(1000)}, tmp_path / "state.pt")
        before = len(os.listdir("/proc/self/fd"))
        opened = dcp.open(tmp_path / name, verify="off")
        reading, closed = threading.Event(), threading.Event()
        rows, into = LocalIn.read_rows, LocalIn.read_into

        def wait() -> None:
            reading.set()
            assert closed.wait(60)

        def slow_rows(
            self: LocalIn, offsets: Sequence[int], views: Sequence[memoryview]
        ) -> int:  # fmt: skip
            wait()
            return rows(self, offsets, views)

        def slow_into(self: LocalIn, offset: int, view: memoryview) -> int:
            wait()
            return into(self, offset, view)

        monkeypatch.setattr(LocalIn, "read_rows", slow_rows)
        monkeypatch.setattr(LocalIn, "read_into", slow_into)
        monkeypatch.setattr(LocalIn, "window", lambda *_: None)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(opened.read(["w"])["w"]))
        thread.start()
        try:
            assert reading.wait(60)
            opened.close()
            others = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]  # take free numbers
        finally:
            closed.set()
            thread.join(60)
        for other in others:
            os.close(other)
        assert torch.equal(found[0], numbered(1000))
        assert len(os.listdir("/proc/self/fd")) <= before
        with pytest.raises(ValueError, match="was closed"):
            opened.read(["w"])


class TestCompressedShards:
    """Of torch's stream transforms: a shard is decoded whole, however little is wanted."""

    @pytest.fixture
    def decoded(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """An item for each shard that was decoded."""
        decoded: list[int] = []
        real = transformed_entries.tensor_of

        def counted(*args: Any) -> torch.Tensor:
            decoded.append(1)
            return real(*args)

        monkeypatch.setattr(catalog_contents, "tensor_of", counted)
        return decoded

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        pytest.importorskip("zstandard")
        writer = dcp.FileSystemWriter(tmp_path / "step", _extensions=[ZStandard()])
        dcp.save({"v": numbered(7), "w": numbered(40, 50)}, storage_writer=writer)
        return tmp_path / "step"

    def test_a_conversion_in_many_parts_decodes_each_once(
        self, folder: Path, tmp_path: Path, decoded: list[int]
    ) -> None:
        convert.to_safetensors(folder, tmp_path / "a.safetensors", budget_bytes=100)
        found = load_file(tmp_path / "a.safetensors")
        assert torch.equal(found["w"], numbered(40, 50))
        assert torch.equal(found["v"], numbered(7))
        assert len(decoded) == 2

    def test_parts_in_any_order_are_the_stored_ones(self, folder: Path) -> None:
        with dcp.open(folder) as opened:
            full, other = opened["w"], opened["v"]
            assert isinstance(full, dcp.LazyTensor)
            assert isinstance(other, dcp.LazyTensor)
            for rows in (slice(0, 3), slice(39, 40), slice(2, 9), slice(0, 40)):
                assert torch.equal(full[rows, 5:9], numbered(40, 50)[rows, 5:9])
                assert torch.equal(other[2:4], numbered(7)[2:4])

    def test_a_part_that_was_read_is_the_readers_own(self, folder: Path) -> None:
        with dcp.open(folder) as opened:
            full = opened["w"]
            assert isinstance(full, dcp.LazyTensor)
            full[:5].zero_()
            assert torch.equal(full[:5], numbered(40, 50)[:5])


class TestOddUses:
    def test_keys_of_the_tree_cannot_write_to_the_terminal(self, tmp_path: Path) -> None:
        dcp.save({EVIL: numbered(2), "höhe": numbered(1)}, checkpoint_id=tmp_path)
        with dcp.open(tmp_path) as opened:
            assert str(opened.tree).splitlines() == [repr(EVIL), "höhe"]
            assert "\x1b" not in repr(opened)
            assert "<script" not in opened._repr_html_()

    @pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
    @pytest.mark.parametrize("name", ["step", "state.pt"])
    def test_open_files_are_not_pickled(
        self, tmp_path: Path, name: str, copied: Callable[[Any], object]
    ) -> None:
        dcp.save({"w": numbered(2), "n": 1}, checkpoint_id=tmp_path / "step")
        torch.save({"w": numbered(2), "n": 1}, tmp_path / "state.pt")
        with dcp.open(tmp_path / name) as opened:
            for value in (opened, opened["w"], opened["n"]):
                with pytest.raises(TypeError, match="cannot be pickled: pass the path"):
                    copied(value)

    def test_one_name_is_not_a_list_of_letters(self, tmp_path: Path) -> None:
        dcp.save({"w": numbered(2)}, checkpoint_id=tmp_path)
        with dcp.open(tmp_path) as opened, pytest.raises(TypeError, match=r"read\(\['w'\]\)"):
            opened.read("w")

    def test_a_wrong_device_is_no_fault_of_the_checkpoint(self, tmp_path: Path) -> None:
        dcp.save({"w": numbered(2)}, checkpoint_id=tmp_path)
        with dcp.open(tmp_path) as opened, pytest.raises(RuntimeError, match="device") as raised:
            opened["w"].tensor(device="nonsense")  # type: ignore[union-attr]  # a tensor
        assert not isinstance(raised.value, dcp.CheckpointError)

    @pytest.mark.parametrize(
        ("dtype", "wider"),
        [("bfloat16", "float32"), ("complex32", "complex64"), ("float4_e2m1fn_x2", "float32"),
         ("bits8", "float32")],
    )  # fmt: skip
    def test_dtypes_that_numpy_lacks_are_named(
        self, tmp_path: Path, dtype: str, wider: str
    ) -> None:
        if not hasattr(torch, dtype):
            pytest.skip(f"this torch has no {dtype}")
        tensor = torch.zeros(8, dtype=torch.uint8).view(getattr(torch, dtype))
        dcp.save({"w": tensor}, checkpoint_id=tmp_path)
        with dcp.open(tmp_path) as opened, pytest.raises(TypeError) as raised:
            opened["w"].numpy()  # type: ignore[union-attr]  # a tensor
        assert str(raised.value).startswith(f"'w' is torch.{dtype}, which NumPy does not have: use")
        assert wider in str(raised.value)

    def test_a_data_file_leads_to_its_folder(self, tmp_path: Path) -> None:
        torch_dcp.save({"w": numbered(2)}, checkpoint_id=tmp_path)
        with pytest.raises(NotACheckpointError, match=r"is a data file .* open the folder"):
            dcp.open(tmp_path / "__0_0.distcp")

    def test_an_empty_path_is_not_the_current_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dcp.save({"w": numbered(2)}, checkpoint_id=tmp_path)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match="the path is empty"):
            dcp.open("")


def test_a_replacement_is_noticed_before_the_file_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written over between the read's begin and its end."""
    torch.save({"w": numbered(1000)}, tmp_path / "state.pt")
    into = LocalIn.read_into

    def cut_off(self: LocalIn, offset: int, view: memoryview) -> int:
        os.truncate(tmp_path / "state.pt", 2000)
        return into(self, offset, view)

    with dcp.open(tmp_path / "state.pt") as opened:
        monkeypatch.setattr(LocalIn, "read_into", cut_off)
        with pytest.raises(CheckpointReplacedError, match="open it again"):
            opened.read(["w"])
