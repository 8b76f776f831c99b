"""A simulated save plans, writes and sends what real ranks do, to the byte."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pytest_dcp
import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.frame import FrameKind
from pytest_dcp._engine.verbs import plan_memory
from pytest_dcp._engine.verbs.save import Save
from pytest_dcp.properties.meshes import MeshSpec, meshes
from pytest_dcp.properties.placements import Layout, layouts
from pytest_dcp.properties.tensors import TensorSpec

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)
VALUES = (3, "text", [1, 2], {"lr": 0.5, "betas": (0.9, 0.99)}, None, b"bytes")


LATER_BYTES = 128
"""By which the answers of a later save may differ: it depends on the files' names."""


@dataclass
class Seen:
    """What one rank planned and sent in a save."""

    local: Any = None
    written: Any = None
    frames: dict[FrameKind, list[int]] = field(default_factory=dict)
    """The bytes of each frame, by kind."""


@contextmanager
def watch_save() -> Iterator[Seen]:
    """Watch the save inside. From outside: an engine that knew of it would send other messages."""
    seen = Seen()
    queue_encoded, write = Connection.queue_encoded, Save._write

    def queue(connection: Connection, pieces: list[Any]) -> None:
        kind = FrameKind(struct.unpack_from("<4sB", pieces[0])[1])
        nbytes = sum(memoryview(piece).nbytes for piece in pieces)
        seen.frames.setdefault(kind, []).append(nbytes)
        queue_encoded(connection, pieces)

    def write_plan(save: Save, plan: Any) -> Any:
        seen.local, seen.written = save._local_plan().items, plan.items
        return write(save, plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "queue_encoded", queue)
        patch.setattr(Save, "_write", write_plan)
        yield seen


@dataclass(frozen=True)
class Example:
    """A state in its layouts, and options."""

    mesh: MeshSpec
    tensors: tuple[tuple[TensorSpec, Layout], ...]
    values: tuple[Any, ...]
    per_rank: bool
    stages: bool
    """Whether odd ranks hold other keys than even ones."""
    threads: int
    one_file: bool
    replicas: Any
    lowest: bool

    def state(self, rank: int) -> dict[str, Any]:
        tensors = [layout.place(spec) for spec, layout in self.tensors]
        return self.nest(tensors, lambda: torch.arange(3.0), rank)

    def simulated_state(self) -> Any:
        if not self.stages:
            return self.meta_state(0)
        stages = [self.meta_state(0), self.meta_state(1)]
        return lambda rank: stages[rank % 2]

    def meta_state(self, rank: int) -> dict[str, Any]:
        tensors = [
            torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec, _ in self.tensors
        ]
        return self.nest(tensors, lambda: torch.empty(3, device="meta"), rank)

    def nest(self, tensors: list[Any], own: Any, rank: int) -> dict[str, Any]:
        named = {f"t{n}": tensor for n, tensor in enumerate(tensors)}
        state: dict[str, Any] = {"model": named, "values": list(self.values), **named}
        if self.per_rank:
            state["rng"] = dcp.PerRank({"state": own(), "name": "a"})
        if self.stages:
            state["stage"] = {f"{rank % 2}": own(), "layers": [{f"n{rank % 2}": 5}], "a": 1}
        return state

    def placements(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for n, (spec, layout) in enumerate(self.tensors):
            if layout.placements is not None:
                found[f"model.t{n}"] = found[f"t{n}"] = layout.fit(len(spec.shape))
        return found

    def write_to(self, folder: Path, state: dict[str, Any]) -> Any:
        writer = dcp.FileSystemWriter(
            folder, single_file_per_rank=self.one_file, thread_count=self.threads
        )
        return dcp.save(state, storage_writer=writer, planner=self.planner())

    def planner(self) -> Any:
        return dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=self.lowest, replicas=self.replicas)


@st.composite
def saves(draw: st.DrawFn, size: int) -> Example:
    mesh = draw(meshes(size))
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    specs = st.builds(TensorSpec, shapes, st.sampled_from(DTYPES))
    pairs = draw(st.lists(st.tuples(specs, layouts(mesh)), max_size=4))
    return Example(
        mesh,
        tuple(pairs),
        tuple(draw(st.lists(st.sampled_from(VALUES), max_size=3))),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(1, 3)),
        draw(st.booleans()),
        draw(st.sampled_from(["off", "check", "sample"])),
        draw(st.booleans()),
    )


def check(save: Example, rank: int, folder: Path, world: Any) -> None:
    """Save for real, simulate, and compare what this rank and the folder show."""
    # An earlier example may have had the same structure.
    plan_memory._memories.clear()
    world.barrier()
    state = save.state(rank)
    with watch_save() as seen:
        metadata = save.write_to(folder / "1", state)
    with watch_save() as later:
        save.write_to(folder / "2", state)
    folder /= "1"
    simulated = pytest_dcp.simulate(
        save.mesh.shape,
        save.placements(),
        save.simulated_state(),
        ranks=[rank],
        planner=save.planner(),
        thread_count=save.threads,
        single_file_per_rank=save.one_file,
        checkpoint_id=metadata.storage_meta.checkpoint_id,
    )
    plan = simulated.plans[rank]
    assert list(plan.local_items) == list(seen.local)
    assert list(plan.written_items) == list(seen.written)
    own = {path.name.partition("-")[0]: path.stat().st_size for path in folder.glob(f"__{rank}_*")}
    assert {file.name.partition("-")[0]: file.nbytes for file in plan.files} == own
    assert simulated.file_bytes[rank] == sum(own.values())
    assert (folder / ".metadata").stat().st_size == simulated.metadata_bytes
    if save.replicas != "sample":  # a sample is random, and so is its length
        check_messages(simulated.steps, seen, rank)
        check_messages(simulated.later_steps, later, rank, within=LATER_BYTES)
    world.barrier()


def check_messages(steps: Sequence[Any], seen: Seen, rank: int, *, within: int = 0) -> None:
    up = [int(step.to_coordinator[rank]) for step in steps]
    down = [int(one) for step in steps for one in step.from_coordinator[1:]]
    assert seen.frames.get(FrameKind.VALUE, []) == ([] if rank == 0 else up)
    sent, expected = (
        sorted(seen.frames.get(FrameKind.RESULT, [])),
        sorted(down if rank == 0 else []),
    )
    assert len(sent) == len(expected)
    assert all(abs(a - b) <= within for a, b in zip(sent, expected, strict=True))


@pytest.mark.world_size(2, isolation="module")
@given(save=saves(2))
@settings(max_examples=30)
def test_two_ranks_save_as_simulated(
    save: Example, rank: int, checkpoint_dir: Path, world: Any
) -> None:
    check(save, rank, checkpoint_dir, world)


@pytest.mark.world_size(4, isolation="module")
@given(save=saves(4))
@settings(max_examples=30)
def test_four_ranks_save_as_simulated(
    save: Example, rank: int, checkpoint_dir: Path, world: Any
) -> None:
    check(save, rank, checkpoint_dir, world)


@pytest.mark.world_size(8, isolation="module")
@given(save=saves(8))
@settings(max_examples=10)
def test_eight_ranks_save_as_simulated(
    save: Example, rank: int, checkpoint_dir: Path, world: Any
) -> None:
    check(save, rank, checkpoint_dir, world)
