"""The cases without data: planning for many ranks, and the index of a big checkpoint.

One process plays all ranks, since only the coordinator's time grows with their number. Of a plan
step, only the critical path is timed: one rank encodes its local plan, the coordinator decodes all
of them, makes the global plan and encodes every reply, one rank decodes its own. The wire is left
out for both engines.
"""

import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_cases import FOREIGN, OURS, TORCH, Case
from engine_moves import Answer, profiled
from engine_ranks import World, alternate
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner as TorchSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.coordinate.wire import pack, unpack
from pytest_dcp._engine.format import metadata_file
from pytest_dcp._engine.format.catalog import BLOCK_BYTES, Catalog, EntryPlaces
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._engine.plan.index import index_of
from pytest_dcp._engine.verbs.plan_exchange import KnownPlan, NewPlan, PlanExchange, digest_of
from pytest_dcp._engine.verbs.plan_memory import PlanMemory
from pytest_dcp._engine.verbs.save_messages import compress_plan

TENSORS = 1_000
COLUMNS = 1_024
ROWS_OF_A_RANK = 4
CHUNKS = 256
ENTRY_EXTRA_BYTES = 2_048
"""Of an entry, around its data."""
HEADER_BYTES = 1_024
SLOW_RANKS = 256
SLOW_ROUNDS = 2
SLOWEST_RANKS = 1_024
QUICK_PART = 16

Stages = dict[str, Callable[[], object]]


def write_plan(rank: int, size: int, tensors: int) -> SavePlan:
    """The local plan of one of `size` ranks over which every tensor is sharded by rows."""
    full = torch.Size((ROWS_OF_A_RANK * size, COLUMNS))
    corner = torch.Size((ROWS_OF_A_RANK * rank, 0))
    shape = torch.Size((ROWS_OF_A_RANK, COLUMNS))
    items = [
        WriteItem(
            MetadataIndex(fqn, corner),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(corner, shape), TensorProperties(torch.float32), full
            ),
        )
        for fqn in _fqns(tensors)
    ]
    return SavePlan(items, planner_data={fqn: (fqn,) for fqn in _fqns(tensors)})


def _fqns(tensors: int) -> list[str]:
    return [f"model.layers.{n // 8}.block.{n % 8}.weight" for n in range(tensors)]


def our_plans(size: int, tensors: int) -> list[SavePlan]:
    """The same local plans in columns, as our planner makes them."""
    first = write_plan(0, size, tensors)
    items = WriteItems.of(first.items)
    step = np.array([ROWS_OF_A_RANK, 0], dtype=np.int64)
    tables: list[Any] = [replace(items, offset=items.offset + rank * step) for rank in range(size)]
    return [replace(first, items=table) for table in tables]


class OurStep:
    """Our plan step with its messages, stage after stage."""

    def __init__(self, plans: Sequence[SavePlan], *, again: bool = False) -> None:
        """again: a later save of the same plans, of which the ranks send the digests."""
        self.plans = plans
        self.metadata: Metadata | None = None
        self._planner = dcp.DefaultSavePlanner()
        self._again = False
        digests = list(map(digest_of, plans))
        self.payloads = [_sent(NewPlan(*new)) for new in zip(plans, digests, strict=True)]
        self.run()
        if again:
            name = self._here.structures[0].name
            self.payloads = [_sent(KnownPlan(digest, name)) for digest in digests]
            self._again = True

    def run(self) -> None:
        """The critical path: the last rank's message, the coordinator's work, its answer there."""
        if not self._again:
            self._here, self._there = PlanMemory(), PlanMemory()
        here, there, last = self._here, self._there, len(self.plans) - 1
        rank = PlanExchange(self._planner, there, last)
        pack(rank.offer(self.plans[-1]))
        coordinator = PlanExchange(self._planner, here, 0)
        own = coordinator.offer(self.plans[0])
        offers = [own, *(unpack(payload) for payload in self.payloads[1:])]
        if coordinator.ask_for(offers) is not None:
            raise RuntimeError("the coordinator does not know the plans")
        local, joined, self.metadata = coordinator.join()
        plans = dcp.FileSystemWriter("unused").prepare_global_plan(joined)
        compressed = [compress_plan(*pair) for pair in zip(plans, local, strict=True)]
        replies = [pack(answer) for answer in coordinator.answers(compressed, [None] * len(local))]
        rank.accept(unpack(replies[-1]))


def _sent(message: object) -> list[bytes]:
    return [bytes(part) for part in pack(message)]


@dataclass
class TorchStep:
    """torch's plan step; its ranks send their plans as pickles."""

    plan: SavePlan
    payloads: Sequence[bytes]
    metadata: Metadata | None = None

    def run(self) -> None:
        """The critical path."""
        pickle.dumps(self.plan)
        plans = [pickle.loads(payload) for payload in self.payloads]
        joined, self.metadata = TorchSavePlanner().create_global_plan(plans)
        global_plans = filesystem.FileSystemWriter("unused").prepare_global_plan(joined)
        replies = [pickle.dumps(plan) for plan in global_plans]
        pickle.loads(replies[0])


def torch_step(size: int, tensors: int) -> TorchStep:
    """torch's plan step with the pickles that the ranks sent."""
    first = write_plan(0, size, tensors)
    return TorchStep(first, [pickle.dumps(write_plan(rank, size, tensors)) for rank in range(size)])


def run_plan(
    case: Case, world: World, rounds: int, *, quick: bool, full: bool, profile: bool
) -> Answer:
    """Time the plan step; torch's at the largest size only if `full`, for it takes minutes."""
    tensors = TENSORS // QUICK_PART if quick else TENSORS
    again = case.kind == "plan again"
    ours = OurStep(our_plans(case.ranks, tensors), again=again)
    steps: dict[str, Callable[[], object]] = {OURS: ours.run}
    with_torch = TORCH in case.methods and (full or quick or case.ranks < SLOWEST_RANKS)
    notes: dict[str, object] = {
        "bytes of our local plan": sum(map(len, ours.payloads[-1])),
        "tensors": tensors,
    }
    if with_torch:
        theirs = torch_step(case.ranks, tensors)
        steps[TORCH] = theirs.run
        notes["bytes of torch's local plan"] = len(theirs.payloads[0])
    ours.run()
    slow = {} if quick or case.ranks < SLOW_RANKS else {TORCH: SLOW_ROUNDS}
    if case.ranks >= SLOWEST_RANKS:
        slow[TORCH] = 1
    ms = alternate(world, steps, rounds, at_most=slow)
    if with_torch:
        _same(ours.metadata, theirs.metadata, case.name)
    if profile:
        notes["profile"] = profiled(ours.run)
    return {"ms": ms, "notes": notes}


def _same(ours: Metadata | None, theirs: Metadata | None, who: str) -> None:
    """Raises RuntimeError unless both planned the same tensors and chunks."""
    if ours is None or theirs is None:
        raise RuntimeError(f"{who}: a planner gave no metadata")
    if list(ours.state_dict_metadata) != list(theirs.state_dict_metadata):
        raise RuntimeError(f"{who}: the planners know other tensors")
    for fqn, their in theirs.state_dict_metadata.items():
        our: Any = ours.state_dict_metadata[fqn]
        if our.size != their.size or list(our.chunks) != list(their.chunks):  # type: ignore[union-attr] # tensors only
            raise RuntimeError(f"{who}: the planners differ about {fqn!r}")


# The index.


def big_catalog(tensors: int, chunk_bytes: int, folder: Path) -> Catalog:
    """The catalog of `tensors` tensors in 256 chunks, each rank's in a file of its own."""
    plans = our_plans(CHUNKS, tensors)
    _, metadata = dcp.DefaultSavePlanner().create_global_plan(plans)
    index = index_of(metadata)
    scale = chunk_bytes // (ROWS_OF_A_RANK * COLUMNS * 4)
    wide = np.array([scale, 1], dtype=np.int64)
    index = replace(
        index, size=index.size * wide, offset=index.offset * wide, shape=index.shape * wide
    )
    return Catalog(
        index,
        _places(tensors, chunk_bytes),
        metadata.planner_data,
        StorageMeta(checkpoint_id=str(folder), save_id="0" * 32),
        "1.0.0",
    )


def _places(tensors: int, chunk_bytes: int) -> EntryPlaces:
    chunks = tensors * CHUNKS
    rank, number = np.arange(chunks) % CHUNKS, np.arange(chunks) // CHUNKS
    length = np.full(chunks, chunk_bytes + ENTRY_EXTRA_BYTES, dtype=np.int64)
    start = number * length
    blocks = chunk_bytes // BLOCK_BYTES
    return EntryPlaces(
        files=tuple(f"__{rank}_0_0123456789ab.distcp" for rank in range(CHUNKS)),
        file=rank.astype(np.int32),
        start=start,
        length=length,
        data_start=start + HEADER_BYTES,
        data_nbytes=np.full(chunks, chunk_bytes, dtype=np.int64),
        first_sum=np.arange(chunks + 1, dtype=np.int64) * blocks,
        sums=np.arange(chunks * blocks, dtype=np.uint32),
    )


def run_index(
    case: Case, world: World, folder: Path, rounds: int, *, quick: bool, profile: bool
) -> Answer:
    """Time opening an index, or writing one, of 256 chunks for each tensor."""
    tensors = TENSORS // QUICK_PART if quick else TENSORS
    chunk_bytes = 1 << 20 if "1 MB" in case.name else BLOCK_BYTES
    ours, theirs = folder / "ours", folder / "torch"
    for place in (ours, theirs):
        place.mkdir()
    catalog = big_catalog(tensors, chunk_bytes, ours)
    (ours / ".metadata").write_bytes(b"".join(metadata_file.encode(catalog)))
    stock = filesystem.FileSystemReader(ours).read_metadata()
    (theirs / ".metadata").write_bytes(pickle.dumps(stock))
    mine = dcp.FileSystemReader(ours).read_metadata()
    _same(mine, stock, case.name)
    _same_places(mine, stock, case.name)
    if case.name.startswith("open"):
        read_ours = read_columns if case.name.endswith("all columns") else read_metadata
        steps: dict[str, Callable[[], object]] = {
            OURS: partial(read_ours, ours),
            TORCH: lambda: filesystem.FileSystemReader(theirs).read_metadata(),
            FOREIGN: lambda: dcp.FileSystemReader(theirs).read_metadata(),
        }
    else:
        steps = {
            OURS: partial(metadata_file.encode, catalog),
            TORCH: partial(pickle.dumps, stock),
        }
    steps = {name: step for name, step in steps.items() if name in case.methods}
    ms = alternate(world, steps, rounds)
    notes: dict[str, object] = {
        "bytes of our .metadata": (ours / ".metadata").stat().st_size,
        "bytes of torch's .metadata": (theirs / ".metadata").stat().st_size,
    }
    if profile:
        notes["profile"] = profiled(steps[OURS])
    for place in (ours, theirs):
        shutil.rmtree(place)
    return {"ms": ms, "notes": notes}


def read_metadata(folder: Path) -> Metadata:
    """The metadata as our reader gives it: a large one's chunks are read when they are used."""
    return dcp.FileSystemReader(folder).read_metadata()


def read_columns(folder: Path) -> Metadata:
    """The same, with all that a load of all tensors uses."""
    metadata: Any = read_metadata(folder)
    places, index = metadata.storage_data.catalog.places, metadata.state_dict_metadata.source
    if len(places.file) != len(index.offset):
        raise RuntimeError("the columns differ in length")
    return metadata  # type: ignore[no-any-return] # Any on purpose


def _same_places(ours: Metadata, stock: Metadata, who: str) -> None:
    """Raises RuntimeError unless both say the same about where the first chunks are."""
    for key in list(stock.storage_data)[: 10 * CHUNKS]:
        if ours.storage_data[key] != stock.storage_data[key]:
            raise RuntimeError(f"{who}: the readers differ about where {key} is")
