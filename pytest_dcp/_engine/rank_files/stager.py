"""Stages state dicts for the process that writes files: torch's `_experimental.DefaultStager`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.staging import StagingOptions

from pytest_dcp._engine.rank_files.tied_state import TiedStager
from pytest_dcp._torch_internals.rank_files import (
    CheckpointStager,
    CheckpointStagerConfig,
    staging_of_torch,
)


class DefaultStager(CheckpointStager):
    """Copies state dicts deeply, their tensors to the CPU; tied tensors stay tied.

    The memory is used again for later copies, but never while a tensor of an earlier one is
    referenced. Options about GPUs have no effect without one.
    """

    def __init__(
        self,
        config: CheckpointStagerConfig = CheckpointStagerConfig(),  # noqa: B008 - as torch's
    ) -> None:
        self._config = config
        self._stager = TiedStager(
            StagingOptions(
                use_pinned_memory=config.use_pinned_memory,
                use_shared_memory=config.use_shared_memory,
                use_async_staging=config.use_async_staging,
                use_non_blocking_copy=config.use_non_blocking_copy,
            )
        )

    def stage(
        self, state_dict: dict[str, Any], **kwargs: Any
    ) -> dict[str, Any] | Future[dict[str, Any]]:
        """The copy, or its future with `use_async_staging`; kwargs are for other stagers."""
        return self._stager.stage(state_dict)

    def close(self) -> None:
        """Wait for the copy under way, and free the memory."""
        self._stager.close()


staging_of_torch.DefaultStager.register(DefaultStager)
