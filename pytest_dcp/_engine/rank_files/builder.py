"""Makes checkpointers of usual parts: the functions of torch's `_experimental.builder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from pytest_dcp._engine.rank_files.barriers import create_barrier_from_config
from pytest_dcp._engine.rank_files.checkpointers import AsyncCheckpointer, SyncCheckpointer
from pytest_dcp._engine.rank_files.reader import CheckpointReader
from pytest_dcp._engine.rank_files.stager import DefaultStager
from pytest_dcp._engine.rank_files.writer import CheckpointWriter
from pytest_dcp._engine.rank_files.writer_process import CheckpointProcess
from pytest_dcp._torch_internals.rank_files import (
    CheckpointerConfig,
    CheckpointWriterConfig,
    RankInfo,
    WriterHook,
)


def default_subprocess_init_fn(*_: Any) -> None:
    """Nothing: the process of an AsyncCheckpointer needs no initialization."""


def default_writer_init_fn(rank_info: RankInfo) -> CheckpointWriter:
    """A writer without barrier and hook."""
    return CheckpointWriter(config=CheckpointWriterConfig(), rank_info=rank_info)


def make_sync_checkpointer(
    config: CheckpointerConfig = CheckpointerConfig(),  # noqa: B008 - as torch's
    rank_info: RankInfo | None = None,
    commit_hook: WriterHook | None = None,
) -> SyncCheckpointer:
    """A checkpointer that saves before it returns.

    rank_info: None: of the default process group, or one rank without one.

    >>> import torch
    >>> checkpointer = make_sync_checkpointer()
    >>> checkpointer.save("step-1", {"w": torch.ones(2), "step": 1})
    >>> checkpointer.load("step-1")
    {'w': tensor([1., 1.]), 'step': 1}
    >>> checkpointer.close()
    """
    rank_info = rank_info or _rank_info()
    writer = CheckpointWriter(
        config=config.writer_config,
        rank_info=rank_info,
        barrier=create_barrier_from_config(config.barrier_config),
        commit_hook=commit_hook,
    )
    return SyncCheckpointer(writer=writer, reader=CheckpointReader(rank_info=rank_info))


def make_async_checkpointer(
    config: CheckpointerConfig = CheckpointerConfig(),  # noqa: B008 - as torch's
    rank_info: RankInfo | None = None,
    subprocess_init_fn: Callable[..., None] = default_subprocess_init_fn,
    subprocess_init_args: tuple[Any, ...] = (),
    checkpoint_writer_init_fn: Callable[..., Any] = default_writer_init_fn,
    checkpoint_writer_init_args: dict[str, Any] | None = None,
) -> AsyncCheckpointer:
    """A checkpointer that saves in a process, which it starts at once.

    rank_info: None: of the default process group, or one rank without one.
    The other arguments are those of `CheckpointProcess`. A writer that needs a barrier makes it in
    `checkpoint_writer_init_fn`: the configuration's is for this process.
    """
    rank_info = rank_info or _rank_info()
    process = CheckpointProcess(
        rank_info=rank_info,
        config=config.process_config,
        subprocess_init_fn=subprocess_init_fn,
        subprocess_init_args=subprocess_init_args,
        checkpoint_writer_init_fn=checkpoint_writer_init_fn,
        checkpoint_writer_init_args=checkpoint_writer_init_args or {},
    )
    return AsyncCheckpointer(
        checkpoint_stager=DefaultStager(config=config.staging_config),
        checkpoint_process=process,
        reader=CheckpointReader(rank_info=rank_info),
    )


def _rank_info() -> RankInfo:
    if not dist.is_initialized():
        return RankInfo(global_rank=0, global_world_size=1)
    return RankInfo(global_rank=dist.get_rank(), global_world_size=dist.get_world_size())
