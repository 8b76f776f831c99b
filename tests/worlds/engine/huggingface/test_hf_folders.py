"""Folders that have seen more than one save, or other files: one checkpoint, or an error."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io import open_files
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.storages.fsspec import FsspecReader
from pytest_dcp.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

INDEX = "model.safetensors.index.json"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def save(folder: Path, state: dict[str, Any], **options: Any) -> None:
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), **options))


def read(folder: Path, *fqns: str) -> dict[str, torch.Tensor]:
    found = dcp.load_without_template(storage_reader=HuggingFaceStorageReader(str(folder)))
    assert sorted(found) == sorted(fqns)
    return found


def test_the_index_says_which_files_belong(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2)})
    safetensors.torch.save_file(
        {"w": torch.zeros(9), "x": torch.ones(1)}, tmp_path / "a.safetensors"
    )
    assert read(tmp_path, "w")["w"].tolist() == [1.0, 1.0]


def test_a_smaller_save_removes_the_files_of_the_larger(tmp_path: Path) -> None:
    both = {"v": torch.zeros(3), "w": torch.zeros(3)}
    save(tmp_path, both, fqn_to_index_mapping={"v": 1, "w": 2})
    (tmp_path / "model-00008-of-00009.safetensors").write_bytes(b"somebody else's")
    safetensors.torch.save_file(
        {"w": torch.zeros(1)}, tmp_path / "model-00009-of-00009.safetensors", {"format": "pt"}
    )
    (tmp_path / f"model-00001-of-00002.safetensors-{'0' * 12}.tmp").write_bytes(b"of a dead save")
    save(tmp_path, {"w": torch.ones(2)})
    assert names_in(tmp_path) == [
        "model-00001-of-00001.safetensors",
        "model-00008-of-00009.safetensors",
        "model-00009-of-00009.safetensors",
        INDEX,
    ]
    assert read(tmp_path, "w")["w"].tolist() == [1.0, 1.0]


def test_shards_replace_an_earlier_save_of_whole_tensors_and_back(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.zeros(3)})
    save(tmp_path, {"w": torch.ones(3)}, save_distributed=True)
    assert names_in(tmp_path) == ["shard-00001-model-00001-of-00001.safetensors"]
    assert read(tmp_path, "w")["w"].tolist() == [1.0] * 3
    save(tmp_path, {"w": torch.full((3,), 2.0)})
    assert names_in(tmp_path) == ["model-00001-of-00001.safetensors", INDEX]
    assert read(tmp_path, "w")["w"].tolist() == [2.0] * 3


def torch_shard(folder: Path, shard: int, offset: int, rows: int) -> None:
    """As torch's writer leaves it: without a save's id, without the full size."""
    safetensors.torch.save_file(
        {"w": torch.full((rows, 2), float(shard))},
        folder / f"shard-{shard:05d}-model-00001-of-00001.safetensors",
        {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [offset, 0]}})},
    )


def test_shards_of_two_of_torchs_saves_are_not_mixed(tmp_path: Path) -> None:
    for shard, offset in enumerate((0, 2), start=1):
        torch_shard(tmp_path, shard, offset, rows=2)
    assert read(tmp_path, "w")["w"].tolist() == [[1.0] * 2] * 2 + [[2.0] * 2] * 2
    torch_shard(tmp_path, 3, 3, rows=1)
    with pytest.raises(CheckpointException, match=r"different saves.*shard-00003.*'w'"):
        read(tmp_path, "w")


def test_shards_of_two_of_our_saves_are_not_mixed(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    save(first, {"w": torch.zeros(3)}, save_distributed=True)
    save(second, {"v": torch.zeros(3)}, save_distributed=True)
    (file,) = second.iterdir()
    file.rename(first / file.name.replace("shard-00001", "shard-00002"))
    with pytest.raises(CheckpointException, match=r"file of save.*shard-00002"):
        read(first, "v", "w")


def test_a_missing_last_shard_is_a_gap_and_no_smaller_tensor(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(4, 2)}, save_distributed=True)
    (path,) = tmp_path.iterdir()
    with safetensors.safe_open(path, "pt") as file:
        said = file.metadata()
    safetensors.torch.save_file({"w": torch.ones(3, 2)}, path, said)
    with pytest.raises(CheckpointException, match="gap"):
        read(tmp_path, "w")


def test_names_that_count_different_files_are_not_mixed(tmp_path: Path) -> None:
    for name in ("model-00001-of-00002", "model-00001-of-00003"):
        safetensors.torch.save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointException, match="different saves"):
        read(tmp_path)


def test_an_index_that_is_wrong_about_a_file_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2)})
    index = tmp_path / INDEX
    good = json.loads(index.read_text())
    for name, reason in (("gone.safetensors", "missing"), ("../a.safetensors", "inside")):
        index.write_text(json.dumps(good | {"weight_map": {"w": name}}))
        with pytest.raises(CheckpointException, match=reason):
            read(tmp_path, "w")
    (name,) = good["weight_map"].values()
    index.write_text(json.dumps(good | {"weight_map": {"w": name, "v": name}}))
    with pytest.raises(CheckpointException, match=r"has the tensor, and it has not.*'v'"):
        read(tmp_path, "w")


class DyingDisk(LocalDisk):
    """Refuses to rename from the n-th time on."""

    def __init__(self, left: int) -> None:
        self.left = left

    def replace(self, folder: Path, old: str, new: str) -> None:
        if not self.left:
            raise OSError("the disk died")
        self.left -= 1
        super().replace(folder, old, new)


class DyingWriter(HuggingFaceStorageWriter):
    """Writes to such a disk."""

    renames = 0

    def _disk(self) -> LocalDisk:
        self.__dict__.setdefault("disk", DyingDisk(self.renames))
        disk: LocalDisk = self.__dict__["disk"]
        return disk


@pytest.mark.parametrize("renames", range(4))
@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "shards"])
def test_a_save_that_dies_leaves_the_old_checkpoint_and_no_files_of_its_own(
    tmp_path: Path, renames: int, distributed: bool
) -> None:
    options: dict[str, Any] = {
        "fqn_to_index_mapping": {"v": 1, "w": 2},
        "save_distributed": distributed,
    }
    save(tmp_path, {"v": torch.zeros(3), "w": torch.zeros(3)}, **options)
    before = names_in(tmp_path)
    writer = DyingWriter(str(tmp_path), **options)
    writer.renames = renames
    needed = 2 if distributed else 3
    state = {"v": torch.ones(3), "w": torch.ones(3)}
    if renames < needed:
        with pytest.raises(CheckpointException, match="the disk died"):
            dcp.save(state, storage_writer=writer)
    else:
        dcp.save(state, storage_writer=writer)
    expected = 0.0 if renames < needed else 1.0
    assert {v.tolist()[0] for v in read(tmp_path, "v", "w").values()} == {expected}
    if renames < needed:
        assert names_in(tmp_path) == before
    save(tmp_path, state, **options)
    assert {v.tolist()[0] for v in read(tmp_path, "v", "w").values()} == {1.0}
    assert not [name for name in names_in(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "shards"])
def test_files_are_read_as_their_headers_were(
    tmp_path: Path, distributed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second save after it has the usual names again, which the plan means."""
    real = HuggingFaceStorageReader.open_files

    def open_then_replace(self: HuggingFaceStorageReader, plan: Any) -> bool:
        opened = real(self, plan)
        for fill in (1.0, 2.0):
            save(tmp_path, {"w": torch.full((3,), fill)}, save_distributed=distributed)
        return opened

    save(tmp_path, {"w": torch.zeros(3)}, save_distributed=distributed)
    monkeypatch.setattr(HuggingFaceStorageReader, "open_files", open_then_replace)
    assert read(tmp_path, "w")["w"].tolist() == [0.0] * 3


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kept", [True, False], ids=["files kept open", "no descriptors"])
@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "shards"])
def test_ranks_beside_many_overwrites_load_one_save(
    checkpoint_dir: Path,
    rank: int,
    kept: bool,
    distributed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without leases and descriptors each rank read files of another save, without a word."""
    if not kept:
        monkeypatch.setattr(open_files, "most_files", lambda: 0)
    names = [f"t{n}" for n in range(4)]
    errors: list[BaseException] = []

    def overwrite(first: int, last: int) -> None:
        try:
            for fill in range(first, last):
                writer = HuggingFaceStorageWriter(str(checkpoint_dir), save_distributed=distributed)
                writer.sync_files = False
                values = {name: torch.full((500,), float(fill)) for name in names}
                dcp.save(values, storage_writer=writer, no_dist=True)
        except BaseException as error:  # noqa: BLE001 - told to the test
            errors.append(error)

    if rank == 0:
        overwrite(0, 1)
    dist.barrier()
    saving = threading.Thread(target=overwrite, args=(1, 40))
    if rank == 0:
        saving.start()
    loads, going = 0, torch.ones(1)
    while going:
        target = {name: torch.full((500,), -1.0) for name in names}
        dcp.load(target, storage_reader=HuggingFaceStorageReader(str(checkpoint_dir)))
        loads += 1
        fills = torch.cat(list(target.values())).unique()
        assert len(fills) == 1
        both = [torch.zeros(1) for _ in range(2)]
        dist.all_gather(both, fills)
        assert both[0] == both[1]
        going = torch.tensor([float(saving.is_alive())])
        dist.all_reduce(going)
    if rank == 0:
        saving.join(60)
    assert not errors
    assert loads > 1


# Impossible requests.


@pytest.mark.parametrize(
    ("state", "options", "reason"),
    [
        ({"n": 3, "w": torch.ones(1)}, {}, "'n' is no tensor"),
        ({"w": torch.ones(1)}, {"fqn_to_index_mapping": {"v": 1}}, "'w' is not in fqn_to_index"),
        ({"w": torch.ones(1, dtype=torch.complex128)}, {}, r"'w' is torch\.complex128"),
    ],
    ids=["value", "mapping", "dtype"],
)
def test_a_value_without_a_place_is_named_before_anything_is_replaced(
    tmp_path: Path, state: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    save(tmp_path, {"w": torch.zeros(2)})
    with pytest.raises(CheckpointException, match=reason):
        save(tmp_path, state, **options)
    assert read(tmp_path, "w")["w"].tolist() == [0.0, 0.0]


def test_shards_do_not_go_beside_strangers(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointException, match=r"\['model\.safetensors'\], which are no shards"):
        save(tmp_path, {"w": torch.ones(1)}, save_distributed=True)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match=r"no \.safetensors files"):
        read(tmp_path)


def test_a_writer_can_be_set_to_another_folder(tmp_path: Path) -> None:
    writer = HuggingFaceStorageWriter(
        str(tmp_path / "1"), save_distributed=True, enable_consolidation=True
    )
    dcp.save({"w": torch.ones(1)}, storage_writer=writer, checkpoint_id=tmp_path / "2")
    assert not (tmp_path / "1").exists()
    assert read(tmp_path / "2", "w")["w"].tolist() == [1.0]
    assert read(tmp_path / "2" / "sharded", "w")["w"].tolist() == [1.0]


@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "shards"])
def test_a_planner_that_remembers_its_plans_saves_anew(tmp_path: Path, distributed: bool) -> None:
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    writer = HuggingFaceStorageWriter(str(tmp_path), save_distributed=distributed)
    for value in (1.0, 2.0, 3.0):
        dcp.save({"w": torch.full((2,), value)}, storage_writer=writer, planner=planner)
        assert read(tmp_path, "w")["w"].tolist() == [value] * 2


def hub_cache(folder: Path) -> Path:
    """The snapshot's folder of a cache as huggingface_hub lays it out: links to blobs."""
    snapshot, blobs = folder / "snapshots" / "abc123", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tensors = {"v": torch.ones(2), "w": torch.full((3,), 2.0)}
    weight_map = {}
    for number, (fqn, tensor) in enumerate(tensors.items(), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        safetensors.torch.save_file({fqn: tensor}, blobs / f"sha{number}", {"format": "pt"})
        (snapshot / name).symlink_to(f"../../blobs/sha{number}")
        weight_map[fqn] = name
    (blobs / "index").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (snapshot / INDEX).symlink_to("../../blobs/index")
    return snapshot


@pytest.mark.parametrize(
    "kind", [dcp.HuggingFaceStorageReader, dcp.QuantizedHuggingFaceStorageReader]
)
@pytest.mark.parametrize("indexed", [True, False])
def test_a_cache_of_the_hub_is_read(tmp_path: Path, kind: Any, indexed: bool) -> None:
    snapshot = hub_cache(tmp_path)
    if not indexed:
        (snapshot / INDEX).unlink()
    target = {"v": torch.zeros(2), "w": torch.zeros(3)}
    dcp.load(target, storage_reader=kind(str(snapshot)))
    assert target["v"].tolist() == [1.0] * 2
    assert target["w"].tolist() == [2.0] * 3


def test_links_are_refused_on_request(tmp_path: Path) -> None:
    reader = HuggingFaceStorageReader(str(hub_cache(tmp_path)), follow_links=False)
    with pytest.raises(CheckpointException, match="a link leads out of the checkpoint's folder"):
        dcp.load_without_template(storage_reader=reader)


def test_a_link_to_a_fifo_ends_the_load_at_once(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (tmp_path / "blobs" / "sha2").unlink()
    os.mkfifo(tmp_path / "blobs" / "sha2")
    with pytest.raises(CheckpointException, match="which is no plain file"):
        dcp.load_without_template(storage_reader=HuggingFaceStorageReader(str(snapshot)))


@pytest.mark.parametrize("by_url", [False, True])
def test_a_checkpoint_of_links_is_read_on_request(tmp_path: Path, by_url: bool) -> None:
    real, linked = tmp_path / "real", tmp_path / "linked"
    dcp.save({"w": torch.ones(4), "step": 7}, checkpoint_id=real)
    linked.mkdir()
    for file in real.iterdir():
        (linked / file.name).symlink_to(file)
    target = {"w": torch.zeros(4), "step": 0}
    kind: Any = FsspecReader if by_url else dcp.FileSystemReader
    place = f"file://{linked}" if by_url else linked
    with pytest.raises(CheckpointException, match=r"follow_links=True"):
        dcp.load(target, storage_reader=kind(place))
    dcp.load(target, storage_reader=kind(place, follow_links=True))
    assert (target["w"].tolist(), target["step"]) == ([1.0] * 4, 7)
