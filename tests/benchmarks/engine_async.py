"""How long `async_save` keeps the training waiting: the call alone, not the save behind it.

torch's saves get a process group to themselves: their collectives would be taken for those of
training in the other. Each round's save is over before the next method's call begins. The floor is
a copy of the same tensors to memory that has been touched.
"""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import engine_moves
import engine_peers as peers
import engine_states as states
import torch.distributed as dist
from engine_cases import OURS, OURS_IN_PROCESS, RAW, TORCH, Case
from engine_ranks import World
from torch.distributed.checkpoint import filesystem, staging, state_dict_saver

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

DEADLINE_S = 600


def run(
    case: Case, world: World, folder: Path, rounds: int, quick: bool, profile: bool
) -> engine_moves.Answer:
    """The answer of a rank."""
    moves = engine_moves.Moves(case, world, folder, rounds, quick, profile)
    state = moves.source(alone=False)
    apart = dist.new_group()
    under_way: dict[str, Future[Any]] = {}

    def begin(name: str, save: Callable[[Path], Any]) -> Callable[[], None]:
        def step() -> None:
            started = save(folder / name)
            waits = isinstance(started, AsyncSaveResponse)
            under_way[name] = started.upload_completion if waits else started

        return step

    copies = [states.local_of(tensor).clone() for tensor in state.values()]

    def copied() -> None:
        for tensor, copy in zip(state.values(), copies, strict=True):
            copy.copy_(states.local_of(tensor))

    everything: dict[str, Callable[[], object]] = {
        OURS: begin(OURS, lambda path: _ours(state, path, AsyncCheckpointerType.THREAD)),
        OURS_IN_PROCESS: begin(
            OURS_IN_PROCESS, lambda path: _ours(state, path, AsyncCheckpointerType.PROCESS)
        ),
        TORCH: begin(TORCH, lambda path: _torchs(state, path, apart)),
        RAW: copied,
    }
    steps = {name: everything[name] for name in moves.methods}

    def finish(name: str) -> None:
        if name in under_way:
            under_way.pop(name).result(DEADLINE_S)
            moves.remove(folder / name)

    target = moves.target_of_save()
    for name, step in steps.items():
        world.barrier()
        step()
        if name in under_way:
            under_way[name].result(DEADLINE_S)
            world.barrier()
            states.clear(target)
            peers.load_ours(target, folder / name)
            states.check(target, f"{case.name}, {name}")
        finish(name)
    return moves.measured(steps, finish)


def _ours(state: states.State, folder: Path, where: AsyncCheckpointerType) -> Any:
    writer = dcp.FileSystemWriter(folder, sync_files=False)
    return dcp.async_save(dict(state), storage_writer=writer, async_checkpointer_type=where)


def _torchs(state: states.State, folder: Path, group: Any) -> Any:
    writer = filesystem.FileSystemWriter(folder, sync_files=False)
    stager = staging.DefaultStager(staging.StagingOptions(False, False, False, False))
    return state_dict_saver.async_save(
        dict(state), storage_writer=writer, async_stager=stager, process_group=group
    )
