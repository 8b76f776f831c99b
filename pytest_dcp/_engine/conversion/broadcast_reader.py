"""Loads the file of `torch.save` into the ranks' own layouts: one rank reads, all receive.

    load(
        state_dict,
        storage_reader=BroadcastingTorchSaveReader(),
        planner=DynamicMetaLoadPlanner(),
        checkpoint_id="model.pt",
    )

Only the coordinator needs the file. It opens the file, and compares it with all ranks' requests,
while the load is planned, so every error reaches every rank. Then it sends the tensors whole, one
after another; each rank copies its part and discards the rest.
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import format_utils as format_utils_of_torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from pytest_dcp._engine.lazy_reading.contents import BoxToRead
from pytest_dcp._engine.lazy_reading.torch_save_contents import TorchSaveContents
from pytest_dcp._engine.plan.materialise import current_device, group_device_type
from pytest_dcp._engine.plan.nested import flatten
from pytest_dcp._engine.planners.load_planner import DefaultLoadPlanner
from pytest_dcp.errors import CheckpointMismatchError

PathLike = str | os.PathLike[str]
Sent = dict[str, tuple[torch.Size, torch.dtype]]
"""By flat name, in the order in which tensors are sent: the shape and dtype in the file."""


class BroadcastingTorchSaveReader(StorageReader):
    """Reads the file of `torch.save` on one rank, and broadcasts it to the default group.

    checkpoint_id: the file.
    coordinator_rank: the rank that reads it; the load must have the same coordinator.

    Tensors only. Values are read by the engine's own reader, which runs no code.
    """

    def __init__(self, checkpoint_id: PathLike | None = None, coordinator_rank: int = 0) -> None:
        self.checkpoint_id = checkpoint_id
        self.coordinator_rank = coordinator_rank
        self.is_coordinator = False
        self._file: TorchSaveContents | None = None

    def reset(self, checkpoint_id: PathLike | None = None) -> None:
        """Read another file."""
        self.checkpoint_id = checkpoint_id
        self._close()

    def read_metadata(self) -> Metadata:
        """Nothing: the planner describes what it wants, see `DynamicMetaLoadPlanner`."""
        return Metadata(state_dict_metadata={})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Open the file, on the coordinator.

        Raises CheckpointCorruptError or UntrustedPickleError for the file's contents, OSError if it
        is missing, and ValueError if the load has another coordinator.
        """
        self.is_coordinator = is_coordinator
        mine = not dist.is_initialized() or dist.get_rank() == self.coordinator_rank
        if mine != is_coordinator:
            raise ValueError(
                f"the load has another coordinator than the reader, whose coordinator_rank is "
                f"{self.coordinator_rank}"
            )
        if is_coordinator:
            if self.checkpoint_id is None:
                raise ValueError("give the reader, or the load, a checkpoint_id: the file to read")
            self._close()
            self._file = TorchSaveContents.of_path(self.checkpoint_id)
            # A load that fails in its plan does not tell the reader.
            weakref.finalize(self, self._file.close)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan, unchanged. Raises CheckpointMismatchError for a value, which is not sent."""
        values = [item.dest_index.fqn for item in plan.items if item.type == LoadItemType.BYTE_IO]
        if values:
            raise CheckpointMismatchError(
                f"{values[:5]}: {type(self).__name__} loads tensors only", mismatched=tuple(values)
            )
        return plan

    def prepare_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """List the tensors to send, for every rank: all that any rank asks for.

        Raises CheckpointMismatchError for a tensor that the file lacks, or whose shape differs from
        the shape that the ranks' parts form together.
        """
        shapes: dict[str, tuple[int, ...]] = {}
        for plan in global_plan:
            for item in plan.items:
                end = tuple(map(sum, zip(item.storage_offsets, item.lengths, strict=True)))
                extent = shapes.setdefault(item.storage_index.fqn, end)
                shapes[item.storage_index.fqn] = tuple(map(max, extent, end))
        tensors: Sent = {fqn: self._describe(fqn, shapes[fqn]) for fqn in sorted(shapes)}
        return [dataclasses.replace(plan, storage_data=tensors) for plan in global_plan]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Receive every tensor, and copy the parts that the plan asks for.

        Raises CheckpointReplacedError if the file was written to since it was opened, and
        CheckpointCorruptError for a damaged tensor, on the coordinator.
        """
        parts: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            parts.setdefault(item.storage_index.fqn, []).append(item)
        for fqn, (shape, dtype) in plan.storage_data.items():
            whole = self._broadcast(fqn, shape, dtype)
            for item in parts.get(fqn, ()):
                target = planner.resolve_tensor(item)
                part = whole
                for dim, (start, length) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    part = part.narrow(dim, start, length)
                target.detach().copy_(part)
                planner.commit_tensor(item, target)
        self._close()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: PathLike) -> bool:
        """Whether it is a file."""
        return os.path.isfile(checkpoint_id)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _describe(self, fqn: str, shape: tuple[int, ...]) -> tuple[torch.Size, torch.dtype]:
        file = self._file
        stored = file.describe(fqn) if file is not None and file.has(fqn) else None
        if stored is None:
            found = "nothing"
            if file is not None and file.has(fqn):
                found = f"a {type(file.read_value(fqn)).__name__}"
            raise CheckpointMismatchError(
                f"{fqn!r}: expected a tensor in {self.checkpoint_id}, "
                f"it holds {found} of this name",
                missing=(fqn,),
            )
        if stored.shape != shape:
            raise CheckpointMismatchError(
                f"{fqn!r}: the file has shape {stored.shape}, the state dict {shape}",
                mismatched=(fqn,),
            )
        return torch.Size(stored.shape), stored.dtype

    def _broadcast(self, fqn: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor, on the device of the group's collectives."""
        is_alone = not dist.is_initialized()
        device = torch.device("cpu") if is_alone else current_device(group_device_type())
        whole = torch.empty(shape, dtype=dtype, device=device)
        if self._file is not None:
            self._file.read_boxes([BoxToRead(fqn, (0,) * len(shape), whole)])
        if is_alone:
            return whole
        # Sent as bytes: the backends do not support every dtype.
        flat = whole.reshape(-1).view(torch.uint8) if whole.numel() else None
        if flat is not None:
            dist.broadcast(flat, src=self.coordinator_rank)
        return whole


class DynamicMetaLoadPlanner(DefaultLoadPlanner, format_utils_of_torch.DynamicMetaLoadPlanner):
    """Describes the checkpoint by the state dict to load: as if each tensor were one chunk.

    For files that do not describe themselves, see `BroadcastingTorchSaveReader`. Tensors only.

    torch's class of this name is a base for the sake of `isinstance`; all methods are ours.
    """

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict to fill. Raises CheckpointMismatchError for values other than
        tensors.
        """
        flat = flatten(state_dict)[0] if self.flatten_state_dict else state_dict
        values = [fqn for fqn, value in flat.items() if not isinstance(value, torch.Tensor)]
        if values:
            raise CheckpointMismatchError(
                f"Non-tensor value identified at {values[0]!r}: {type(self).__name__} loads "
                "tensors only",
                mismatched=tuple(values),
            )
        described: dict[str, Any] = {fqn: _as_one_chunk(value) for fqn, value in flat.items()}
        super().set_up_planner(state_dict, Metadata(described), is_coordinator)


def _as_one_chunk(tensor: torch.Tensor) -> TensorStorageMetadata:
    size = torch.Size(tensor.shape)
    whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [whole])


format_utils_of_torch.BroadcastingTorchSaveReader.register(BroadcastingTorchSaveReader)
