"""Checkpoints of every format, opened as mappings: contents, bytes read, overwrites, bad input."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFileMissingError,
    CheckpointMismatchError,
    CheckpointReplacedError,
    NotACheckpointError,
    UnknownNameError,
    UntrustedPickleError,
)
from pytest_dcp.faults.hostile.folders import hostile_folders
from support.checkpoint_formats import VALUES, save_in_each_format
from support.states import bits, numbered, same, torch_dcp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
DTYPES = [torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint16]


def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.layers.0.wq": numbered(40, 30),
        "model.layers.1.wq": numbered(6, 5, 4, start=500),
        "model.scalar": torch.tensor(2.5),
        "model.empty": torch.empty(0, 3),
        **{f"model.{dtype}": torch.ones(5).to(dtype) for dtype in DTYPES},
    }


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each format, and files that are none."""
    folder = save_in_each_format(tmp_path_factory.mktemp("samples"), tensors())
    shards = dcp.HuggingFaceStorageWriter(str(folder / "shards"), save_distributed=True)
    dcp.save(tensors(), storage_writer=shards)
    return folder


@pytest.fixture(scope="module")
def in_memory(samples: Path) -> Iterator[str]:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("ours", "hf"):
        memory.put(str(samples / name), f"/opened/{name}", recursive=True)
    memory.put(str(samples / "one.safetensors"), "/opened/one.safetensors")
    yield "memory://opened"
    memory.rm("/opened", recursive=True)


FORMATS = ["ours", "torchs", "state.pt", "one.safetensors", "hf", "shards"]
URLS = ["ours", "hf", "one.safetensors"]


def check_contents(opened: dcp.OpenCheckpoint) -> None:
    """Every name, fact and element is the saved one."""
    expected = tensors()
    assert set(opened) - set(VALUES) == set(expected)
    for name, tensor in expected.items():
        lazy = opened[name]
        assert isinstance(lazy, dcp.LazyTensor)
        assert (lazy.shape, lazy.dtype, lazy.ndim) == (tensor.shape, tensor.dtype, tensor.dim())
        assert lazy.nbytes == tensor.numel() * tensor.itemsize
        assert sum(shard.nbytes for shard in lazy.shards) == lazy.nbytes
        assert torch.equal(bits(lazy.tensor()), bits(tensor))
    three = opened["model.layers.1.wq"]
    assert isinstance(three, dcp.LazyTensor)
    full = expected["model.layers.1.wq"]
    for index in (2, -1, (slice(1, 4), slice(2, 3)), (..., slice(0, 4, 2)), (0, 1, 2), ()):
        assert torch.equal(three[index], full[index])


class TestContents:
    @pytest.mark.parametrize("name", FORMATS)
    def test_names_facts_and_parts_are_the_saved_ones(self, samples: Path, name: str) -> None:
        with dcp.open(samples / name) as opened:
            check_contents(opened)
            values = {key: opened[key] for key in VALUES if key in opened}
            assert len(values) == (0 if "safetensors" in opened.format else len(VALUES))
            for key, lazy in values.items():
                assert isinstance(lazy, dcp.LazyValue)
                assert lazy.value() == VALUES[key]

    @pytest.mark.parametrize("name", URLS)
    def test_urls_open_like_folders(self, in_memory: str, name: str) -> None:
        with dcp.open(f"{in_memory}/{name}") as opened:
            check_contents(opened)

    def test_the_index_file_of_a_folder_opens_the_folder(self, samples: Path) -> None:
        for path in (samples / "ours/.metadata", samples / "hf/model.safetensors.index.json"):
            with dcp.open(path) as opened:
                check_contents(opened)

    def test_shards_are_the_boxes_in_the_files(self, tmp_path: Path) -> None:
        writer = dcp.FileSystemWriter(tmp_path / "step")
        metadata = dcp.save({"w": numbered(4, 6)}, storage_writer=writer)
        assert metadata is not None
        with dcp.open(tmp_path / "step") as opened:
            lazy = opened["w"]
            assert isinstance(lazy, dcp.LazyTensor)
            (shard,) = lazy.shards
            assert (shard.offset, shard.shape, shard.nbytes) == ((0, 0), (4, 6), 96)
            assert shard.file in os.listdir(tmp_path / "step")
            assert opened.files == (shard.file,)

    def test_several_tensors_are_read_at_once_and_cast(self, samples: Path) -> None:
        names = ["model.layers.0.wq", "model.layers.1.wq", "model.scalar"]
        for name in FORMATS:
            with dcp.open(samples / name) as opened:
                found = opened.read(names, dtype=torch.float64)
                assert same(found, {key: tensors()[key].double() for key in names})
                assert opened.read([]) == {}

    def test_arrays_of_numpy(self, samples: Path) -> None:
        with dcp.open(samples / "ours") as opened:
            lazy = opened["model.layers.0.wq"]
            assert isinstance(lazy, dcp.LazyTensor)
            assert np.array_equal(np.asarray(lazy), numbered(40, 30).numpy())
            assert lazy.numpy().dtype == np.float32
            narrow = opened["model.torch.bfloat16"]
            assert isinstance(narrow, dcp.LazyTensor)
            with pytest.raises(TypeError, match="NumPy does not have"):
                narrow.numpy()

    def test_the_tree_and_patterns_lead_to_the_same_tensors(self, samples: Path) -> None:
        with dcp.open(samples / "torchs") as opened:
            inner: Any = opened.tree["model"]
            assert inner["layers"]["0"]["wq"].name == "model.layers.0.wq"
            assert opened.glob("model.layers.*") == ["model.layers.0.wq", "model.layers.1.wq"]

    def test_texts_for_terminal_and_notebook(self, samples: Path) -> None:
        with dcp.open(samples / "ours") as opened:
            assert "dcp checkpoint" in repr(opened)
            assert "'model.layers.0.wq': torch.float32 of (40, 30), 1 shard" in repr(opened)
            assert "model.layers.0.wq" in opened._repr_html_()
            assert "<svg" in opened["model.layers.0.wq"]._repr_html_()  # type: ignore[union-attr]  # a tensor

    def test_a_ranks_own_checkpoint_is_opened_by_its_rank(self, tmp_path: Path) -> None:
        dcp.save({"w": numbered(3)}, checkpoint_id=tmp_path, use_collectives=False)
        with pytest.raises(NotACheckpointError, match=r"each rank saved on its own .*rank=0"):
            dcp.open(tmp_path)
        with dcp.open(tmp_path, rank=0) as opened:
            assert opened.read(["w"])["w"].tolist() == [1, 2, 3]


class TestBytes:
    def test_only_the_bytes_of_the_part_are_read(self, tmp_path: Path) -> None:
        dcp.save({"w": torch.arange(1 << 20)}, checkpoint_id=tmp_path)
        for verify, ratio in (("auto", 1.001), ("off", 1.0)):
            with dcp.open(tmp_path, verify=verify) as opened:  # type: ignore[arg-type]  # one of its words
                lazy: Any = opened["w"]
                assert opened.bytes_read == 0
                part = lazy[1000:501_000]
                assert torch.equal(part, torch.arange(1000, 501_000))
                assert opened.bytes_needed == 4_000_000
                assert 1.0 <= opened.bytes_read / opened.bytes_needed <= ratio

    def test_opening_reads_no_data_file(self, samples: Path, tmp_path: Path) -> None:
        shutil.copytree(samples / "ours", tmp_path / "step")
        for file in (tmp_path / "step").glob("*.distcp"):
            file.write_bytes(bytes(file.stat().st_size))
        with dcp.open(tmp_path / "step") as opened:
            assert opened["model.layers.0.wq"].nbytes == 4800
            with pytest.raises(CheckpointCorruptError, match="checksum differs"):
                opened.read(["model.layers.0.wq"])


class TestOverwrites:
    def test_the_opened_save_stays_readable_after_another_one(self, tmp_path: Path) -> None:
        dcp.save({"w": numbered(1000), "step": 1}, checkpoint_id=tmp_path)
        with dcp.open(tmp_path) as opened:
            dcp.save({"w": numbered(1000, start=9), "step": 2}, checkpoint_id=tmp_path)
            assert torch.equal(opened.read(["w"])["w"], numbered(1000))
            assert opened["step"].value() == 1  # type: ignore[union-attr]  # a value

    def test_a_save_that_writes_over_the_files_in_place_is_noticed(self, tmp_path: Path) -> None:
        torch_dcp.save({"w": numbered(1000)}, checkpoint_id=tmp_path)
        with dcp.open(tmp_path) as opened:
            assert torch.equal(opened.read(["w"])["w"], numbered(1000))
            torch_dcp.save({"w": numbered(1000, start=9)}, checkpoint_id=tmp_path)
            with pytest.raises(CheckpointReplacedError, match="open it again"):
                opened.read(["w"])

    def test_files_that_a_store_no_longer_has_are_a_replacement(self, samples: Path) -> None:
        url = "memory://replaced/step"
        dcp.save({"w": numbered(1000)}, checkpoint_id=url)
        with dcp.open(url) as opened:
            dcp.save({"w": numbered(1000, start=9)}, checkpoint_id=url)
            with pytest.raises(CheckpointReplacedError, match="open it again"):
                opened.read(["w"])

    @pytest.mark.parametrize("name", ["ours", "hf", "state.pt"])
    def test_a_closed_checkpoint_keeps_its_names_and_reads_nothing(
        self, samples: Path, name: str
    ) -> None:
        opened = dcp.open(samples / name)
        before = len(os.listdir("/proc/self/fd"))
        lazy = opened["model.layers.0.wq"]
        assert isinstance(lazy, dcp.LazyTensor)
        opened.close()
        opened.close()
        assert len(os.listdir("/proc/self/fd")) <= before
        assert lazy.shape == (40, 30)
        assert len(lazy.shards) == 1
        with pytest.raises(ValueError, match="was closed"):
            lazy.tensor()


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


class TestBadInput:
    def test_nothing_at_the_path(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none", "memory://nothing/there"):
            with pytest.raises((FileNotFoundError, NotACheckpointError)) as raised:
                dcp.open(path)
            assert "no checkpoint in" in one_line(raised.value)

    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ({}, "no files are there"),
            ({"__0_0.distcp": b"x"}, "data files but no .metadata: the save did not end"),
            ({"notes.txt": b"x", "run.log": b""}, "notes.txt, run.log"),
            ({"metadata.pkl": b"x", "model_0.pt": b""}, "torch_checkpointing"),
        ],
    )
    def test_folders_that_are_no_checkpoint(
        self, tmp_path: Path, files: dict[str, bytes], words: str
    ) -> None:
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(NotACheckpointError) as raised:
            dcp.open(tmp_path)
        assert words in one_line(raised.value)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "begins with b''"),
            (b"hello world", "begins with b'hello wo'"),
            (pickle.dumps({"w": 1}, 2), "bare pickle"),
            (b"PK\x03\x04 and no more", ""),
        ],
    )
    def test_files_that_are_no_checkpoint(self, tmp_path: Path, content: bytes, words: str) -> None:
        (tmp_path / "file").write_bytes(content)
        with pytest.raises((NotACheckpointError, CheckpointCorruptError)) as raised:
            dcp.open(tmp_path / "file")
        assert words in one_line(raised.value)
        assert "file" in one_line(raised.value)

    def test_a_wrong_name_gives_the_nearest(self, samples: Path) -> None:
        with dcp.open(samples / "ours") as opened:
            with pytest.raises(UnknownNameError) as raised:
                opened["layers.0.wq"]
            assert raised.value.nearest[0] == "model.layers.0.wq"
            assert "no 'layers.0.wq'; the nearest: 'model.layers.0.wq'" in one_line(raised.value)
            with pytest.raises(KeyError, match=r"2 names begin with 'model\.layers\.'"):
                opened["model.layers"]
            assert "nothing" not in opened
            assert opened.get("nothing") is None
            with pytest.raises(TypeError, match="is a value"):
                opened.read(["step"])

    def test_a_missing_data_file_spoils_only_its_tensors(
        self, samples: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(samples / "hf", tmp_path / "hf")
        shutil.copytree(samples / "ours", tmp_path / "ours")
        next((tmp_path / "ours").glob("*.distcp")).unlink()
        with dcp.open(tmp_path / "ours") as opened:
            with pytest.raises(CheckpointFileMissingError, match="data file is missing") as raised:
                opened.read(["model.layers.0.wq"])
            one_line(raised.value)
        next((tmp_path / "hf").glob("*.safetensors")).unlink()
        with pytest.raises(CheckpointCorruptError, match="names a file that is missing"):
            dcp.open(tmp_path / "hf")

    @pytest.mark.parametrize("name", ["ours", "torchs"])
    def test_a_cut_off_index_is_refused(self, samples: Path, tmp_path: Path, name: str) -> None:
        shutil.copytree(samples / name, tmp_path / "step")
        content = (tmp_path / "step/.metadata").read_bytes()
        (tmp_path / "step/.metadata").write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointCorruptError, match=r"file '\.metadata'") as raised:
            dcp.open(tmp_path / "step")
        one_line(raised.value)

    def test_an_unreadable_folder_is_an_os_error(self, samples: Path, tmp_path: Path) -> None:
        shutil.copytree(samples / "ours", tmp_path / "step")
        (tmp_path / "step/.metadata").unlink()
        (tmp_path / "step/.metadata").mkdir()
        with pytest.raises((NotACheckpointError, CheckpointCorruptError, OSError)) as raised:
            dcp.open(tmp_path / "step")
        one_line(raised.value)

    def test_values_of_foreign_classes_are_not_made(self, tmp_path: Path) -> None:
        torch_dcp.save({"w": torch.ones(2), "evil": Foreign()}, checkpoint_id=tmp_path)
        with dcp.open(tmp_path) as opened:
            lazy = opened["evil"]
            assert isinstance(lazy, dcp.LazyValue)
            with pytest.raises(UntrustedPickleError, match="Foreign"):
                lazy.value()
        assert Foreign.made == 1

    def test_hostile_folders_are_refused_or_read_in_bounds(
        self, samples: Path, tmp_path: Path
    ) -> None:
        outcomes = []
        for number, hostile in enumerate(hostile_folders(samples / "torchs")):
            folder = hostile.make(tmp_path / str(number))
            try:
                with dcp.open(folder) as opened:
                    names = [k for k, v in opened.items() if isinstance(v, dcp.LazyTensor)]
                    opened.read(names)
                    for key in set(opened) - set(names):
                        opened[key].value()  # type: ignore[union-attr]  # a value
            except (CheckpointError, OSError) as error:
                outcomes.append(type(error).__name__)
            else:
                outcomes.append("read")
            shutil.rmtree(folder)
        assert len(outcomes) > 10
        assert outcomes.count("read") < len(outcomes) // 4


class Foreign:
    """Counts how often pickle has made one."""

    made = 1

    def __setstate__(self, state: object) -> None:
        Foreign.made += 1


def test_a_mismatched_kind_of_tensor_is_named(tmp_path: Path) -> None:
    from support.opaque_tensors import scaled

    torch_dcp.save({"w": scaled(2)}, checkpoint_id=tmp_path)
    with dcp.open(tmp_path) as opened, pytest.raises(CheckpointMismatchError, match="'w'"):
        opened.read(["w"])
