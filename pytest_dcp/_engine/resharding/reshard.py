"""A checkpoint -> the checkpoint that the ranks of a mesh would save, written by one process.

The plans of all ranks are made as `simulate` makes them: from shapes and placements, by the real
planner. Then the parts of one rank after the other are written, into the files that this rank would
write, and the commit is that of any save. Each part is read when its turn to be written comes, so
one part at a time is in memory.

Assumes: tensors that several ranks hold are equal, as they are read from one place.
Guarantees: until the commit the target is as it was; after a failure its new files are removed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from pytest_dcp._engine.conversion.changes import Changes
from pytest_dcp._engine.conversion.converted_contents import (
    ConvertedContents,
    Source,
    open_source,
)
from pytest_dcp._engine.conversion.target_paths import local_target, target_folder
from pytest_dcp._engine.conversion.whole_file import remove_if_new
from pytest_dcp._engine.format.python_values import encode_value
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner
from pytest_dcp._engine.resharding.placement_texts import PlacementRules
from pytest_dcp._engine.simulation.local_plans import make_local_plans
from pytest_dcp._engine.simulation.mesh_ranks import MeshRanks
from pytest_dcp._engine.simulation.named_placements import PlacementLookup
from pytest_dcp._engine.storages.folder_cleanup import discard_files
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter
from pytest_dcp.garbage_collection import collector_paused
from pytest_dcp.tracebacks import drop_inner_frames


@dataclass(frozen=True, slots=True)
class ReshardReport:
    """The result of resharding."""

    mesh: tuple[int, ...]
    tensors: int
    values: int
    chunks: int
    """Parts of tensors that were written."""
    nbytes: int
    """Of all tensors."""
    largest_chunk_bytes: int
    """The most memory that tensors took."""
    bytes_read: int
    """From the source's data files."""


@drop_inner_frames
def reshard(
    source: Source,
    target: str | os.PathLike[str],
    mesh: Sequence[int],
    rules: PlacementRules,
    report: Callable[[str], None] = lambda rank: None,
) -> ReshardReport:
    """Write the checkpoint that the ranks of a mesh would save. No process group is used.

    source: a path or URL that `open_checkpoint` takes, or an open checkpoint.
    target: a local folder. An existing checkpoint is replaced by the commit.
    mesh: its shape; ranks are in row-major order. rules: the placements of each tensor.
    report: called for each rank when its parts are written.

    Raises as `open_checkpoint` and `save`, and ValueError for placements that do not fit a tensor.
    """
    folder = target_folder(local_target(target))
    ranks = MeshRanks.of(tuple(mesh))
    with open_source(source, Changes()) as contents:
        planner = _ReshardingPlanner(contents)
        plans = planner.plan_ranks(ranks, rules)
        with remove_if_new(folder):
            _write(FileSystemWriter(folder.path), planner, plans, report)
        tensors = contents.tensors.values()
        return ReshardReport(
            mesh=ranks.shape,
            tensors=len(tensors),
            values=len(contents.values),
            chunks=planner.chunks,
            nbytes=sum(tensor.nbytes for tensor in tensors),
            largest_chunk_bytes=planner.largest_bytes,
            bytes_read=contents.checkpoint.bytes_read,
        )


def _write(
    writer: FileSystemWriter,
    planner: _ReshardingPlanner,
    plans: list[SavePlan],
    report: Callable[[str], None],
) -> None:
    """The steps of `save` for all ranks, see `verbs.save`."""
    writer.set_up_storage_writer(True, rank=0, use_collectives=True)
    try:
        writer.prepare_local_plan(plans[0])
        joined, metadata = planner.create_global_plan(plans)
        results: list[list[WriteResult]] = []
        for rank, plan in enumerate(writer.prepare_global_plan(joined)):
            final = replace(planner.finish_plan(plan), storage_data=plan.storage_data)
            results.append(writer.write_data(final, planner).value())
            report(str(rank))
        writer.finish(metadata=metadata, results=results)
    except BaseException:
        discard_files(writer, "conversion")
        raise


class _ReshardingPlanner(DefaultSavePlanner):
    """Plans stand-ins without memory; each part is read when its turn to be written comes."""

    def __init__(self, contents: ConvertedContents) -> None:
        super().__init__(replicas="off")
        self._contents = contents
        self.chunks = self.largest_bytes = 0

    def plan_ranks(self, mesh: MeshRanks, rules: PlacementRules) -> list[SavePlan]:
        """The local plan of every rank."""
        state = self._contents.build_state(self._stand_in)
        self.set_up_planner(state, is_coordinator=True)
        lookup = PlacementLookup(lambda name, tensor: rules.find(name, tensor.ndim), mesh)
        with collector_paused():
            plans = make_local_plans(state, mesh, lookup, self).plans
        rules.check_patterns(self._contents.checkpoint.where)
        return plans

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The part, read now, or the value's entry."""
        fqn = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO or write_item.tensor_data is None:
            return io.BytesIO(encode_value(self.state_dict[fqn]))
        chunk = write_item.tensor_data.chunk
        part = torch.empty(chunk.sizes, dtype=self._contents.tensors[fqn].dtype)
        self._contents.read_parts([(fqn, tuple(chunk.offsets), part)])
        self.chunks += 1
        self.largest_bytes = max(self.largest_bytes, part.nbytes)
        return part

    def _stand_in(self, name: str) -> Any:
        """A tensor of the right shape and dtype, of one element repeated; or the value."""
        tensor = self._contents.tensors.get(name)
        if tensor is None:
            return self._contents.read_value(name)
        return torch.zeros((), dtype=torch.uint8).to(tensor.dtype).expand(tensor.shape)
