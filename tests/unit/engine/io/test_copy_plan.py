"""The memory that copies write to is checked as columns: with the same verdict as one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.io.copy_plan import Copies, Targets, copies
from pytest_dcp._engine.plan.describe import wanted_boxes
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.load import read_items
from pytest_dcp._engine.plan.shards import require_memory
from pytest_dcp.errors import PlanError

SHAPE = (4, 3)


def _plan(tensors: dict[str, torch.Tensor], *, nothing: bool = False) -> Copies:
    """The copies into these tensors from a checkpoint of the same shapes and dtypes.

    nothing: the items copy no element, as those of a program's own planner may.
    """

    def stored(tensor: torch.Tensor) -> TensorStorageMetadata:
        origin = torch.Size([0] * tensor.dim())
        chunks = [ChunkStorageMetadata(origin, tensor.shape)]
        return TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)

    index = Index.of({fqn: stored(tensor) for fqn, tensor in tensors.items()})
    items = read_items(wanted_boxes(tensors), index)
    if nothing:
        items = replace(items, shape=np.zeros_like(items.shape))
        tensors = {fqn: _with_storage_of(torch.zeros(0, 3), 0) for fqn in tensors}
    targets = Targets(np.arange(len(items)), [tensors[fqn] for fqn in items.fqns])
    return copies(items, targets, index, odd_strides={})


def _with_storage_of(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    tensor.untyped_storage().resize_(elements * tensor.itemsize)
    return tensor


def _view(first: int, elements: int) -> torch.Tensor:
    """A view that begins `first` elements into its storage, which is then cut to `elements`."""
    return _with_storage_of(torch.zeros(20)[first : first + 12].view(SHAPE), elements)


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(SHAPE)


LARGE_ENOUGH = {
    "whole": lambda: torch.zeros(SHAPE),
    "view that ends with its storage": lambda: _view(5, 17),
    "transposed": lambda: torch.zeros(3, 4).T,
    "columns that end with their storage": lambda: _with_storage_of(torch.zeros(4, 5)[:, 2:4], 19),
    "without dimensions": lambda: torch.zeros(()),
    "conjugate": lambda: torch.zeros(SHAPE, dtype=torch.complex64).conj(),
    "negated": lambda: torch.zeros(SHAPE, dtype=torch.complex64).conj().imag,
    "parameter": lambda: torch.nn.Parameter(torch.zeros(SHAPE)),
}
TOO_SMALL = {
    "freed": lambda: _with_storage_of(torch.zeros(SHAPE), 0),
    "an element short": lambda: _with_storage_of(torch.zeros(SHAPE), 11),
    "view, an element short": lambda: _view(5, 16),
    "columns, an element short": lambda: _with_storage_of(torch.zeros(4, 5)[:, 2:4], 18),
    "without dimensions, freed": lambda: _with_storage_of(torch.zeros(()), 0),
    "freed parameter": lambda: torch.nn.Parameter(_with_storage_of(torch.zeros(SHAPE), 0)),
    "freed conjugate": lambda: _with_storage_of(
        torch.zeros(SHAPE, dtype=torch.complex64), 0
    ).conj(),
    "fake": _fake,
}


def test_targets_with_memory_are_planned_together() -> None:
    tensors = {name: make() for name, make in LARGE_ENOUGH.items()}
    found = _plan(tensors)
    assert len(found) == len(tensors)
    for tensor, address, flat in zip(
        found.target, found.address.tolist(), found.flat.tolist(), strict=True
    ):
        require_memory("any", tensor)
        direct = not (tensor.is_conj() or tensor.is_neg())
        assert address == (tensor.data_ptr() if direct else 0)
        assert flat == (direct and tensor.is_contiguous())


@pytest.mark.parametrize("name", TOO_SMALL)
def test_a_target_without_memory_is_refused_among_others(name: str) -> None:
    bad = TOO_SMALL[name]()
    with pytest.raises(PlanError) as alone:
        require_memory("bad", bad)
    tensors = {"first": torch.zeros(SHAPE), "bad": bad, "last": torch.zeros(2)}
    with pytest.raises(PlanError) as together:
        _plan(tensors)
    assert str(together.value) == str(alone.value)


def test_no_targets_give_no_copies() -> None:
    assert not len(_plan({}))


def test_an_empty_target_needs_no_memory() -> None:
    found = _plan({"w": torch.zeros(SHAPE)}, nothing=True)
    assert found.nbytes.tolist() == [0]
