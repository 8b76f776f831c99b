"""Files of one rank: written whole or not at all, read checked, by torch's names."""

from __future__ import annotations

import importlib
import os
import socket
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_dcp._engine.rank_files import writer as writer_module
from pytest_dcp.checkpoint._experimental import (
    BarrierConfig,
    CheckpointerConfig,
    CheckpointReader,
    CheckpointWriter,
    CheckpointWriterConfig,
    RankInfo,
    SyncCheckpointer,
    TCPStoreBarrier,
    WriterHook,
    create_barrier_from_config,
    make_sync_checkpointer,
)
from pytest_dcp.checkpoint._experimental.barriers import (
    BARRIER_REGISTRY,
    Barrier,
    DistBarrier,
    register_barrier,
)
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

torchs: Any = importlib.import_module("torch.distributed.checkpoint._experimental")

RANK = RankInfo(global_rank=0, global_world_size=1)
FILE = "checkpoint_0.pt"


def state() -> dict[str, Any]:
    weight = torch.arange(6.0).reshape(2, 3)
    return {
        "w": weight,
        "tied": weight,
        "part": weight[1],
        "0-d": torch.tensor(2, dtype=torch.int8),
        "empty": torch.empty(0, 3),
        "nested": {"list": [torch.ones(2), 3, {"x": torch.zeros(1)}], "step": 7},
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch's
@pytest.mark.parametrize("writes", [make_sync_checkpointer, torchs.make_sync_checkpointer])
@pytest.mark.parametrize("reads", [make_sync_checkpointer, torchs.make_sync_checkpointer])
def test_torchs_checkpointer_and_ours_read_each_others_files(
    writes: Any, reads: Any, tmp_path: Path
) -> None:
    writes().save(str(tmp_path), state())
    loaded = reads().load(str(tmp_path))
    assert equal(loaded, state())
    assert loaded["tied"].data_ptr() == loaded["w"].data_ptr()
    target = {"w": torch.zeros(2, 3), "nested": {"list": None, "step": None}}
    assert reads().load(str(tmp_path), target) is target
    assert torch.equal(target["w"], state()["w"])
    assert equal(target["nested"], state()["nested"])


def test_a_state_dict_is_filled_in_place_and_missing_keys_are_reported(tmp_path: Path) -> None:
    checkpointer = make_sync_checkpointer()
    checkpointer.save(str(tmp_path), state())
    mine: dict[str, Any] = {
        "w": torch.zeros(2, 3),
        "0-d": torch.tensor(0, dtype=torch.int8),
        "empty": torch.empty(0, 3),
        "nested": {"list": [torch.zeros(2)], "more": torch.zeros(1)},
        "new": 1,
    }
    memory = mine["w"].data_ptr(), mine["nested"]["list"][0].data_ptr()
    loaded, missing = CheckpointReader(RANK).read(str(tmp_path), mine)
    assert loaded is mine
    assert missing == ["nested.more", "new"]
    assert (mine["w"].data_ptr(), mine["nested"]["list"][0].data_ptr()) == memory
    assert mine["0-d"] == 2
    assert mine["nested"]["list"][1] == 3
    assert mine["new"] == 1
    with pytest.raises(RuntimeError, match=r"missing keys: \['nested.more', 'new'\]"):
        checkpointer.load(str(tmp_path), mine, strict=True)


def test_tensors_that_are_loaded_do_not_lie_in_the_file(tmp_path: Path) -> None:
    """Another save may cut the file off under a mapping."""
    checkpointer = make_sync_checkpointer()
    checkpointer.save(str(tmp_path), {"w": torch.ones(4096), "v": torch.ones(1)})
    whole = checkpointer.load(str(tmp_path))
    part = checkpointer.load(str(tmp_path), {"w": None})
    os.truncate(tmp_path / FILE, 0)
    assert whole["w"].sum() == part["w"].sum() == 4096


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"w": torch.zeros(3)}, "does not match source tensor .* for key w"),
        ({"w": torch.zeros(2, 3, dtype=torch.int64)}, "dtype=torch.int64 does not match"),
        ({"w": 3}, "Target value w is a int, but the checkpoint has a Tensor"),
        ({"nested": {"list": {}}}, "Target value nested.list is a dict"),
        ({"nested": {"list": [torch.zeros(3)]}}, r"for key nested.list\[0\]"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(
    target: Any, message: str, tmp_path: Path
) -> None:
    checkpointer = make_sync_checkpointer()
    checkpointer.save(str(tmp_path), state())
    with pytest.raises(RuntimeError, match=message):
        checkpointer.load(str(tmp_path), target)


@pytest.mark.parametrize("place", ["cpu", torch.device("cpu"), {"cpu": "cpu"}, lambda s, _: s])
def test_map_location_may_be_all_that_torch_load_takes(place: Any, tmp_path: Path) -> None:
    checkpointer = make_sync_checkpointer()
    checkpointer.save(str(tmp_path), state())
    assert equal(checkpointer.load(str(tmp_path), default_map_location=place), state())


def test_storages_are_moved_to_another_device_with_their_ties(tmp_path: Path) -> None:
    checkpointer = make_sync_checkpointer()
    checkpointer.save(str(tmp_path), state())
    loaded = checkpointer.load(str(tmp_path), default_map_location="meta")
    assert loaded["w"].is_meta
    assert loaded["nested"]["list"][0].shape == (2,)
    assert loaded["tied"] is loaded["w"]


def test_a_file_that_is_missing_or_damaged_or_untrusted_is_refused(tmp_path: Path) -> None:
    reader = CheckpointReader(RANK)
    with pytest.raises(FileNotFoundError, match="Checkpoint file not found at"):
        reader.read(str(tmp_path))
    CheckpointWriter(CheckpointWriterConfig(), RANK).write(str(tmp_path), state())
    good = (tmp_path / FILE).read_bytes()
    at = good.index(torch.arange(6.0).numpy().tobytes())
    for bad in (
        b"",
        b"not a zip",
        good[: len(good) // 2],
        good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :],
    ):
        (tmp_path / FILE).write_bytes(bad)
        with pytest.raises(CheckpointCorruptError):
            reader.read(str(tmp_path))
        with pytest.raises(CheckpointCorruptError):
            reader.read(str(tmp_path), {"w": torch.zeros(2, 3)})
    torch.save({"p": Path("x"), "thread": RunsCode()}, tmp_path / FILE)
    with pytest.raises(UntrustedPickleError):
        reader.read(str(tmp_path))
    assert not RunsCode.ran
    assert reader.read(str(tmp_path), weights_only=False)[0]["p"] == Path("x")
    assert RunsCode.ran


@pytest.mark.parametrize("place", [None, "cpu", {"cpu": "cpu"}, lambda s, _: s])
@pytest.mark.parametrize("first", [b"", b"ctorch._utils\n_rebuild_nested_tensor\n"])
def test_a_file_that_asks_for_memory_it_does_not_have_is_refused(
    first: bytes, place: Any, tmp_path: Path
) -> None:
    """`torch.load` with `weights_only` makes the 2 GB; a global of its own hands a file to it."""
    many = b"cbuiltins\nbytearray\nJ" + (0x7F000000).to_bytes(4, "little") + b"\x85R"
    with zipfile.ZipFile(tmp_path / FILE, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02](" + first + many + b"e.")
        archive.writestr("archive/version", "3\n")
    with pytest.raises((CheckpointCorruptError, UntrustedPickleError)):
        CheckpointReader(RANK).read(str(tmp_path), map_location=place)


class RunsCode:
    """Runs code when it is unpickled."""

    ran = False

    @staticmethod
    def run() -> int:
        RunsCode.ran = True
        return 3

    def __reduce__(self) -> Any:
        return RunsCode.run, ()


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_earlier_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(CheckpointWriterConfig(), RANK)
    writer.write(str(tmp_path), state())

    def fails(self: Any, data: Any) -> int:
        raise error

    monkeypatch.setattr(writer_module._Stream, "write", fails)
    with pytest.raises(type(error)):
        writer.write(str(tmp_path), {"w": torch.zeros(1)})
    assert os.listdir(tmp_path) == [FILE]
    assert equal(CheckpointReader(RANK).read(str(tmp_path))[0], state())


def test_leftovers_of_a_killed_writer_are_removed_by_the_next_of_its_rank(tmp_path: Path) -> None:
    for name in (f".{FILE}.0a0b0c0d.tmp", ".checkpoint_1.pt.0a0b0c0d.tmp", "notes.tmp"):
        (tmp_path / name).write_text("left")
    CheckpointWriter(CheckpointWriterConfig(), RANK).write(str(tmp_path), state())
    assert sorted(os.listdir(tmp_path)) == [".checkpoint_1.pt.0a0b0c0d.tmp", FILE, "notes.tmp"]


def test_a_file_is_synced_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(fd: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        real_fsync(fd)

    def replace(self: Path, target: Any) -> Any:
        done.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    CheckpointWriter(CheckpointWriterConfig(), RANK).write(str(tmp_path / "new"), state())
    assert done == ["file", "rename", "folder", "folder"]


class Notes(WriterHook):
    """Notes what is there when it is called."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        self.calls.append(("pre", os.listdir(path), kwargs))

    def post_commit(self, path: str, **kwargs: Any) -> None:
        self.calls.append(("post", os.listdir(path), kwargs))


class NotesToo(Barrier):
    barrier_type = "notes of a test"

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def execute_barrier(self) -> None:
        self.calls.append("barrier")


def test_hooks_are_called_around_the_barrier_with_the_file_there(tmp_path: Path) -> None:
    hook = Notes()
    register_barrier(NotesToo)
    try:
        config = CheckpointerConfig(
            barrier_config=BarrierConfig("notes of a test", {"calls": hook.calls})
        )
        checkpointer = make_sync_checkpointer(config, commit_hook=hook)
    finally:
        del BARRIER_REGISTRY["notes of a test"]
    checkpointer.save(str(tmp_path), state(), step=3)
    checkpointer.close()
    assert hook.calls == [("pre", [FILE], {"step": 3}), "barrier", ("post", [FILE], {"step": 3})]


def test_a_barrier_of_no_registered_type_is_refused() -> None:
    assert create_barrier_from_config(BarrierConfig()) is None
    with pytest.raises(ValueError, match=r"Unknown barrier type: nothing. Available types: .*tcp"):
        create_barrier_from_config(BarrierConfig("nothing"))
    with pytest.raises(AssertionError, match="initialized process group"):
        create_barrier_from_config(BarrierConfig("dist_barrier"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def barrier_of(rank: int, size: int, port: int, timeout_s: int) -> Any:
    return create_barrier_from_config(
        BarrierConfig(
            "tcp_store",
            {
                "global_rank": rank,
                "global_world_size": size,
                "barrier_prefix": "save",
                "timeout_barrier_init_secs": 120,
                "use_checkpoint_barrier_tcpstore_libuv": True,
                "tcpstore_port": port,
                "master_address": "127.0.0.1",
                "timeout_secs": timeout_s,
            },
        )
    )


def in_threads(jobs: list[Any]) -> list[Any]:
    results: list[Any] = [None] * len(jobs)

    def run(n: int) -> None:
        try:
            results[n] = jobs[n]()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results[n] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
        assert not thread.is_alive()
    return results


def test_no_rank_leaves_a_barrier_before_all_have_come() -> None:
    port, size, rounds = free_port(), 3, 4
    log: list[tuple[str, int]] = []

    def rank_of(rank: int) -> Any:
        barrier = barrier_of(rank, size, port, 120)
        for n in range(rounds):
            log.append(("came", n))
            barrier.execute_barrier()
            log.append(("left", n))

    assert in_threads([lambda r=r: rank_of(r) for r in range(size)]) == [None] * size
    for n in range(rounds):
        first_out = log.index(("left", n))
        assert log[:first_out].count(("came", n)) == size


def test_a_barrier_names_the_ranks_that_do_not_come() -> None:
    port = free_port()

    def comes(rank: int) -> Any:
        barrier = barrier_of(rank, 3, port, 1)
        if rank < 2:
            barrier.execute_barrier()
        return barrier  # Keeps the store open for the others.

    here, too, absent = in_threads([lambda r=r: comes(r) for r in range(3)])
    for error in (here, too):
        assert isinstance(error, TimeoutError)
        assert "for ranks [2]" in str(error)
    assert isinstance(absent, TCPStoreBarrier)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("barriers", "DistBarrier"),
        ("barriers", "TCPStoreBarrier"),
        ("checkpoint_process", "CheckpointProcess"),
        ("checkpoint_reader", "CheckpointReader"),
        ("checkpoint_writer", "CheckpointWriter"),
        ("checkpointer", "AsyncCheckpointer"),
        ("checkpointer", "SyncCheckpointer"),
        ("staging", "DefaultStager"),
    ],
)
def test_ours_pass_for_torchs(module: str, name: str) -> None:
    theirs = getattr(importlib.import_module(f"{torchs.__name__}.{module}"), name)
    ours = getattr(importlib.import_module(f"pytest_dcp.checkpoint._experimental.{module}"), name)
    assert issubclass(ours, theirs)
    assert ours is not theirs


def test_the_ranks_number_is_in_the_files_name(tmp_path: Path) -> None:
    rank = RankInfo(global_rank=3, global_world_size=4)
    checkpointer = make_sync_checkpointer(rank_info=rank)
    assert type(checkpointer) is SyncCheckpointer
    checkpointer.save(str(tmp_path), {"n": 3})
    assert os.listdir(tmp_path) == ["checkpoint_3.pt"]
    assert checkpointer.load(str(tmp_path)) == {"n": 3}


def test_the_registered_barriers_are_torchs() -> None:
    assert BARRIER_REGISTRY["dist_barrier"] is DistBarrier
    assert set(BARRIER_REGISTRY) >= set(torchs.barriers.BARRIER_REGISTRY)
