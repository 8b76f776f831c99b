"""The save of one rank's view of a fake world: planned for all ranks, as `simulate` plans.

The rank's state dict stands for every rank's: DTensors say which part each rank holds, and plain
tensors and values are the same everywhere, up to `PerRank`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.index import copy_metadata
from pytest_dcp._engine.planners.save_planner import DefaultSavePlanner
from pytest_dcp._engine.simulation.mesh_ranks import Mesh
from pytest_dcp._engine.simulation.simulate import plan_metadata
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter
from pytest_dcp._engine.verbs.phase_timing import logger


def plan_save(
    state_dict: dict[str, Any],
    group: dist.ProcessGroup,
    writer: StorageWriter,
    planner: SavePlanner,
) -> Metadata:
    """The metadata of the checkpoint that all ranks would save, without places: none is written.

    Raises PlanError as the real save would, and ValueError for a save that cannot be simulated.
    """
    size = dist.get_world_size(group)
    if size != dist.get_world_size():
        raise ValueError(
            f"a save of {size} of the {dist.get_world_size()} ranks of a fake world cannot be "
            "simulated: save in the default group, or with no_dist=True"
        )
    if type(writer) is not FileSystemWriter:
        raise ValueError(
            f"a {type(writer).__name__} cannot be used in a fake world, where a FileSystemWriter's "
            "save is simulated: use that, or no_dist=True"
        )
    if not isinstance(planner, DefaultSavePlanner):
        raise ValueError(  # noqa: TRY004
            f"a {type(planner).__name__} cannot be used in a fake world: a DefaultSavePlanner can"
        )
    simulation, metadata = plan_metadata(
        find_mesh(state_dict, size),
        None,
        state_dict,
        planner=planner,
        thread_count=writer.thread_count,
        single_file_per_rank=writer.single_file_per_rank,
        checkpoint_id=writer.checkpoint_id,
    )
    logger.info("planned the save of a fake world, and wrote nothing:\n%s", simulation)
    return copy_metadata(metadata, storage_data=None)


def find_mesh(state_dict: dict[str, Any], size: int) -> Mesh:
    """The mesh of all ranks that the state's DTensors are on; the number of ranks without any.

    Raises ValueError if they are only on parts of a mesh.
    """
    meshes = {id(mesh): mesh for mesh in _meshes_of(state_dict)}
    whole = [mesh for mesh in meshes.values() if mesh.size() == size]
    if meshes and not whole:
        shapes = sorted({tuple(mesh.shape) for mesh in meshes.values()})
        raise ValueError(
            f"the DTensors are on meshes of the shapes {shapes}, and none has all {size} ranks of "
            "the fake world: no save of it can be planned; use pytest_dcp.simulate(mesh, ...)"
        )
    # The one with the most dimensions: the others may be flattened views of it.
    return max(whole, key=lambda mesh: mesh.ndim, default=size)


def _meshes_of(value: Any) -> Iterator[DeviceMesh]:
    if isinstance(value, DTensor):
        yield value.device_mesh
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _meshes_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _meshes_of(inner)
