"""The storages of torch's own failure tests, under the same names: to port those tests, change the
import.

They store nothing. On the ranks that `fail_conf` lists under `fail_<hook>` the hook raises
ValueError; under `fail_write_data_async` and `fail_read_data_async` the future does.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

WRITER_KEYS = (
    "fail_set_up_storage_writer", "fail_prepare_local_plan", "fail_prepare_global_plan",
    "fail_write_data", "fail_write_data_async", "fail_finish",
)  # fmt: skip
READER_KEYS = (
    "fail_read_metadata", "fail_deser_metadata", "fail_set_up_storage_reader",
    "fail_prepare_local_plan", "fail_prepare_global_plan", "fail_read_data",
    "fail_read_data_async",
)  # fmt: skip
FailConf = Mapping[str, Sequence[int]]


class FaultyStorageWriter(StorageWriter):
    """Writes nothing, and fails where configured."""

    def __init__(self, fail_conf: FailConf) -> None:
        super().__init__()
        self.fail_conf = check_fail_conf(fail_conf, WRITER_KEYS)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Fails on `fail_set_up_storage_writer`."""
        fail(self.fail_conf, "fail_set_up_storage_writer")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Fails on `fail_prepare_local_plan`."""
        fail(self.fail_conf, "fail_prepare_local_plan")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Fails on `fail_prepare_global_plan`."""
        fail(self.fail_conf, "fail_prepare_global_plan")
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Fails on `fail_write_data`; its future on `fail_write_data_async`."""
        fail(self.fail_conf, "fail_write_data")
        return future(self.fail_conf, "fail_write_data_async", [])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Fails on `fail_finish`."""
        fail(self.fail_conf, "fail_finish")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accepts any id."""
        return True


class FaultyStorageReader(StorageReader):
    """Reads nothing but the metadata passed to it, and fails where configured."""

    def __init__(self, metadata: Metadata, fail_conf: FailConf) -> None:
        super().__init__()
        self.metadata = metadata
        self.fail_conf = check_fail_conf(fail_conf, READER_KEYS)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Does nothing."""

    def read_metadata(self) -> Metadata:
        """Fails on `fail_read_metadata` and `fail_deser_metadata`."""
        fail(self.fail_conf, "fail_read_metadata")
        fail(self.fail_conf, "fail_deser_metadata")
        return self.metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Fails on `fail_set_up_storage_reader`."""
        fail(self.fail_conf, "fail_set_up_storage_reader")

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Fails on `fail_prepare_local_plan`."""
        fail(self.fail_conf, "fail_prepare_local_plan")
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Fails on `fail_prepare_global_plan`."""
        fail(self.fail_conf, "fail_prepare_global_plan")
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fails on `fail_read_data`; its future on `fail_read_data_async`."""
        fail(self.fail_conf, "fail_read_data")
        return future(self.fail_conf, "fail_read_data_async", None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accepts any id."""
        return True


def check_fail_conf(fail_conf: FailConf, keys: Sequence[str]) -> FailConf:
    """The configuration. Raises ValueError for a `fail_` key that no hook looks up.

    Other keys are left to the test.
    """
    for key in fail_conf:
        if key.startswith("fail_") and key not in keys:
            near = difflib.get_close_matches(key, keys, n=1) or [", ".join(keys)]
            raise ValueError(f"{key!r} makes nothing fail; did you mean {near[0]}?")
    return fail_conf


def fails_here(fail_conf: FailConf, key: str) -> ValueError | None:
    """The failure configured under a key for this rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return ValueError(f"{key} on rank {rank}") if rank in fail_conf.get(key, ()) else None


def fail(fail_conf: FailConf, key: str) -> None:
    """Raise if this rank is listed under the key."""
    failure = fails_here(fail_conf, key)
    if failure is not None:
        raise failure


def future(fail_conf: FailConf, key: str, result: Any) -> Future[Any]:
    """A future that is done, or has failed if this rank is listed under the key."""
    result_future: Future[Any] = Future()
    failure = fails_here(fail_conf, key)
    if failure is None:
        result_future.set_result(result)
    else:
        result_future.set_exception(failure)
    return result_future
