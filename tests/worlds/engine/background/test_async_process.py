"""Saves in a background process: the promises of a save in a thread; processes start and end.

The first save of a group starts the ranks' processes, which costs seconds: so a test makes many
saves, one after another.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import traceback
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec.chunk_sharding_spec import ChunkShardingSpec
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.background import process as async_process
from pytest_dcp._engine.coordinate import StepError
from pytest_dcp.checkpoint.staging import DefaultStager, StagingOptions
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from pytest_dcp.errors import ReplicaMismatchError, SaverProcessError
from pytest_dcp.tracebacks import owner_of
from support.states import DISABLED, EXISTING, blank, numbered, same, spread, without_warnings

pytestmark = pytest.mark.world_size(2, timeout=400)

WAIT_S = 180
"""Two interpreters that import torch on a busy machine."""


def state(mesh: DeviceMesh, n: int = 0) -> dict[str, Any]:
    """The n-th of a series of states."""
    return {
        "plain": numbered(3, start=1 + n),
        "sharded": spread(numbered(5, 2, start=100 + n), mesh, Shard(0)),
        "value": {"n": n, "list": [n, [n]]},
    }


def found(folder: Path | str, like: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Load the checkpoint; returns the state."""
    target: dict[str, Any] = blank(like)
    dcp.load(target, checkpoint_id=folder, **options)
    return target


def begun(state: dict[str, Any], folder: Path | None = None, **options: Any) -> Future[Metadata]:
    """Start a save in a process, over any existing checkpoint."""
    started = dcp.async_save(
        state,
        checkpoint_id=folder,
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        **options,
    )
    return started.upload_completion if isinstance(started, AsyncSaveResponse) else started


def listening(pid: int) -> set[str]:
    """The addresses at which a process listens, as the kernel writes them (proc_pid_net(5))."""
    links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, status, *rest = line.split()
            if status == "0A" and f"socket:[{rest[5]}]" in links:
                found.add(local.partition(":")[0])
    return found


def failure(future: Future[Metadata]) -> StepError:
    """The error of a failed save, which is the same on every rank."""
    error = future.exception(WAIT_S)
    assert isinstance(error, CheckpointException)
    assert isinstance(error, StepError)
    assert not [frame for frame in traceback.extract_tb(error.__traceback__) if is_ours(frame)]
    assert error.__cause__ is None
    assert error.__suppress_context__
    texts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(texts, str(error))
    assert len(set(texts)) == 1
    return error


def is_ours(frame: traceback.FrameSummary) -> bool:
    """Whether a frame of a traceback is the package's."""
    return owner_of(frame.filename) == "package"


def process_of(group: dist.ProcessGroup | None = None) -> int:
    """The process id of this rank's background process."""
    group = group or dist.group.WORLD
    assert group is not None
    line = async_process._savers[group]._line
    assert line is not None
    return line.process.pid


def is_there(pid: int) -> bool:
    """Whether a process runs, or waits to be reaped."""
    return os.path.exists(f"/proc/{pid}")


class Recording(dcp.FileSystemWriter):
    """Says in which process it writes."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        (Path(self.path).parent / f"pid-{os.getpid()}-{dist.get_rank()}").touch()
        return super().write_data(plan, planner)


class Failing(dcp.FileSystemWriter):
    """Fails on rank 1, after its work."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        future = super().write_data(plan, planner)
        if dist.get_rank() == 1:
            raise OSError("no space left")
        return future


class Hanging(dcp.FileSystemWriter):
    """Never comes back on rank 1."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Any:
        if dist.get_rank() == 1:
            time.sleep(3600)
        return super().write_data(plan, planner)


def test_a_save_in_a_process_is_a_save(
    checkpoint_dir: Path, device_mesh: DeviceMesh, tmp_path: Path, rank: int
) -> None:
    it_is_saved_as_it_was(checkpoint_dir / "as it was", device_mesh)
    one_process_a_rank_serves_them_all(checkpoint_dir / "all", device_mesh, rank)
    a_sharded_tensor_is_saved(checkpoint_dir / "sharded", rank)
    a_class_of_the_test_goes_with_it(checkpoint_dir / "class")
    each_rank_may_commit_its_own_part(checkpoint_dir / "parts", device_mesh)
    for shared in (True, False):
        a_stager_may_take_its_time(checkpoint_dir / f"stager {shared}", device_mesh, shared)
    a_failing_stager_is_named(checkpoint_dir / "failing stager", rank)
    replicas_are_compared_as_asked(checkpoint_dir / "replicas", rank)
    what_cannot_be_sent_is_named_at_once(checkpoint_dir / "refused")
    assert len(set(PROCESSES)) == 1
    # Rank 0's has the store; gloo's sockets are in all of them.
    assert listening(PROCESSES[0]) == {"0100007F"}


PROCESSES: list[int] = []
"""Process ids of the background processes that this module saw in this rank."""


def replicas_are_compared_as_asked(folder: Path, rank: int) -> None:
    large = {"w": torch.arange(1 << 15)}
    large["w"][-1] = rank
    begun(large, folder / "off", replicas="off").result(WAIT_S)
    error = failure(begun(large, folder / "check", replicas="check"))
    assert isinstance(error, ReplicaMismatchError)
    assert "'w' differs first at index (32767,): 0 on rank 0, 1 on rank 1" in str(error)
    assert not (folder / "check" / ".metadata").exists()


def it_is_saved_as_it_was(folder: Path, mesh: DeviceMesh) -> None:
    mine = state(mesh) | {
        "strided": numbered(4, 3).t()[::2],
        "parameter": torch.nn.Parameter(numbered(2)),
        "bf16": numbered(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 2),
    }
    started = begun(mine, folder)
    expected = state(mesh) | {
        "strided": numbered(4, 3).t()[::2].contiguous(),
        "parameter": numbered(2),
        "bf16": numbered(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 2),
    }
    for tensor in (mine["plain"], mine["sharded"].to_local(), mine["parameter"].data):
        tensor.fill_(-1)
    mine["value"]["list"].clear()
    metadata = started.result(WAIT_S)
    assert isinstance(metadata, Metadata)
    on_disk = dcp.FileSystemReader(folder).read_metadata()
    assert dict(metadata.state_dict_metadata) == dict(on_disk.state_dict_metadata)
    assert dict(metadata.storage_data) == dict(on_disk.storage_data)
    assert same(found(folder, expected), expected)
    PROCESSES.append(process_of())


def one_process_a_rank_serves_them_all(folder: Path, mesh: DeviceMesh, rank: int) -> None:
    writer = Recording(folder / "c")
    ids = set()
    with without_warnings(EXISTING):
        for n in (1, 2, 3):
            mine = state(mesh, n)
            metadata = begun(mine, storage_writer=writer).result(WAIT_S)
            assert metadata.storage_meta is not None
            ids.add(metadata.storage_meta.save_id)
            dist.barrier()
            assert same(found(folder / "c", mine), mine)
    assert len(ids) == 3
    assert [path.name for path in folder.glob(f"pid-*-{rank}")] == [f"pid-{process_of()}-{rank}"]
    assert process_of() != os.getpid()
    PROCESSES.append(process_of())


def a_sharded_tensor_is_saved(folder: Path, rank: int) -> None:
    spec = ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"])
    with without_warnings("Please use DTensor instead"):
        mine = sharded_tensor.zeros(spec, 4, 2)
    for shard in mine.local_shards():
        shard.tensor.fill_(rank + 1.0)
    started = begun({"t": mine}, folder)
    for shard in mine.local_shards():
        shard.tensor.fill_(-1)
    started.result(WAIT_S)
    whole = found(folder, {"t": torch.empty(4, 2)})["t"]
    assert whole.tolist() == [[1, 1], [1, 1], [2, 2], [2, 2]]


def a_class_of_the_test_goes_with_it(folder: Path) -> None:
    class Doubling(dcp.DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            found = super().transform_object(write_item, object)
            return found * 2 if isinstance(found, torch.Tensor) else found

    begun({"t": numbered(2)}, folder, planner=Doubling()).result(WAIT_S)
    assert found(folder, {"t": numbered(2)})["t"].tolist() == [2, 4]


def each_rank_may_commit_its_own_part(folder: Path, mesh: DeviceMesh) -> None:
    mine = state(mesh, 4)
    begun(mine, folder, use_collectives=False).result(WAIT_S)
    dist.barrier()
    assert {path.name for path in folder.glob("*.metadata")} == {"__0.metadata", "__1.metadata"}
    assert same(found(folder, mine), mine)


def a_stager_may_take_its_time(folder: Path, mesh: DeviceMesh, shared: bool) -> None:
    stager = DefaultStager(StagingOptions(use_shared_memory=shared))
    mine = state(mesh, 5)
    started = dcp.async_save(
        mine,
        checkpoint_id=folder,
        async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        async_stager=stager,
    )
    assert isinstance(started, AsyncSaveResponse)
    started.staging_completion.result(WAIT_S)
    mine["plain"].fill_(-1)
    started.upload_completion.result(WAIT_S)
    stager.close()
    expected = state(mesh, 5)
    assert same(found(folder, expected), expected)


def a_failing_stager_is_named(folder: Path, rank: int) -> None:
    class Late:
        should_synchronize_after_execute = False

        def stage(self, state_dict: Any) -> Future[Any]:
            future: Future[Any] = Future()
            if rank == 1:
                future.set_exception(MemoryError("no room to stage"))
            else:
                future.set_result(dict(state_dict))
            return future

    stager: Any = Late()
    error = failure(begun({"v": 1}, folder, async_stager=stager))
    assert list(error.failures) == [1]
    assert "no room to stage" in str(error)
    PROCESSES.append(process_of())


def what_cannot_be_sent_is_named_at_once(folder: Path) -> None:
    writer, planner = dcp.FileSystemWriter(folder), dcp.DefaultSavePlanner()
    writer.lock = planner.lock = threading.Lock()  # type: ignore[attr-defined]  # on purpose
    with pytest.raises(TypeError, match="the storage_writer, a FileSystemWriter, cannot be"):
        begun({"v": 1}, storage_writer=writer)
    with pytest.raises(TypeError, match="the planner, a DefaultSavePlanner, cannot be pickled"):
        begun({"v": 1}, folder, planner=planner)


def test_a_rank_may_be_alone(tmp_path: Path, rank: int) -> None:
    mine = {"t": numbered(2, start=rank), "v": rank}
    with without_warnings(DISABLED):
        begun(mine, tmp_path / "c", no_dist=True).result(WAIT_S)
        assert same(found(tmp_path / "c", mine, no_dist=True), mine)


def test_a_failure_is_its_ranks_and_the_next_save_succeeds(
    checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int
) -> None:
    old = state(device_mesh, 1)
    begun(old, checkpoint_dir).result(WAIT_S)
    a_hook_fails_and_the_process_stays(checkpoint_dir, device_mesh, old)
    a_process_is_killed_and_another_comes(checkpoint_dir, device_mesh, old, rank)
    one_that_died_between_saves_is_replaced_unseen(checkpoint_dir, device_mesh, rank)


def a_hook_fails_and_the_process_stays(folder: Path, mesh: DeviceMesh, old: Any) -> None:
    pid = process_of()
    with without_warnings(EXISTING):
        error = failure(begun(state(mesh, 2), storage_writer=Failing(folder)))
    assert list(error.failures) == [1]
    assert "step 'write' of save failed on rank 1: OSError: no space left" in str(error)
    assert same(found(folder, old), old)
    assert process_of() == pid


def a_process_is_killed_and_another_comes(
    folder: Path, mesh: DeviceMesh, old: Any, rank: int
) -> None:
    pid = process_of()
    if rank == 1:
        # It is stopped first, so that it cannot be done before it is killed.
        os.kill(pid, signal.SIGSTOP)
    dist.barrier()
    started = begun(state(mesh, 2), folder)
    if rank == 1:
        os.kill(pid, signal.SIGKILL)
    error = failure(started)
    assert list(error.failures) == [1]
    cause = error.failures[1][0]
    assert isinstance(cause, SaverProcessError)
    assert str(cause).endswith("was killed by SIGKILL")
    assert is_there(pid) is (rank == 0)
    assert same(found(folder, old), old)
    new = state(mesh, 3)
    begun(new, folder).result(WAIT_S)
    assert process_of() != pid
    assert not is_there(pid)
    assert same(found(folder, new), new)


def one_that_died_between_saves_is_replaced_unseen(
    folder: Path, mesh: DeviceMesh, rank: int
) -> None:
    if rank == 0:
        os.kill(process_of(), signal.SIGKILL)
        os.waitid(os.P_PID, process_of(), os.WEXITED | os.WNOWAIT)
    dist.barrier()
    mine = state(mesh, 4)
    begun(mine, folder).result(WAIT_S)
    assert same(found(folder, mine), mine)


def test_silence_is_its_ranks_too_and_the_process_goes_with_its_group(
    checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int
) -> None:
    impatient = dist.new_group(timeout=timedelta(seconds=3))
    assert isinstance(impatient, dist.ProcessGroup)
    mine = state(device_mesh, 1)
    begun(mine, checkpoint_dir, process_group=impatient).result(WAIT_S)
    pid = process_of(impatient)
    if rank == 1:
        os.kill(pid, signal.SIGSTOP)
    dist.barrier()
    error = failure(begun(mine, checkpoint_dir, process_group=impatient))
    assert list(error.failures) == [1]
    assert isinstance(error.failures[1][0], SaverProcessError)
    assert is_there(pid) is (rank == 0)
    # New processes, of which one never comes back from its storage.
    dist.barrier()
    writer = Hanging(checkpoint_dir)
    error = failure(begun(mine, storage_writer=writer, process_group=impatient))
    assert list(error.failures) == [1]
    assert not is_there(pid)
    pid = process_of(impatient)
    dist.barrier()
    dist.destroy_process_group(impatient)
    del impatient, error
    gc.collect()
    assert not is_there(pid)
