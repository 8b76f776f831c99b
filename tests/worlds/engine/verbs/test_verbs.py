"""`save`, `load` and their older forms: arguments, warnings, groups, coordinators, no group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io.progress_observer import Progress
from support.states import (
    DISABLED,
    EXISTING,
    blank,
    numbered,
    same,
    spread,
    torch_dcp,
    without_warnings,
)

four = pytest.mark.world_size(4, isolation="module")


def loosely_typed() -> tuple[Any, Any]:
    """Both verbs, for calls that a type checker would not let pass."""
    return dcp.save, dcp.load


def call_to_its_end(verb: str, state: Any, folder: Any) -> None:
    made = getattr(dcp, verb)(state, checkpoint_id=folder)
    if verb == "async_save":
        made.result()


@four
class TestArguments:
    def test_the_storage_may_be_the_second_argument_with_a_warning(
        self, checkpoint_dir: Path
    ) -> None:
        save, load = loosely_typed()
        state = {"w": numbered(3)}
        with pytest.warns(UserWarning, match="The argument order of save has been changed"):
            save(state, dcp.FileSystemWriter(checkpoint_dir))
        target = blank(state)
        with pytest.warns(UserWarning, match="The argument order of load has been changed"):
            load(target, dcp.FileSystemReader(checkpoint_dir))
        assert same(target, state)

    def test_more_positional_arguments_are_refused(self, checkpoint_dir: Path) -> None:
        save, _ = loosely_typed()
        writer = dcp.FileSystemWriter(checkpoint_dir)
        with pytest.raises(TypeError):
            save({}, writer, None)
        with (
            pytest.raises(TypeError),
            pytest.warns(UserWarning, match="argument order"),
        ):
            save({}, writer, storage_writer=writer)

    def test_the_folder_may_be_text_or_a_path(self, checkpoint_dir: Path) -> None:
        state = {"w": numbered(3)}
        for folder in (checkpoint_dir / "path", str(checkpoint_dir / "text" / "deep")):
            dcp.save(state, checkpoint_id=folder)
            target = blank(state)
            dcp.load(target, checkpoint_id=folder)
            assert same(target, state)

    def test_an_id_resets_the_storage_that_is_given(self, checkpoint_dir: Path) -> None:
        state = {"w": numbered(3)}
        first, second = checkpoint_dir / "first", checkpoint_dir / "second"
        writer = dcp.FileSystemWriter(first)
        dcp.save(state, checkpoint_id=second, storage_writer=writer)
        assert writer.checkpoint_id == second
        assert not first.exists()
        reader = dcp.FileSystemReader(first)
        target = blank(state)
        dcp.load(target, checkpoint_id=second, storage_reader=reader)
        assert same(target, state)
        assert reader.checkpoint_id == second

    def test_an_id_and_storages_missing_are_said(self) -> None:
        for verb in loosely_typed():
            with pytest.raises(RuntimeError, match="`checkpoint_id` must be specified"):
                verb({"w": numbered(3)})
            with pytest.raises(RuntimeError, match="Cannot detect which storage"):
                verb({"w": numbered(3)}, checkpoint_id="nowhere://at/all")

    @pytest.mark.parametrize("wrong", ["every rank", "rank 1"])
    @pytest.mark.parametrize("verb", ["save", "load", "async_save"])
    def test_a_wrong_argument_is_named_on_every_rank(
        self, verb: str, wrong: str, checkpoint_dir: Path
    ) -> None:
        has_it = wrong == "every rank" or dist.get_rank() == 1
        if verb == "load":
            dcp.save({}, checkpoint_id=checkpoint_dir)
        for state, folder, text in (
            ([1], checkpoint_dir, "state_dict must be a mapping of names to values, got list"),
            ({}, 5, "checkpoint_id must be a str or an os.PathLike, got int"),
            ({}, b"folder", "checkpoint_id must be a str or an os.PathLike, got bytes"),
        ):
            given = (state, folder) if has_it else ({}, checkpoint_dir)
            with pytest.raises(TypeError, match=f"{text}$") as caught:
                call_to_its_end(verb, *given)
            assert (type(caught.value) is TypeError) == has_it
            assert len(str(caught.value).splitlines()) == 1
            dist.barrier()

    def test_returns_the_metadata_as_torch_does(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh
    ) -> None:
        state = {"w": spread(numbered(5, 2), device_mesh, Shard(0)), "v": 3}
        ours = dcp.save(state, checkpoint_id=checkpoint_dir / "ours")
        torchs = torch_dcp.save(state, checkpoint_id=checkpoint_dir / "torchs")
        assert isinstance(ours, dcp.Metadata)
        if torchs.version is None:  # torch 2.10 and 2.11 return it as it was before the writer
            assert torchs.storage_data is None
            torchs = torch_dcp.FileSystemReader(checkpoint_dir / "torchs").read_metadata()
        for key in ("w", "v"):
            one, other = ours.state_dict_metadata[key], torchs.state_dict_metadata[key]
            assert type(one) is type(other)
            if isinstance(one, dcp.TensorStorageMetadata):
                assert isinstance(other, dcp.TensorStorageMetadata)
                assert one.size == other.size
                assert one.properties == other.properties
                assert list(one.chunks) == list(other.chunks)
        assert ours.planner_data == torchs.planner_data == {"w": ("w",), "v": ("v",)}
        assert ours.version == torchs.version
        assert set(ours.storage_data) == set(torchs.storage_data)
        stored = dcp.FileSystemReader(checkpoint_dir / "ours").read_metadata()
        assert dict(stored.state_dict_metadata) == dict(ours.state_dict_metadata)
        assert dict(stored.storage_data) == dict(ours.storage_data)
        assert stored.storage_meta is not None
        assert ours.storage_meta is not None
        assert stored.storage_meta.save_id == ours.storage_meta.save_id

    def test_every_rank_gets_the_metadata(self, checkpoint_dir: Path, world: Any) -> None:
        metadata = dcp.save({"w": numbered(3)}, checkpoint_id=checkpoint_dir)
        seen = world.gather(
            (dict(metadata.state_dict_metadata), dict(metadata.storage_data), metadata.version)
        )
        assert all(one == seen[0] for one in seen)

    def test_no_dist_is_one_rank_alone(self, checkpoint_dir: Path, rank: int) -> None:
        state = {"w": numbered(3, start=rank)}
        folder = checkpoint_dir / str(rank)
        with pytest.warns(UserWarning, match=DISABLED):
            dcp.save(state, checkpoint_id=folder, no_dist=True)
        target = blank(state)
        with pytest.warns(UserWarning, match=DISABLED):
            dcp.load(target, checkpoint_id=folder, no_dist=True)
        assert same(target, state)
        assert [path.name.split("-")[0] for path in folder.glob("*.distcp")] == ["__0_0"]

    def test_a_group_saves_and_loads_alone(self, checkpoint_dir: Path, rank: int) -> None:
        groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
        mine = groups[rank % 2]
        folder = checkpoint_dir / str(rank % 2)
        state = {"both": numbered(4), f"own {rank}": numbered(3, start=rank)}
        metadata = dcp.save(state, checkpoint_id=folder, process_group=mine)
        peer = (rank + 2) % 4
        assert set(metadata.state_dict_metadata) == {"both", f"own {rank}", f"own {peer}"}
        target = {"both": torch.zeros(4), f"own {peer}": torch.zeros(3)}
        dcp.load(target, checkpoint_id=folder, process_group=mine)
        assert same(target, {"both": numbered(4), f"own {peer}": numbered(3, start=peer)})
        torch_dcp.load(target := {"both": torch.zeros(4)}, checkpoint_id=folder, process_group=mine)
        assert torch.equal(target["both"], numbered(4))

    def test_the_older_forms_take_a_group_and_a_coordinator(
        self, checkpoint_dir: Path, rank: int, device_mesh: DeviceMesh
    ) -> None:
        seen: list[bool] = []

        class Watching(dcp.DefaultSavePlanner):
            def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
                super().set_up_planner(*args, **kwargs)
                seen.append(self.is_coordinator)

        class WatchingLoad(dcp.DefaultLoadPlanner):
            def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
                super().set_up_planner(*args, **kwargs)
                seen.append(self.is_coordinator)

        state = {"w": spread(numbered(7), device_mesh, Shard(0)), "v": {"x": 1}}
        with pytest.warns(FutureWarning, match="save_state_dict"):
            metadata = dcp.save_state_dict(
                state,
                dcp.FileSystemWriter(checkpoint_dir),
                coordinator_rank=3,
                planner=Watching(),
            )
        assert set(metadata.state_dict_metadata) == {"w", "v.x"}
        target = blank(state)
        with pytest.warns(FutureWarning, match="load_state_dict"):
            dcp.load_state_dict(
                target,
                dcp.FileSystemReader(checkpoint_dir),
                coordinator_rank=3,
                planner=WatchingLoad(),
            )
        assert same(target, state)
        assert seen == [rank == 3] * 2

        group = dist.new_group([1, 3])
        if rank in (1, 3):
            folder = checkpoint_dir / "group"
            with pytest.warns(FutureWarning, match="save_state_dict"):
                dcp.save_state_dict(
                    {f"{rank}": numbered(2)},
                    dcp.FileSystemWriter(folder),
                    process_group=group,
                    coordinator_rank=1,
                    planner=Watching(),
                )
            target = {f"{4 - rank}": torch.zeros(2)}
            with pytest.warns(FutureWarning, match="load_state_dict"):
                dcp.load_state_dict(
                    target, dcp.FileSystemReader(folder), group, 1, False, WatchingLoad()
                )
            assert torch.equal(target[f"{4 - rank}"], numbered(2))
            assert seen[2:] == [rank == 3] * 2

    def test_the_older_forms_leave_objects_as_values(self, checkpoint_dir: Path) -> None:
        module = torch.nn.Linear(2, 2)
        with pytest.warns(FutureWarning, match="save_state_dict"):
            dcp.save_state_dict(
                {"m": module.state_dict(), "n": 1}, dcp.FileSystemWriter(checkpoint_dir)
            )
        target = {"m": blank(module.state_dict()), "n": 0}
        with pytest.warns(FutureWarning, match="load_state_dict"):
            dcp.load_state_dict(target, dcp.FileSystemReader(checkpoint_dir))
        assert same(dict(target["m"]), dict(module.state_dict()))
        assert target["n"] == 1

    def test_the_progress_of_a_save_ends_at_its_total(self, checkpoint_dir: Path) -> None:
        seen: list[Progress] = []
        dcp.save({"w": numbered(100)}, checkpoint_id=checkpoint_dir, progress=seen.append)
        assert all(p.done_bytes <= p.total_bytes for p in seen)
        assert seen[-1].done_bytes == seen[-1].total_bytes

    def test_progress_is_reported(self, checkpoint_dir: Path, rank: int) -> None:
        seen: list[Progress] = []
        state = {f"{n}": numbered(100, start=n) for n in range(8)}
        dcp.save(state, checkpoint_id=checkpoint_dir, progress=seen.append)
        assert {(p.operation, p.rank) for p in seen} == {("save", rank)}
        assert seen[-1].done_bytes >= seen[-1].total_bytes == 800
        seen.clear()
        dcp.load(blank(state), checkpoint_id=checkpoint_dir, progress=seen.append)
        assert {(p.operation, p.rank) for p in seen} == {("load", rank)}
        assert seen[-1].done_bytes == seen[-1].total_bytes >= 3200

    def test_a_progress_that_raises_ends_the_save_on_all_ranks(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        def told(progress: Progress) -> None:
            if rank == 2:
                raise InterruptedError("enough")

        with pytest.raises(CheckpointException) as caught:
            dcp.save({"w": numbered(100)}, checkpoint_id=checkpoint_dir, progress=told)
        assert list(caught.value.failures) == [2]
        assert "enough" in str(caught.value)
        assert not (checkpoint_dir / ".metadata").exists()

    def test_each_rank_may_save_on_its_own(
        self, checkpoint_dir: Path, rank: int, device_mesh: DeviceMesh
    ) -> None:
        state = {
            "w": spread(numbered(7, 2), device_mesh, Shard(0)),
            "own": numbered(3, start=rank),
            "v": rank,
        }
        with without_warnings(EXISTING):
            dcp.save(state, checkpoint_id=checkpoint_dir / "ours", use_collectives=False)
        torch_dcp.save(state, checkpoint_id=checkpoint_dir / "torchs", use_collectives=False)
        names = {path.name for path in (checkpoint_dir / "ours").iterdir()}
        assert {f"__{n}.metadata" for n in range(4)} <= names
        assert ".metadata" not in names
        for engine, which in ((dcp, "ours"), (dcp, "torchs"), (torch_dcp, "ours")):
            target = blank(state)
            engine.load(target, checkpoint_id=checkpoint_dir / which)
            assert same(target, state), (engine.__name__, which)

    def test_a_commit_of_another_rank_moments_ago_is_no_older_checkpoint(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        if not rank:
            (checkpoint_dir / "__9.metadata").write_bytes(b"of a rank that was faster")
        dist.barrier()
        writer = dcp.FileSystemWriter(checkpoint_dir, overwrite=False)
        dcp.save({"v": rank}, storage_writer=writer, use_collectives=False)

    def test_a_save_of_each_rank_takes_the_place_of_a_whole_one_and_back(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        for n, together in enumerate((True, False, False, True)):
            state = {"own": numbered(3, start=10 * n), "v": (rank if not together else -1)}
            with without_warnings(EXISTING):
                dcp.save(state, checkpoint_id=checkpoint_dir, use_collectives=together)
            target = blank(state)
            dcp.load(target, checkpoint_id=checkpoint_dir)
            assert same(target, state), n
            dist.barrier()
        names = {path.name.split("-")[0] for path in checkpoint_dir.iterdir()}
        assert not any(name.endswith(".metadata") and name != ".metadata" for name in names)


def test_without_a_group_a_process_saves_alone(checkpoint_dir: Path) -> None:
    state = {"w": numbered(3), "v": {"x": 1}}
    with pytest.warns(UserWarning, match="in a single process") as seen:
        dcp.save(state, checkpoint_id=checkpoint_dir)
    assert [Path(warning.filename).name for warning in seen] == ["test_verbs.py"]
    target = blank(state)
    with pytest.warns(UserWarning, match="in a single process") as seen:
        dcp.load(target, checkpoint_id=checkpoint_dir)
    assert [Path(warning.filename).name for warning in seen] == ["test_verbs.py"]
    assert same(target, state)
    with pytest.warns(UserWarning, match="in a single process"):
        assert same(dcp.load_without_template(checkpoint_id=checkpoint_dir), state)


def test_a_checkpoint_of_one_process_is_torchs(checkpoint_dir: Path) -> None:
    state = {"w": numbered(3), "v": {"x": 1}}
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.save(state, checkpoint_id=os.fspath(checkpoint_dir))
    target = blank(state)
    with pytest.warns(UserWarning, match="in a single process"):
        torch_dcp.load(target, checkpoint_id=checkpoint_dir)
    assert same(target, state)
