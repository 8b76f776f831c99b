"""Whether a checkpoint holds a state: it is loaded into an empty copy and compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor

BLANK = 0x5A
"""The byte that fills empty tensors: it shows values that were not loaded."""


def plain(state: Any) -> Any:
    """The state with each Stateful object replaced by its state."""
    if isinstance(state, Stateful) and not isinstance(state, torch.Tensor):
        return plain(state.state_dict())
    if isinstance(state, Mapping):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple) and not hasattr(state, "_fields"):
        return type(state)(plain(value) for value in state)
    return state


def blank(value: Any) -> Any:
    """The same state without its values: tensors of the same kind, None for the rest."""
    if isinstance(value, DTensor):
        return DTensor.from_local(
            blank(value.to_local()),
            value.device_mesh,
            value.placements,
            shape=value.shape,
            stride=value.stride(),
        )
    if isinstance(value, ShardedTensor):
        sharded = copy.deepcopy(value)
        for shard in sharded.local_shards():
            bits(shard.tensor).fill_(BLANK)
        return sharded
    if isinstance(value, torch.Tensor):
        emptied = value.detach().clone(memory_format=torch.preserve_format)
        bits(emptied).fill_(BLANK)
        return emptied
    if isinstance(value, Mapping):
        return {key: blank(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(blank(inner) for inner in value)
    return None


def differences(actual: Any, expected: Any, where: str = "") -> Iterator[str]:
    """The differences, one line each, with the entry's name."""
    if isinstance(expected, torch.Tensor):
        yield from _tensors(actual, expected, where)
    elif isinstance(expected, Mapping):
        if not isinstance(actual, Mapping) or set(actual) != set(expected):
            summary = sorted(map(str, actual)) if isinstance(actual, Mapping) else actual
            yield f"{where or 'state'}: keys {sorted(map(str, expected))} expected, got {summary!r}"
            return
        for key, value in expected.items():
            yield from differences(actual[key], value, f"{where}.{key}" if where else str(key))
    elif isinstance(expected, list | tuple):
        if type(actual) is not type(expected) or len(actual) != len(expected):
            yield f"{where}: {expected!r} expected, got {actual!r}"
            return
        for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
            yield from differences(one, other, f"{where}.{number}")
    elif type(actual) is not type(expected) or actual != expected:
        yield f"{where}: {expected!r} expected, got {actual!r}"


def _tensors(actual: Any, expected: torch.Tensor, where: str) -> Iterator[str]:
    if type(actual) is not type(expected) and not isinstance(actual, torch.Tensor):
        yield f"{where}: a {type(expected).__name__} expected, got {actual!r}"
        return
    ours, theirs = list(_parts(actual)), list(_parts(expected))
    if len(ours) != len(theirs):
        yield f"{where}: {len(theirs)} local parts expected, got {len(ours)}"
    for one, other in zip(ours, theirs, strict=False):
        if one.dtype != other.dtype or one.shape != other.shape:
            yield (
                f"{where}: {other.dtype} of {tuple(other.shape)} expected, got {one.dtype} of "
                f"{tuple(one.shape)}"
            )
            continue
        unlike = (bits(one) != bits(other)).any(-1)
        if unlike.any():
            first = tuple(unlike.nonzero()[0].tolist())[: one.dim()]
            yield (
                f"{where}: {int(unlike.sum())} of {unlike.numel()} elements differ, the first at "
                f"{first}: {other[first]} expected, got {one[first]}"
            )


def _parts(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, DTensor):
        yield value.to_local()
    elif isinstance(value, ShardedTensor):
        yield from (shard.tensor for shard in value.local_shards())
    else:
        yield value


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as bytes, in one more dimension."""
    tensor = tensor.detach()
    return (tensor.reshape(1) if tensor.dim() == 0 else tensor).unsqueeze(-1).view(torch.uint8)
