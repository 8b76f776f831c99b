"""How many functions of the engine a save, a load and a state dict call for each tensor.

A model has thousands of small tensors, and a call in Python takes about 0.1 us: with them, most of
the processor's time goes into calls. So the number of calls for one more tensor is a cost that can
be counted, and is the same on a busy machine. Counted are the calls, in all threads, of this
package's functions; a generator that goes on counts as a call. Each limit is the measured number.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import pytest_dcp
from pytest_dcp.checkpoint import FileSystemReader, FileSystemWriter, load, save
from pytest_dcp.checkpoint.state_dict import get_state_dict

PACKAGE = str(Path(pytest_dcp.__file__).parent)
FEW, MORE = 10, 110
"""Tensors; only the difference is counted, without what a call costs however small it is."""

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def calls_of(step: Callable[[], object]) -> Counter[str]:
    """How often each function of the package is called in a step."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            calls[f"{Path(code.co_filename).stem}.{code.co_name}"] += 1

    before, before_in_threads = sys.getprofile(), threading.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
        threading.setprofile(before_in_threads)  # type: ignore[arg-type] # None ends it
    return calls


def check_calls(few: Counter[str], more: Counter[str], limit: float) -> None:
    """Require that one more tensor takes at most so many calls."""
    found = {name: (n - few[name]) / (MORE - FEW) for name, n in more.items() if n > few[name]}
    total = round(sum(found.values()), 2)
    shown = "\n".join(f"{n:6.2f} {name}" for name, n in sorted(found.items(), key=lambda x: -x[1]))
    assert total <= limit, f"{total:.2f} calls for each tensor, expected {limit} at most:\n{shown}"


def sharded_state(mesh: DeviceMesh, tensors: int) -> dict[str, Any]:
    """As many tensors, sharded, replicated and plain in turn."""
    layouts = (
        lambda local: DTensor.from_local(local, mesh, [Shard(0)], run_check=False),
        lambda local: DTensor.from_local(local, mesh, [Replicate()], run_check=False),
        lambda local: local,
    )
    return {f"layer{n}": layouts[n % 3](torch.full((4, 8), float(n))) for n in range(tensors)}


def test_a_small_tensor_is_saved_with_few_calls(mesh: DeviceMesh, tmp_path: Path) -> None:
    def calls(tensors: int) -> Counter[str]:
        state = sharded_state(mesh, tensors)
        writer = FileSystemWriter(tmp_path / str(tensors), sync_files=False)
        return calls_of(lambda: save(state, storage_writer=writer, no_dist=True))

    calls(1)  # imports
    check_calls(calls(FEW), calls(MORE), 18)


def test_a_small_tensor_is_loaded_with_few_calls(mesh: DeviceMesh, tmp_path: Path) -> None:
    def calls(tensors: int) -> Counter[str]:
        state = sharded_state(mesh, tensors)
        save(state, checkpoint_id=tmp_path / str(tensors), no_dist=True)
        reader = FileSystemReader(tmp_path / str(tensors))
        return calls_of(lambda: load(state, storage_reader=reader, no_dist=True))

    calls(1)
    check_calls(calls(FEW), calls(MORE), 7.1)


class Walked(torch.nn.Sequential):
    """Counts the walks over its modules."""

    walks = 0

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        Walked.walks += 1
        return super().named_modules(*args, **kwargs)


def test_a_model_is_read_with_few_calls_and_walks() -> None:
    def calls(layers: int) -> Counter[str]:
        model = Walked(*(torch.nn.Linear(2, 2, bias=False) for _ in range(layers)))
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        Walked.walks = 0
        return calls_of(lambda: get_state_dict(model, optimizer))

    few, more = calls(FEW), calls(MORE)
    # One finds the parameters and one the modules: every module passes through each above it.
    assert Walked.walks == 2
    check_calls(few, more, 9)
