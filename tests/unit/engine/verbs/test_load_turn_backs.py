"""A load is a pipe: find -> plan reads -> resolve places -> plan copies -> execute.

The rooms of the engine are layers: each may import those below it. So a load that reads from top to
bottom calls downwards only. A **turn-back** is one call in the other direction: a function is
entered while the engine's nearest frame on the stack is in a room below. As imports only go down,
every turn-back is a callback, a hook or an object that was handed down, and a reader has to leave
the module at hand to see where it leads.

Counted are the calls of one load on one rank, in the thread of the load. Each call counts, not each
pair of functions, so that a call for every tensor cannot hide. Frames of other packages are passed
over: a function that a `partial` or torch calls counts as called by the engine's frame above it.
`io` and `coordinate` stand side by side: a call between them has no direction.

The hooks of planners and readers alternate in torch's order (set_up_planner,
set_up_storage_reader, create_local_plan, prepare_local_plan, finish_plan, read_data). `verbs` calls
each of them downwards, which is no turn-back.
"""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import pytest_dcp
from pytest_dcp.checkpoint import DefaultLoadPlanner, FileSystemReader, load, save

PACKAGE = Path(pytest_dcp.__file__).parent
LAYERS = (
    ("checkpoint",),
    ("verbs",),
    ("huggingface",),
    ("storages",),
    ("planners",),
    ("io", "coordinate"),
    ("format",),
    ("unpickle",),
    ("plan",),
)
"""The rooms from top to bottom, as the import contract has them."""
LAYER_OF = {room: depth for depth, rooms in enumerate(LAYERS) for room in rooms}
MOST = 10
"""Four times the team runs a rank's part of a step (plan, compare, judge, fill), so that a failure
reaches all ranks; the others ask the reader for its place, whether it ignores plans, and for two
facts of its index, which it finds out when it is asked."""

TurnBack = tuple[str, str]
"""From which function, to which."""


class TurnBacks:
    """Counts turn-backs while it is entered."""

    def __init__(self) -> None:
        self.calls: Counter[TurnBack] = Counter()
        self._layers: dict[CodeType, int | None] = {}

    def __enter__(self) -> TurnBacks:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        layer, caller = self._layer(frame.f_code), frame.f_back
        while caller is not None and self._layer(caller.f_code) is None:
            caller = caller.f_back
        if layer is None or caller is None:
            return
        above = self._layer(caller.f_code)
        if above is not None and layer < above:
            self.calls[_name(caller.f_code), _name(frame.f_code)] += 1

    def _layer(self, code: CodeType) -> int | None:
        """The depth of the function's room; None for code that is not the engine's."""
        if code not in self._layers:
            self._layers[code] = _layer_of(code)
        return self._layers[code]

    def __str__(self) -> str:
        return "\n".join(f"{n:3} {one} -> {other}" for (one, other), n in self.calls.items())


def _layer_of(code: CodeType) -> int | None:
    path = Path(code.co_filename)
    if not path.is_relative_to(PACKAGE):
        return None
    parts = path.relative_to(PACKAGE).parts
    return LAYER_OF.get(parts[1] if parts[0] == "_engine" else parts[0])


def _name(code: CodeType) -> str:
    return f"{Path(code.co_filename).parent.name}.{Path(code.co_filename).stem}.{code.co_qualname}"


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def two_chunks() -> torch.Tensor:
    """A tensor that is saved in two chunks of two rows each."""
    tensor: Any = torch.arange(8.0).reshape(4, 2)
    tensor.global_shape = (4, 2)
    tensor.global_offsets = tensor.local_offsets = [(0, 0), (2, 0)]
    tensor.local_sizes = [(2, 2), (2, 2)]
    return tensor


def stored_state(more: int) -> dict[str, Any]:
    layers = {f"layer{n}": torch.full((3,), float(n)) for n in range(more)}
    return {
        "model": {
            **layers,
            "sharded": torch.arange(32.0).reshape(8, 4),
            "plain": torch.arange(4.0),
            "strided": torch.arange(24.0).reshape(4, 6),
            "half": torch.arange(5.0),
            "chunks": two_chunks(),
            "meta": torch.arange(3.0),
        },
        "optimizer": {"step": torch.tensor(3.0), "lr": 0.1, "names": ["a", "b"]},
        "epoch": torch.tensor(7),
    }


def target_state(mesh: Any, more: int) -> dict[str, Any]:
    """Every way to a target: by shards, flat, strided, converted, from meta, numbers, values."""
    layers = {f"layer{n}": torch.zeros(3) for n in range(more)}
    return {
        "model": {
            **layers,
            "sharded": DTensor.from_local(torch.zeros(4, 4), mesh, [Shard(0)]),
            "plain": torch.zeros(4),
            "strided": torch.zeros(6, 4).T,
            "half": torch.zeros(5, dtype=torch.float16),
            "chunks": torch.zeros(4, 2, dtype=torch.float64),
            "meta": torch.empty(3, device="meta"),
        },
        "optimizer": {"step": torch.zeros(()), "lr": 0.0, "names": ["", ""]},
        "epoch": 0,
    }


def turn_backs_of_load(
    folder: Path, mesh: Any, planner: Callable[[], DefaultLoadPlanner], more: int = 0
) -> TurnBacks:
    save(stored_state(more), checkpoint_id=folder, no_dist=True)
    state = target_state(mesh, more)
    reader, chosen = FileSystemReader(folder, thread_count=1), planner()
    with TurnBacks() as found:
        load(state, storage_reader=reader, planner=chosen, no_dist=True)
    # The second rank's part, and the others whole: the load that was counted did all of it.
    model = state["model"]
    assert model["sharded"].to_local().tolist() == torch.arange(16.0, 32.0).reshape(4, 4).tolist()
    assert model["strided"].tolist() == torch.arange(24.0).reshape(4, 6).tolist()
    assert model["half"].tolist() == model["half"].float().tolist() == [0, 1, 2, 3, 4]
    assert model["chunks"].tolist() == torch.arange(8.0).reshape(4, 2).tolist()
    assert model["meta"].tolist() == [0, 1, 2]
    assert all(model[f"layer{n}"].tolist() == [n] * 3 for n in range(more))
    assert state["optimizer"] == {"step": torch.tensor(3.0), "lr": 0.1, "names": ["a", "b"]}
    assert state["epoch"] == 7
    return found


def partial_planner() -> DefaultLoadPlanner:
    return DefaultLoadPlanner(allow_partial_load=True)


class HookedPlanner(DefaultLoadPlanner):
    """A user's planner, with hooks of its own for each tensor and value."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().commit_tensor(read_item, tensor)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        super().load_bytes(read_item, value)


class AskedPlanner(DefaultLoadPlanner):
    """Notes each time that it is asked what it can do."""

    def __init__(self) -> None:
        super().__init__(allow_partial_load=True)
        self.asked: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name in ("plans_alone", "takes_values", "plans_again", "repeatable"):
            self.asked[name] += 1
        return super().__getattribute__(name)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("more", [0, 20])
@pytest.mark.parametrize("planner", [partial_planner, HookedPlanner])
def test_a_load_turns_back_a_few_times_however_many_tensors_it_has(
    tmp_path: Path, mesh: Any, planner: Callable[[], DefaultLoadPlanner], more: int
) -> None:
    found = turn_backs_of_load(tmp_path, mesh, planner, more)
    assert 0 < found.calls.total() <= MOST, f"{found.calls.total()} turn-backs:\n{found}"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_planner_is_asked_once_for_each_capability(tmp_path: Path, mesh: Any) -> None:
    planner = AskedPlanner()
    turn_backs_of_load(tmp_path, mesh, lambda: planner)
    assert planner.asked == dict.fromkeys(
        ("plans_alone", "takes_values", "plans_again", "repeatable"), 1
    )
