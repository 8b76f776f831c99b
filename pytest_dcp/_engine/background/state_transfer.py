"""Data sent from a rank to its background process: a pickle, and one stretch of shared memory.

In the pickle of a staged state each tensor is only its place in the memory, which both processes
map. Classes and functions of the user's own program are sent by value, since the background process
does not run that program.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.declared_parts import declarations_of, declare_parts, declares_parts
from pytest_dcp._engine.plan.shards import hooks_of, with_hooks
from pytest_dcp._engine.staging.buffer_pool import Memory, shared_memory_of, view_bytes
from pytest_dcp._engine.staging.stager import (
    KEPT_SHARED,
    dtensor,
    stage_state,
    tensors_of,
)
from pytest_dcp._torch_internals.dtensors import forget_groups, local_tensor
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor, make_detached_sharded_tensor

Reduced = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Shipment:
    """A state to send."""

    pickled: bytes
    memory: Memory | None
    """The memory of its tensors; None without tensors."""
    state: Any
    """Keeps the memory from being used for another state meanwhile."""


def ship_state(state: dict[str, Any]) -> Shipment:
    """Prepare a staged state for sending: tensors outside of shared memory are copied to it.

    Raises TypeError, or the error from pickling a value.
    """
    memories = {shared_memory_of(tensor) for tensor in tensors_of(state)}
    if len(memories) > 1 or None in memories:
        state = stage_state(state, KEPT_SHARED)
        memories = {shared_memory_of(tensor) for tensor in tensors_of(state)}
    memory = next(iter(memories), None)
    return Shipment(pickle_state(state, memory), memory, state)


def pickle_state(value: Any, memory: Memory | None = None) -> bytes:
    """The pickle of a value for the background process."""
    stream = io.BytesIO()
    StatePickler(stream, memory).dump(value)
    return stream.getvalue()


def unpickle_state(data: bytes, flat: torch.Tensor | None = None) -> Any:
    """The value, with tensors that view the shared memory. Only for data sent by a rank."""
    return StateUnpickler(io.BytesIO(data), flat).load()


class StatePickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle ships no types
    def __init__(self, stream: io.BytesIO, memory: Memory | None) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._memory = memory

    def reducer_override(self, value: Any) -> Any:
        reduced: Reduced | None = None
        if isinstance(value, DTensor):
            memory = local_tensor(value)
            if hooks := hooks_of(memory):
                reduced = dtensor_with_hooks, (memory.detach(), hooks, value._spec)
            else:
                reduced = dtensor, (memory, value._spec)
        elif isinstance(value, ShardedTensor):
            reduced = (
                make_detached_sharded_tensor,
                (value.local_shards(), value.metadata(), value.sharding_spec()),
            )
        elif isinstance(value, torch.Tensor) and declares_parts(value):
            reduced = declare_parts, (value.detach(), declarations_of(value))
        elif isinstance(value, torch.Tensor):
            reduced = self._place_of(value)
        elif isinstance(value, DeviceMesh):
            reduced = _reduced_mesh(value)
        return super().reducer_override(value) if reduced is None else reduced

    def _place_of(self, tensor: torch.Tensor) -> Reduced | None:
        if self._memory is None or shared_memory_of(tensor) is not self._memory:
            return None
        if type(tensor) is not torch.Tensor or not tensor.is_contiguous():
            return None
        start = tensor.data_ptr() - self._memory.address if tensor.numel() else 0
        return tensor_in_memory, (start, tensor.dtype, tuple(tensor.shape))


def dtensor_with_hooks(local: torch.Tensor, hooks: Mapping[str, Any], spec: Any) -> DTensor:
    """A DTensor whose local tensor says itself where its parts lie."""
    return dtensor(with_hooks(local, hooks), spec)


class StateUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, flat: torch.Tensor | None) -> None:
        super().__init__(stream)
        self._flat = flat

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (tensor_in_memory.__module__, tensor_in_memory.__name__):
            return self._place
        return super().find_class(module, name)

    def _place(self, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        if self._flat is None:
            raise ValueError("the pickle names shared memory, but none came with it")
        return view_bytes(self._flat, start, dtype, shape)


def tensor_in_memory(start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Stands for a tensor of the shared memory in a pickle that `unpickle_state` reads."""
    raise TypeError("a state for the background process is read by `unpickle_state` only")


def _reduced_mesh(mesh: DeviceMesh) -> Reduced:
    """The mesh without its process groups, which the background process does not have."""
    new: Callable[..., Any] = copyreg.__newobj__  # type: ignore[attr-defined]  # not in typeshed
    return new, (type(mesh),), mesh.__getstate__(), None, None, _set_mesh


def _set_mesh(mesh: DeviceMesh, state: Mapping[str, Any]) -> None:
    mesh.__dict__.update(state)
    forget_groups(mesh)
