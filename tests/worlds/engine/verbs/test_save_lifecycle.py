"""A folder through many saves: in the background, one over another, failed, each rank on its own.

The rule behind all: a load finds the last save that was committed, whole.
"""

from __future__ import annotations

import os
import threading
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.state_dict_saver import AsyncSaveResponse
from pytest_dcp.errors import CheckpointExistsError
from support.states import EXISTING, blank, numbered, same, spread, torch_dcp, without_warnings

pytestmark = pytest.mark.world_size(2, isolation="module")

WAIT_S = 60


def state(mesh: DeviceMesh, n: int = 0) -> dict[str, Any]:
    """The n-th of a series of states."""
    return {
        "plain": numbered(3, start=1 + n),
        "sharded": spread(numbered(5, 2, start=100 + n), mesh, Shard(0)),
        "value": {"n": n, "list": [n, [n]]},
    }


def found(folder: Path | str, like: dict[str, Any]) -> dict[str, Any]:
    """Load the checkpoint; returns the state."""
    target = blank(like)
    dcp.load(target, checkpoint_id=folder)
    return target  # type: ignore[no-any-return]  # blank keeps the type


def save(state: dict[str, Any], folder: Path | str, **options: Any) -> Metadata:
    """Save, over any existing checkpoint."""
    with without_warnings(EXISTING):
        return dcp.save(state, checkpoint_id=folder, **options)


def save_id_of(metadata: Metadata) -> str:
    """Of the save that wrote it."""
    meta = metadata.storage_meta
    assert meta is not None
    assert meta.save_id is not None
    return meta.save_id


def own_save_id(folder: Path, rank: int) -> str:
    """Of what a rank saved on its own."""
    return save_id_of(dcp.FileSystemReader(folder).read_metadata(rank=rank))


def data_files(folder: Path) -> set[str]:
    """The names of data files."""
    return {path.name for path in folder.iterdir() if path.suffix == ".distcp"}


class Held(dcp.DefaultSavePlanner):
    """Does not begin before it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def create_local_plan(self) -> dcp.SavePlan:
        if not self.go_on.wait(WAIT_S):
            raise TimeoutError("nobody let the save go on")
        return super().create_local_plan()


class FailingWriter(dcp.FileSystemWriter):
    """Fails in a hook, after its work but for `finish`, on one rank."""

    def __init__(self, path: Path, hook: str, rank: int, **options: Any) -> None:
        super().__init__(path, **options)
        self.hook, self.failing_rank = hook, rank

    def fail(self, hook: str) -> None:
        if (hook, dist.get_rank()) == (self.hook, self.failing_rank):
            raise OSError(f"no space left in {hook}")

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        plan = super().prepare_local_plan(plan)
        self.fail("prepare_local_plan")
        return plan

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        future = super().write_data(plan, planner)
        self.fail("write_data")
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.fail("finish")
        super().finish(metadata, results)


class Stager(AsyncStager):
    """Copies as configured; records its calls."""

    def __init__(self, synchronize: bool = False, later: bool = True) -> None:
        self._synchronize_after_execute = synchronize
        self.later = later
        self.future: Future[dict[str, Any]] = Future()
        self.calls: list[str] = []

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> Any:
        self.calls.append("stage")
        self.asked = state_dict
        return self.future if self.later else dict(state_dict)

    def synchronize_staging(self) -> None:
        self.calls.append("synchronize_staging")

    def close(self) -> None:
        self.calls.append("close")


def response(started: Any) -> AsyncSaveResponse:
    assert isinstance(started, AsyncSaveResponse)
    return started


def uploading(started: Any) -> Future[Metadata]:
    assert isinstance(started, Future)
    return started


Pair = namedtuple("Pair", ["one", "other"])


class TestInTheBackground:
    def test_changes_after_the_return_are_not_saved(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh
    ) -> None:
        mine = state(device_mesh) | {
            "strided": numbered(4, 3).t()[::2],
            "in a list": [numbered(2), {"t": numbered(1)}],
            "in a tuple": (numbered(2), 1),
            "parameter": torch.nn.Parameter(numbered(2)),
        }
        planner = Held()
        started = dcp.async_save(mine, checkpoint_id=checkpoint_dir, planner=planner)
        assert isinstance(started, Future)
        assert not started.done()
        assert not (checkpoint_dir / ".metadata").exists()
        for tensor in (
            mine["plain"],
            mine["sharded"].to_local(),
            mine["strided"],
            mine["in a list"][0],
            mine["in a list"][1]["t"],
            mine["in a tuple"][0],
            mine["parameter"].data,
        ):
            tensor.fill_(-1)
        mine["value"]["n"] = -1
        mine["value"]["list"].append(-1)
        mine["value"]["list"][1].append(-1)
        del mine["in a list"][1]
        planner.go_on.set()
        assert isinstance(started.result(WAIT_S), Metadata)
        expected = state(device_mesh) | {
            "strided": numbered(4, 3).t()[::2].contiguous(),
            "in a list": [numbered(2), {"t": numbered(1)}],
            "in a tuple": (numbered(2), 1),
            "parameter": numbered(2),
        }
        assert same(found(checkpoint_dir, expected), expected)

    @pytest.mark.filterwarnings("ignore:1 value.s. of this save are refused by load:UserWarning")
    @pytest.mark.parametrize("kind", ["set", "bytearray", "inner set", "named tuple"])
    def test_values_that_are_changed_are_saved_as_they_were(
        self, checkpoint_dir: Path, kind: str
    ) -> None:
        def made() -> Any:
            return {
                "set": {1, 2},
                "bytearray": bytearray(b"ab"),
                "inner set": [numbered(1), {"x": {3}}],
                "named tuple": Pair(numbered(2), [1]),
            }[kind]

        mine = made()
        planner = Held()
        started = uploading(
            dcp.async_save({"v": mine}, checkpoint_id=checkpoint_dir, planner=planner)
        )
        change: dict[str, Callable[[], Any]] = {
            "set": lambda: mine.add(3),
            "bytearray": lambda: mine.extend(b"c"),
            "inner set": lambda: mine[1]["x"].add(4),
            "named tuple": lambda: mine.one.fill_(-1),
        }
        change[kind]()
        planner.go_on.set()
        started.result(WAIT_S)
        loaded = dcp.load_without_template(checkpoint_id=checkpoint_dir, weights_only=False)
        assert same(loaded["v"], made())

    def test_objects_are_asked_for_their_state_before_the_return(
        self, checkpoint_dir: Path
    ) -> None:
        class Asked:
            thread: threading.Thread | None = None

            def state_dict(self) -> dict[str, Any]:
                self.thread = threading.current_thread()
                return {"n": 1}

            def load_state_dict(self, state: dict[str, Any]) -> None:
                raise NotImplementedError

        mine = Asked()
        started = dcp.async_save({"a": mine}, checkpoint_id=checkpoint_dir)
        assert mine.thread is threading.current_thread()
        uploading(started).result(WAIT_S)
        assert found(checkpoint_dir, {"a": {"n": 0}}) == {"a": {"n": 1}}

    def test_a_failure_arrives_in_the_future_of_every_rank(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh
    ) -> None:
        save(state(device_mesh, 1), checkpoint_dir)
        writer = FailingWriter(checkpoint_dir, "write_data", 1)
        with without_warnings(EXISTING):
            started = dcp.async_save(state(device_mesh, 2), storage_writer=writer)
            error = uploading(started).exception(WAIT_S)
        assert isinstance(error, CheckpointException)
        assert list(error.failures) == [1]
        assert "no space left in write_data" in str(error)
        assert same(found(checkpoint_dir, state(device_mesh)), state(device_mesh, 1))

    def test_one_after_another(self, checkpoint_dir: Path, device_mesh: DeviceMesh) -> None:
        mine = state(device_mesh, 1)
        with without_warnings(EXISTING):
            for n in (1, 2, 3):
                mine |= state(device_mesh, n)
                metadata = uploading(dcp.async_save(mine, checkpoint_id=checkpoint_dir)).result(
                    WAIT_S
                )
        assert same(found(checkpoint_dir, mine), state(device_mesh, 3))
        assert all(save_id_of(metadata)[:12] in name for name in data_files(checkpoint_dir))

    def test_a_stager_may_take_its_time(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh
    ) -> None:
        stager = Stager(synchronize=True)
        mine = state(device_mesh, 1)
        started = response(dcp.async_save(mine, checkpoint_id=checkpoint_dir, async_stager=stager))
        assert not started.staging_completion.done()
        assert not started.upload_completion.done()
        assert same(stager.asked, mine)
        stager.future.set_result(state(device_mesh, 2))
        assert started.staging_completion.exception(WAIT_S) is None
        metadata: Any = started.upload_completion.result(WAIT_S)
        assert isinstance(metadata, Metadata)
        assert same(found(checkpoint_dir, mine), state(device_mesh, 2))
        assert stager.calls == ["stage"]

    @pytest.mark.parametrize("synchronize", [True, False])
    def test_a_stager_that_is_done_is_synchronised_if_it_wishes(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, synchronize: bool
    ) -> None:
        stager = Stager(synchronize, later=False)
        mine = state(device_mesh, 1)
        started = dcp.async_save(mine, checkpoint_id=checkpoint_dir, async_stager=stager)
        assert stager.calls == ["stage"] + ["synchronize_staging"] * synchronize
        uploading(started).result(WAIT_S)
        assert same(found(checkpoint_dir, mine), mine)

    @pytest.mark.parametrize("later", [True, False])
    def test_torchs_stager_works(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, later: bool
    ) -> None:
        mine, planner = state(device_mesh, 1), Held()
        stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=later,
                use_non_blocking_copy=False,
            )
        )
        started = dcp.async_save(
            mine, checkpoint_id=checkpoint_dir, async_stager=stager, planner=planner
        )
        if later:
            response(started).staging_completion.result(WAIT_S)
        mine["plain"].fill_(-1)
        planner.go_on.set()
        (response(started).upload_completion if later else uploading(started)).result(WAIT_S)
        stager.close()
        assert same(found(checkpoint_dir, mine), state(device_mesh, 1))

    def test_a_stager_that_fails_everywhere_fails_both_futures(self, checkpoint_dir: Path) -> None:
        stager = Stager()
        started = response(
            dcp.async_save({"v": 1}, checkpoint_id=checkpoint_dir, async_stager=stager)
        )
        stager.future.set_exception(MemoryError("no room to stage"))
        for future in (started.staging_completion, started.upload_completion):
            assert "no room to stage" in str(future.exception(WAIT_S))
        assert not (checkpoint_dir / ".metadata").exists()

    def test_a_stager_that_fails_on_one_rank_is_named_on_the_others(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        impatient = dist.new_group(timeout=timedelta(seconds=1.5))
        stager = Stager()
        started = response(
            dcp.async_save(
                {"v": 1},
                checkpoint_id=checkpoint_dir,
                async_stager=stager,
                process_group=impatient,
            )
        )
        if rank == 1:
            stager.future.set_exception(MemoryError("no room to stage"))
        else:
            stager.future.set_result({"v": 1})
        error = started.upload_completion.exception(WAIT_S)
        assert "no room to stage" in str(error)


class TestOneOverAnother:
    def test_the_old_checkpoint_is_loaded_until_the_commit(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int
    ) -> None:
        old, new = state(device_mesh, 1), state(device_mesh, 2)
        seen: list[str] = []

        class Watched(dcp.FileSystemWriter):
            def look(self, hook: str) -> None:
                target = {"plain": torch.zeros(3), "value": blank(old["value"])}
                with without_warnings():
                    dcp.load(target, checkpoint_id=checkpoint_dir, no_dist=True)
                assert same(target, {"plain": old["plain"], "value": old["value"]})
                seen.append(hook)

            def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
                plan = super().prepare_local_plan(plan)
                self.look("prepare")
                return plan

            def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
                future = super().write_data(plan, planner)
                self.look("write")
                return future

            def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
                self.look("finish")
                super().finish(metadata, results)

        save(old, checkpoint_dir)
        with without_warnings(EXISTING):
            dcp.save(new, storage_writer=Watched(checkpoint_dir))
        assert seen == ["prepare", "write", *(["finish"] if rank == 0 else [])]
        assert same(found(checkpoint_dir, old), new)

    @pytest.mark.parametrize(
        ("hook", "failing"), [("prepare_local_plan", 1), ("write_data", 1), ("finish", 0)]
    )
    def test_the_old_checkpoint_survives_a_save_that_fails_and_the_next_cleans_up(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, hook: str, failing: int
    ) -> None:
        save(state(device_mesh, 1), checkpoint_dir)
        old = {p.name: p.read_bytes() for p in checkpoint_dir.iterdir()}
        dist.barrier()
        for _ in range(2):
            writer = FailingWriter(checkpoint_dir, hook, failing)
            with without_warnings(EXISTING), pytest.raises(CheckpointException) as caught:
                dcp.save(state(device_mesh, 2), storage_writer=writer)
            assert list(caught.value.failures) == [failing]
            now = {p.name: p.read_bytes() for p in checkpoint_dir.iterdir()}
            assert old.items() <= now.items()
            assert same(found(checkpoint_dir, state(device_mesh)), state(device_mesh, 1))
        metadata = save(state(device_mesh, 3), checkpoint_dir)
        names = {place.relative_path for place in metadata.storage_data.values()}
        assert {p.name for p in checkpoint_dir.iterdir()} == names | {".metadata"}
        assert same(found(checkpoint_dir, state(device_mesh)), state(device_mesh, 3))

    def test_only_leftovers_of_dead_saves_are_removed(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        dead = [
            "__0_0-deadbeef0123.distcp",
            "__7_31-0123456789ab.distcp",
            "__0_0.distcp",
            "__12.metadata",
            ".metadata.tmp",
            ".metadata-deadbeef0123.tmp",
            "__3.metadata-deadbeef0123.tmp",
        ]
        foreign = [
            "notes.txt",
            ".hidden",
            "metadata",
            "model.safetensors",
            "__0_0.distcp.bak",
            "x__0_0.distcp",
            "__a_0.distcp",
            "__0_0-deadbeef0123.distcp.tmp",
            ".metadata.bak",
            "__0.metadata.json",
            "sub/__0_0-deadbeef0123.distcp",
            "sub/.metadata-deadbeef0123.tmp",
        ]
        if rank == 0:
            (checkpoint_dir / "sub").mkdir()
            for name in dead + foreign:
                (checkpoint_dir / name).write_text(name)
        dist.barrier()
        save({"w": numbered(3)}, checkpoint_dir)
        assert not [name for name in dead if (checkpoint_dir / name).exists()]
        assert all((checkpoint_dir / name).read_text() == name for name in foreign)

    def test_a_checkpoint_of_torchs_is_replaced(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh
    ) -> None:
        torch_dcp.save(state(device_mesh, 1), checkpoint_id=checkpoint_dir)
        before = data_files(checkpoint_dir)
        dist.barrier()
        save(state(device_mesh, 2), checkpoint_dir)
        assert not before & data_files(checkpoint_dir)
        assert same(found(checkpoint_dir, state(device_mesh)), state(device_mesh, 2))

    def test_a_folder_is_never_taken_for_a_data_file(self, checkpoint_dir: Path, rank: int) -> None:
        folder = checkpoint_dir / "__0_0-deadbeef0123.distcp"
        if rank == 0:
            folder.mkdir()
        dist.barrier()
        save({"w": numbered(3)}, checkpoint_dir)
        assert folder.is_dir()

    def test_an_existing_checkpoint_is_left_where_overwriting_is_forbidden(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh
    ) -> None:
        writer = dcp.FileSystemWriter(checkpoint_dir, overwrite=False)
        dcp.save(state(device_mesh, 1), storage_writer=writer)
        old = {p.name: p.read_bytes() for p in checkpoint_dir.iterdir()}
        dist.barrier()
        for again in (writer, dcp.FileSystemWriter(checkpoint_dir, overwrite=False)):
            with pytest.raises(CheckpointException, match="already exists") as caught:
                dcp.save(state(device_mesh, 2), storage_writer=again)
            assert list(caught.value.failures) == [0, 1]
            assert isinstance(caught.value.failures[0][0], CheckpointExistsError)
            assert str(checkpoint_dir) in str(caught.value)
        assert {p.name: p.read_bytes() for p in checkpoint_dir.iterdir()} == old
        assert same(found(checkpoint_dir, state(device_mesh)), state(device_mesh, 1))

    def test_leftovers_of_a_dead_save_are_no_checkpoint(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        if rank == 0:
            (checkpoint_dir / "__0_0-deadbeef0123.distcp").write_text("dead")
        dist.barrier()
        writer = dcp.FileSystemWriter(checkpoint_dir, overwrite=False)
        dcp.save({"v": 1}, storage_writer=writer)
        assert found(checkpoint_dir, {"v": 0}) == {"v": 1}

    @pytest.mark.parametrize("how", ["one writer", "reset", "new writers"])
    def test_no_file_is_shared_by_two_saves_and_each_is_named_after_its_own(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, how: str
    ) -> None:
        writer = dcp.FileSystemWriter(checkpoint_dir)
        earlier: set[str] = set()
        ids: set[str] = set()
        for n in range(3):
            if how == "new writers":
                writer = dcp.FileSystemWriter(checkpoint_dir)
            elif how == "reset":
                writer.reset(checkpoint_dir if n else None)
            with without_warnings(EXISTING):
                metadata = dcp.save(state(device_mesh, n), storage_writer=writer)
            save_id = save_id_of(metadata)
            names = data_files(checkpoint_dir)
            assert names
            assert all(f"-{save_id[:12]}." in name for name in names)
            assert not names & earlier
            assert save_id not in ids
            earlier |= names
            ids.add(save_id)
            assert same(found(checkpoint_dir, state(device_mesh)), state(device_mesh, n))

    def test_a_planner_is_informed_of_the_save_that_is_made(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        told: list[StorageMeta | None] = []

        class Told(dcp.DefaultSavePlanner):
            def set_up_planner(
                self,
                state_dict: dict[str, Any],
                storage_meta: StorageMeta | None = None,
                is_coordinator: bool = False,
            ) -> None:
                told.append(storage_meta)
                super().set_up_planner(state_dict, storage_meta, is_coordinator)

        writer = dcp.FileSystemWriter(checkpoint_dir)
        for n in range(2):
            with without_warnings(EXISTING):
                metadata = dcp.save({"v": n}, storage_writer=writer, planner=Told())
            (meta,) = told[n:]
            assert meta is not None
            assert rank or meta.save_id == save_id_of(metadata), n

    def test_an_object_that_fails_on_one_rank_is_named_on_the_others(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        class Broken:
            def state_dict(self) -> dict[str, Any]:
                if rank == 1:
                    raise MemoryError("no state today")
                return {"n": 1}

            def load_state_dict(self, state: dict[str, Any]) -> None:
                raise NotImplementedError

        impatient = dist.new_group(timeout=timedelta(seconds=1.5))
        error: BaseException | None = None
        try:
            dcp.save({"a": Broken()}, checkpoint_id=checkpoint_dir, process_group=impatient)
        except (CheckpointException, MemoryError) as caught:
            error = caught
        assert isinstance(error, CheckpointException)
        assert list(error.failures) == [1]
        assert "no state today" in str(error)


class TestSettings:
    @pytest.mark.parametrize("sync", [True, False])
    def test_a_save_waits_for_stable_storage_only_where_it_is_asked_to(
        self, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch, rank: int, sync: bool
    ) -> None:
        calls: list[int] = []
        monkeypatch.setattr(os, "fsync", calls.append)
        folder = checkpoint_dir / "new" / "folder"
        writer = dcp.FileSystemWriter(folder, sync_files=sync)
        dcp.save({f"own {rank}": torch.ones(2)}, storage_writer=writer)
        assert bool(calls) is sync

    @pytest.mark.parametrize(
        "options",
        [
            {"single_file_per_rank": False},
            {"single_file_per_rank": False, "thread_count": 3},
            {"thread_count": 2},
            {"thread_count": 100},
            {"sync_files": False},
            {"sync_files": False, "thread_count": 2, "single_file_per_rank": False},
            {"per_thread_copy_ahead": 1},
            {"per_thread_copy_ahead": 0, "thread_count": 2},
            {"cache_staged_state_dict": True},
        ],
        ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
    )
    def test_every_setting_gives_a_checkpoint_for_both_engines(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, options: dict[str, Any], rank: int
    ) -> None:
        wide = numbered(150, 130)
        mine = state(device_mesh, 1) | {
            "flat": wide,
            "transposed": wide.t(),
            "stepped": wide[::2, 1::3],
            "expanded": numbered(1, 3).expand(9000, 3),
            "strided shard": spread(wide.t(), device_mesh, Shard(1)),
            "empty": torch.empty(0, 3),
            f"own {rank}": rank,
        }
        writer = dcp.FileSystemWriter(checkpoint_dir, **options)
        metadata = dcp.save(mine, storage_writer=writer)
        expected = blank(mine)
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                expected[key] = blank(value.contiguous())
        for engine in (dcp, torch_dcp):
            target = {key: blank(value) for key, value in expected.items()}
            engine.load(target, checkpoint_id=checkpoint_dir)
            for key, value in mine.items():
                whole = value.contiguous() if isinstance(value, torch.Tensor) else value
                assert same(target[key], whole), (engine.__name__, key)
        names = {place.relative_path for place in metadata.storage_data.values()}
        assert {p.name for p in checkpoint_dir.iterdir()} == names | {".metadata"}
        if not options.get("single_file_per_rank", True):
            assert len(names) == len(metadata.storage_data)
        elif options.get("thread_count", 1) == 1:
            assert len(names) == 2
        else:
            assert 3 <= len(names) <= 2 * options["thread_count"]

    def test_a_folder_may_be_text_a_path_or_relative_and_deep(
        self, checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Named(os.PathLike[str]):
            def __fspath__(self) -> str:
                return str(checkpoint_dir / "named" / "a")

        monkeypatch.chdir(checkpoint_dir)
        folders: dict[str, Any] = {
            "path/a/b": checkpoint_dir / "path" / "a" / "b",
            "text/a/b": str(checkpoint_dir / "text" / "a" / "b"),
            "slash/a": f"{checkpoint_dir}/slash/a/",
            "relative/a": "relative/a",
            "relative/path": Path("relative") / "path",
            "with blanks/ä ?#%": f"{checkpoint_dir}/with blanks/ä ?#%",
            "named/a": Named(),
        }
        for n, (name, folder) in enumerate(folders.items()):
            for _ in range(2):
                save({"w": numbered(2, start=n)}, folder)
                assert same(found(folder, {"w": numbered(2)}), {"w": numbered(2, start=n)}), name
            assert (checkpoint_dir / name / ".metadata").is_file()
            absolute = checkpoint_dir / name
            assert same(found(absolute, {"w": numbered(2)}), {"w": numbered(2, start=n)}), name

    def test_a_file_in_the_place_of_the_folder_is_named(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        if rank == 0:
            (checkpoint_dir / "taken").write_text("a file")
        dist.barrier()
        with pytest.raises(CheckpointException, match="taken"):
            dcp.save({"v": 1}, checkpoint_id=checkpoint_dir / "taken")
        assert (checkpoint_dir / "taken").read_text() == "a file"


class TestEachRankOnItsOwn:
    @pytest.mark.parametrize("one_writer", [True, False])
    def test_a_load_finds_the_last_save_of_either_kind(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int, one_writer: bool
    ) -> None:
        writer = dcp.FileSystemWriter(checkpoint_dir)
        for n, together in enumerate((True, False, True, True, False, False, True)):
            mine = state(device_mesh, n) | ({} if together else {"rank": rank})
            with without_warnings(EXISTING):
                dcp.save(
                    mine,
                    storage_writer=writer if one_writer else dcp.FileSystemWriter(checkpoint_dir),
                    use_collectives=together,
                )
            assert same(found(checkpoint_dir, mine), mine), n
            dist.barrier()
            assert (checkpoint_dir / ".metadata").exists() == together
            for own in range(2):
                assert (checkpoint_dir / f"__{own}.metadata").exists() != together
            dist.barrier()
        assert len(data_files(checkpoint_dir)) == 2

    def test_a_rank_names_its_files_after_its_own_save(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        ids: set[str] = set()
        for n in range(2):
            save({"v": n}, checkpoint_dir, use_collectives=False)
            metadata = dcp.FileSystemReader(checkpoint_dir).read_metadata(rank=rank)
            save_id = save_id_of(metadata)
            (name,) = {place.relative_path for place in metadata.storage_data.values()}
            assert name == f"__{rank}_0-{save_id[:12]}.distcp"
            assert save_id not in ids
            ids.add(save_id)
            dist.barrier()
        assert len(data_files(checkpoint_dir)) == 2

    @pytest.mark.parametrize("hook", ["prepare_local_plan", "write_data", "finish"])
    def test_a_whole_checkpoint_survives_where_one_rank_fails(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, hook: str
    ) -> None:
        save(state(device_mesh, 1), checkpoint_dir)
        writer = FailingWriter(checkpoint_dir, hook, 1)
        with without_warnings(EXISTING), pytest.raises(CheckpointException, match="no space left"):
            dcp.save(state(device_mesh, 2), storage_writer=writer, use_collectives=False)
        assert same(found(checkpoint_dir, state(device_mesh)), state(device_mesh, 1))

    def test_parts_of_two_saves_are_never_loaded_together(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        save({"v": 1}, checkpoint_dir, use_collectives=False)
        writer = FailingWriter(checkpoint_dir, "finish", 1)
        with without_warnings(EXISTING), pytest.raises(CheckpointException, match="no space left"):
            dcp.save({"v": 2}, storage_writer=writer, use_collectives=False)
        with pytest.raises(CheckpointException, match="different saves"):
            found(checkpoint_dir, {"v": 0})
        save({"v": 3}, checkpoint_dir, use_collectives=False)
        assert found(checkpoint_dir, {"v": 0}) == {"v": 3}

    def test_the_ranks_own_checkpoint_survives_where_one_rank_cannot_write(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        save({"v": 1}, checkpoint_dir, use_collectives=False)
        writer = FailingWriter(checkpoint_dir, "write_data", 1)
        with without_warnings(EXISTING), pytest.raises(CheckpointException, match="no space left"):
            dcp.save({"v": 2}, storage_writer=writer, use_collectives=False)
        assert found(checkpoint_dir, {"v": 0}) == {"v": 1}

    @pytest.mark.parametrize(
        "together",
        [
            pytest.param(True, id="whole"),
            pytest.param(
                False,
                id="ranks own",
            ),
        ],
    )
    def test_a_checkpoint_of_the_other_kind_is_not_overwritten_where_that_is_forbidden(
        self, checkpoint_dir: Path, together: bool
    ) -> None:
        dcp.save({"v": 1}, checkpoint_id=checkpoint_dir, use_collectives=together)
        dist.barrier()

        class Together(dcp.FileSystemWriter):
            """No rank commits before every rank has looked."""

            def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
                plan = super().prepare_local_plan(plan)
                dist.barrier()
                return plan

        writer = Together(checkpoint_dir, overwrite=False)
        with pytest.raises(CheckpointException, match="already exists"):
            dcp.save({"v": 2}, storage_writer=writer, use_collectives=not together)
        assert found(checkpoint_dir, {"v": 0}) == {"v": 1}

    def test_the_files_of_a_whole_checkpoint_go_when_the_ranks_own_replace_it(
        self, checkpoint_dir: Path
    ) -> None:
        save({"v": 1}, checkpoint_dir)
        whole = data_files(checkpoint_dir)
        dist.barrier()
        save({"v": 2}, checkpoint_dir, use_collectives=False)
        dist.barrier()
        assert not whole & data_files(checkpoint_dir)
