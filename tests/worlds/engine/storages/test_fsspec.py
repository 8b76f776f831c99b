"""Checkpoints by URL: in memory, in files, and in an object store that has no rename."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.registry import known_implementations
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader as TorchReader
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter as TorchWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io import object_disk
from pytest_dcp.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from support import object_store
from support.object_store import objects, requests, settle
from support.states import EXISTING, blank, numbered, same, spread, torch_dcp, without_warnings

URL = f"{object_store.PROTOCOL}://runs/last"
FOLDER = "runs/last"
SIZES = {"norm": 4 << 10, "weight": 50 << 10}
"""Elements: 16 KiB, which is small, and 200 KiB."""


def state(n: int = 0) -> dict[str, Any]:
    return {
        "big": numbered(300, 100, start=n),
        "many": {str(i): numbered(5, start=n + i) for i in range(50)},
        "value": {"n": n},
    }


def found(like: dict[str, Any], **where: Any) -> dict[str, Any]:
    """Load the checkpoint; returns the state."""
    target: dict[str, Any] = blank(like)
    dcp.load(target, **where)
    return target


def failure_of(state: dict[str, Any], writer: FsspecWriter) -> str | None:
    """The error text of a save over another checkpoint, or None."""
    try:
        with without_warnings(EXISTING):
            dcp.save(state, storage_writer=writer)
    except CheckpointException as error:
        return str(error)
    return None


@pytest.fixture
def store(checkpoint_dir: Path) -> Path:
    """The root of an empty object store, which listings show."""
    settle(checkpoint_dir)
    return checkpoint_dir


@pytest.mark.world_size(1, isolation="module")
class TestOneRank:
    def test_memory(self) -> None:
        for n in (1, 2):
            with without_warnings(EXISTING):
                dcp.save(state(n), checkpoint_id="memory://a/b")
            assert same(found(state(), checkpoint_id="memory://a/b"), state(n))
            assert same(dcp.load_without_template(checkpoint_id="memory://a/b"), state(n))
        names = fsspec.filesystem("memory").ls("/a/b", detail=False)
        assert len(names) == 2
        fsspec.filesystem("memory").rm("/a", recursive=True)

    def test_torch_reads_ours_and_we_read_torchs(self) -> None:
        dcp.save(state(1), checkpoint_id="memory://ours")
        target = blank(state())
        torch_dcp.load(target, storage_reader=TorchReader("memory://ours"))
        assert same(target, state(1))
        torch_dcp.save(state(2), storage_writer=TorchWriter("memory://theirs"))
        assert same(found(state(), checkpoint_id="memory://theirs"), state(2))
        # Ours inside of torch's engine, by its choice of a storage too.
        torch_dcp.save(state(3), storage_writer=FsspecWriter("memory://mixed"))
        target = blank(state())
        torch_dcp.load(target, checkpoint_id="memory://mixed")
        assert same(target, state(3))
        for name in ("ours", "theirs", "mixed"):
            fsspec.filesystem("memory").rm(f"/{name}", recursive=True)

    def test_a_file_url_is_the_local_disk(self, checkpoint_dir: Path) -> None:
        where = f"file://{checkpoint_dir}/c"
        dcp.save(state(1), checkpoint_id=where)
        assert same(found(state(), checkpoint_id=checkpoint_dir / "c"), state(1))
        assert same(found(state(), checkpoint_id=where), state(1))
        assert FsspecWriter(where).fs is not None
        assert type(FsspecWriter(where).fs) is type(dcp.FileSystemWriter(checkpoint_dir).fs)
        assert FsspecReader(str(checkpoint_dir)).path == checkpoint_dir

    def test_overwrite_false_refuses(self, store: Path) -> None:
        writer = FsspecWriter(URL, overwrite=False, root=str(store))
        dcp.save(state(1), storage_writer=writer)
        with pytest.raises(CheckpointException, match="already exists"):
            dcp.save(state(2), storage_writer=writer)
        assert same(found(state(), storage_reader=FsspecReader(URL, root=str(store))), state(1))

    def test_the_commit_is_one_put_and_comes_last(self, store: Path) -> None:
        dcp.save(state(1), storage_writer=FsspecWriter(URL, root=str(store), thread_count=3))
        changes = [request[:2] for request in requests(store) if request[0] not in ("get", "list")]
        assert [what for what, _ in changes] == ["put"] * 4
        assert changes[-1][1] == f"{FOLDER}/.metadata"
        assert len({name for _, name in changes}) == 4

    def test_only_the_ranges_that_are_needed_are_fetched(self, store: Path) -> None:
        dcp.save(state(1), storage_writer=FsspecWriter(URL, root=str(store)))
        (store / "requests").write_text("")
        reader = FsspecReader(URL, root=str(store))
        target = {"many": {"7": torch.zeros(5)}}
        dcp.load(target, storage_reader=reader)
        assert same(target["many"]["7"], state(1)["many"]["7"])
        asked = [request for request in requests(store) if request[0] == "get"]
        assert [name for _, name, _ in asked].count(f"{FOLDER}/.metadata") == 1
        fetched = sum(nbytes for _, name, nbytes in asked if not name.endswith(".metadata"))
        assert 20 <= fetched <= 64 << 10

    @pytest.mark.parametrize("verify", ["auto", "off"])
    def test_bytes_between_small_tensors_are_fetched_once(
        self, store: Path, verify: Literal["auto", "off"]
    ) -> None:
        layers = {
            f"{n}.{kind}": torch.rand(size) for n in range(20) for kind, size in SIZES.items()
        }
        dcp.save(layers, storage_writer=FsspecWriter(URL, root=str(store), thread_count=1))
        (store / "requests").write_text("")
        reader = FsspecReader(URL, root=str(store))
        target = {name: torch.zeros_like(value) for name, value in layers.items()}
        dcp.load(target, storage_reader=reader, verify=verify)
        assert same(target, layers)
        fetched = sum(n for how, name, n in requests(store) if how == "get" and "__0_" in name)
        assert fetched <= 1.3 * sum(value.nbytes for value in layers.values())

    def test_neighbouring_entries_are_fetched_together(self, store: Path) -> None:
        dcp.save(state(1), storage_writer=FsspecWriter(URL, root=str(store)))
        (store / "requests").write_text("")
        found(state(), storage_reader=FsspecReader(URL, root=str(store), thread_count=1))
        assert len(requests(store)) < 10, requests(store)

    def test_an_old_listing_hides_and_harms_nothing(self, store: Path) -> None:
        writer = FsspecWriter(URL, root=str(store))
        reader = FsspecReader(URL, root=str(store))
        with without_warnings(EXISTING):
            dcp.save(state(1), storage_writer=writer)
            # The listing is empty still.
            dcp.save(state(2), storage_writer=writer)
            assert same(found(state(), storage_reader=reader), state(2))
            # It shows files that are gone at the end of this save, and not those of this save.
            settle(store)
            dcp.save(state(3), storage_writer=writer)
            assert same(found(state(), storage_reader=reader), state(3))
            dcp.save(state(4), storage_writer=writer)
            assert same(found(state(), storage_reader=reader), state(4))
            # Files that listings hid are found and removed as soon as listings show them.
            settle(store)
            dcp.save(state(5), storage_writer=writer)
        assert same(found(state(), storage_reader=reader), state(5))
        assert len(objects(store, FOLDER)) == 2

    @pytest.mark.parametrize("one_put_bytes", [object_disk.ONE_PUT_BYTES, 1 << 10])
    def test_a_request_that_fails_leaves_the_old_checkpoint_or_the_new(
        self, store: Path, one_put_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(object_disk, "ONE_PUT_BYTES", one_put_bytes)
        reader = FsspecReader(URL, root=str(store))
        dcp.save(state(0), storage_writer=FsspecWriter(URL, root=str(store)))
        old, failed = 0, 0
        for number in range(1, 60):
            settle(store)
            writer = FsspecWriter(URL, root=str(store), fail_at=number - 1)
            error = failure_of(state(number), writer)
            assert error is None or "503 Slow Down" in error
            failed += error is not None
            old = number if error is None else old
            assert same(found(state(), storage_reader=reader), state(old))
            if writer.fs.fs.changes < number:  # type: ignore[attr-defined]  # the fake's
                break
        else:
            raise AssertionError("a save that never makes fewer requests")
        assert failed >= 2
        settle(store)
        with without_warnings(EXISTING):
            dcp.save(state(99), storage_writer=FsspecWriter(URL, root=str(store)))
        assert len(objects(store, FOLDER)) == 2

    def test_a_long_file_is_sent_as_a_stream(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(object_disk, "ONE_PUT_BYTES", 1 << 10)
        monkeypatch.setattr(object_disk, "GET_BYTES", 1 << 12)
        dcp.save(state(1), storage_writer=FsspecWriter(URL, root=str(store)))
        assert "part" in {request[0] for request in requests(store)}
        assert same(found(state(), storage_reader=FsspecReader(URL, root=str(store))), state(1))

    def test_options_stay_when_the_place_changes_and_travel(self, store: Path) -> None:
        writer = FsspecWriter(URL, root=str(store))
        other = URL.replace("last", "other")
        dcp.save(state(1), storage_writer=pickle.loads(pickle.dumps(writer)), checkpoint_id=other)
        reader = FsspecReader(URL, root=str(store))
        assert same(found(state(), storage_reader=reader, checkpoint_id=other), state(1))
        assert objects(store, FOLDER) == set()

    def test_an_unknown_protocol_is_named(self) -> None:
        with pytest.raises(RuntimeError, match=r"'nosuch://a/b' is: .*specify the storage_writer"):
            dcp.save({"v": 1}, checkpoint_id="nosuch://a/b")
        with pytest.raises(RuntimeError, match=r"'nosuch://a/b' is: .*specify the storage_reader"):
            dcp.load({"v": 1}, checkpoint_id="nosuch://a/b")

    def test_a_package_that_is_missing_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lacking = {"class": "no_such_package.Files", "err": "Install no_such_package"}
        monkeypatch.setitem(known_implementations, "lacking", lacking)
        with pytest.raises(ImportError, match="'lacking://a' cannot be reached: Install no_such"):
            dcp.save({"v": 1}, checkpoint_id="lacking://a")

    def test_a_missing_checkpoint_is_said_to_be_missing(self, store: Path) -> None:
        with pytest.raises(CheckpointException, match="no checkpoint in fakestore://runs/last"):
            found({"v": 1}, storage_reader=FsspecReader(URL, root=str(store)))


@pytest.mark.world_size(2, isolation="module")
class TestTwoRanks:
    def test_any_layout_into_any_other(self, store: Path, device_mesh: DeviceMesh) -> None:
        full = numbered(7, 6)
        writer = FsspecWriter(URL, root=str(store))
        dist.barrier()
        dcp.save({"t": spread(full, device_mesh, Shard(0)), "v": [1]}, storage_writer=writer)
        settle(store)
        dist.barrier()
        for placement in (Shard(0), Shard(1), Replicate()):
            wanted = spread(full, device_mesh, placement)
            reader = FsspecReader(URL, root=str(store))
            got = found({"t": wanted, "v": None}, storage_reader=reader)
            assert same(got, {"t": wanted, "v": [1]})

    def test_ranks_that_commit_apart(self, store: Path, device_mesh: DeviceMesh) -> None:
        mine = {"t": spread(numbered(6), device_mesh, Shard(0))}
        writer = FsspecWriter(URL, root=str(store))
        dist.barrier()
        for n in (1, 2, 3):
            mine["t"].to_local().add_(n)
            with without_warnings(EXISTING):
                dcp.save(mine, storage_writer=writer, use_collectives=False)
            dist.barrier()
            got = found(mine, storage_reader=FsspecReader(URL, root=str(store)))
            assert same(got, mine)
            if n == 2:
                settle(store)
            dist.barrier()

    def test_a_failing_rank_leaves_the_old_one(self, store: Path, rank: int) -> None:
        mine = {"t": torch.full((3,), 1.0), f"own {rank}": numbered(4)}
        dist.barrier()
        dcp.save(mine, storage_writer=FsspecWriter(URL, root=str(store)))
        writer = FsspecWriter(URL, root=str(store), fail_at=0 if rank == 1 else -1)
        mine["t"].zero_()
        with without_warnings(EXISTING), pytest.raises(CheckpointException) as caught:
            dcp.save(mine, storage_writer=writer)
        assert list(caught.value.failures) == [1]
        dist.barrier()
        got = found(mine, storage_reader=FsspecReader(URL, root=str(store)))
        assert got["t"].tolist() == [1, 1, 1]
