"""The first n ranks of a world, as a mesh or a group; and steps that some take and all answer for.

A law saves with n ranks and loads with m, in one world of at least as many. A world makes each mesh
and group once and keeps it: they cost more than a save. Whether a step succeeded is told to all
ranks, so that every rank fails with the same words and none is left waiting.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh

from pytest_dcp.errors import LawError
from pytest_dcp.tracebacks import set_cause

TEXT_LIMIT = 2_000
"""Characters of an exception that are told. torch's checkpoint errors have a traceback per rank,
and what went wrong comes last."""


@dataclass(slots=True)
class _Kept:
    """What was made in a world."""

    world: dist.ProcessGroup | None = None
    meshes: dict[object, DeviceMesh] = field(default_factory=dict)
    groups: dict[int, dist.ProcessGroup | None] = field(default_factory=dict)


_kept = _Kept()


def _of_this_world() -> _Kept:
    """What this world made; another default group is another world."""
    global _kept
    if _kept.world is not dist.group.WORLD:
        _kept = _Kept(dist.group.WORLD)
    return _kept


def device_type() -> str:
    """Where the tensors of this world live: cuda under NCCL, else cpu."""
    return "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"


def rank() -> int:
    """This process's rank; 0 without a world."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The ranks of the world; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mesh_of(ranks: torch.Tensor, dim_names: tuple[str, ...]) -> DeviceMesh:
    """A mesh of these ranks. Collective over all ranks of the world, also those not in it."""
    meshes = _of_this_world().meshes
    key = (tuple(ranks.shape), tuple(ranks.flatten().tolist()), dim_names)
    if key not in meshes:
        meshes[key] = DeviceMesh(device_type(), ranks, mesh_dim_names=dim_names or None)
    return meshes[key]


def first_ranks(count: int) -> dist.ProcessGroup | None:
    """The group of the first ranks; None without a world. Collective over all ranks."""
    if not dist.is_initialized():
        return None
    if count == dist.get_world_size():
        return dist.group.WORLD
    groups = _of_this_world().groups
    if count not in groups:
        groups[count] = dist.new_group(list(range(count)))
    return groups[count]


def check_room(count: int) -> None:
    """Raise ValueError unless the world has so many ranks."""
    __tracebackhide__ = True
    if count > world_size():
        raise ValueError(
            f"expected a world of at least {count} ranks for this law, got {world_size()}: "
            "mark the test with a larger world_size, or draw smaller layouts"
        )


def shared_folder() -> Path:
    """A new temporary folder, the same in every rank. Collective over all ranks of the world."""
    made = [tempfile.mkdtemp(prefix="dcp-shared-") if rank() == 0 else ""]
    if dist.is_initialized():
        dist.broadcast_object_list(made)
    return Path(made[0])


def on_first_ranks(count: int, title: str, step: Callable[[], Sequence[object] | None]) -> None:
    """Take a step on the first ranks. Collective: no rank goes on before all of them are done.

    `step` returns what it finds wrong. Raises LawError, the same on every rank of the world, when
    it found anything or raised in any rank.
    """
    __tracebackhide__ = True
    problems: list[str] = []
    cause = None
    if rank() < count:
        try:
            problems = [str(one) for one in step() or ()]
        # CheckpointException is no Exception: Hypothesis would stop at it, and shrink nothing.
        except (Exception, CheckpointException) as error:  # noqa: BLE001  # raised again below
            problems, cause = [_said(error)], error
    said = _gathered(problems)
    if said:
        broken = LawError(_told(title, said))
        set_cause(broken, cause)
        raise broken


def _gathered(problems: list[str]) -> list[str]:
    """What all ranks have found, each once; one small message where nobody has anything."""
    if not dist.is_initialized():
        return problems
    flag = torch.tensor(bool(problems), dtype=torch.uint8, device=device_type())
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if not flag.item():
        return []
    said: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(said, problems)
    return list(dict.fromkeys(one for some in said for one in some))


def _said(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= TEXT_LIMIT else f"...{text[-TEXT_LIMIT:]}"


def _told(title: str, problems: list[str]) -> str:
    return "\n  ".join([f"{title}:", *(problem.replace("\n", "\n  ") for problem in problems)])
