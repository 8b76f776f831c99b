"""Tensors that are more than their elements: their kinds, and whether a checkpoint can hold them.

An opaque tensor is a wrapper subclass, whose values are in inner tensors (`__tensor_flatten__`: for
example torchao's), or has a quantised dtype, which comes with scales. It is saved as a value, as
torch pickles it, and loaded into a tensor of the same class, inner tensor by inner tensor. As the
local tensor of a DTensor, a wrapper is a part of the full tensor, and its entry is again what torch
pickles; only the wrapper's own class knows how to cut it further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp._torch_internals.tensors import is_traceable_wrapper_subclass

HOOK = "__create_write_items__"
"""A class with this method defines how it is saved."""

PLAIN_KINDS = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Classes whose objects are no wrappers."""

STORED_DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool),
        *(torch.complex128, torch.complex64, torch.complex32),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        *(torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
        *(torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2),
    }
)
"""The dtypes of elements that a data file can hold."""


def is_opaque(value: Any) -> bool:
    """Whether a value of a state dict is an opaque tensor."""
    if type(value) in PLAIN_KINDS:
        quantised: bool = value.is_quantized
        return quantised
    if not isinstance(value, torch.Tensor) or isinstance(value, DTensor | ShardedTensor):
        return False
    if value.is_nested or hasattr(value, HOOK):
        return False
    tensor: Any = value
    return bool(is_traceable_wrapper_subclass(tensor) or tensor.is_quantized)


def is_wrapper(memory: Any) -> bool:
    """Whether a local tensor is a wrapper of other tensors, not memory of its own."""
    return type(memory) not in PLAIN_KINDS and bool(is_traceable_wrapper_subclass(memory))


def inner_tensors(wrapper: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The inner tensors of a wrapper by name, in its own order."""
    for name in wrapper.__tensor_flatten__()[0]:
        yield name, getattr(wrapper, name)


def map_inner_tensors(wrapper: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """A wrapper of the same class and size around `change(inner)` of each inner tensor."""
    names, context = wrapper.__tensor_flatten__()
    changed = {name: change(getattr(wrapper, name)) for name in names}
    rebuilt: torch.Tensor = type(wrapper).__tensor_unflatten__(
        changed, context, wrapper.size(), wrapper.stride()
    )
    return rebuilt


def inner_nbytes(wrapper: torch.Tensor) -> int:
    """Bytes of the tensors within a wrapper, at any depth."""
    return sum(
        inner_nbytes(inner) if is_wrapper(inner) else inner.nbytes
        for _, inner in inner_tensors(wrapper)
    )


def inner_problem(
    fqn: str, wrapper: torch.Tensor, problem_of: Callable[[str, Any], str | None]
) -> str | None:
    """The first reason why a tensor within a wrapper cannot be saved, at any depth; None if none.

    problem_of: the reason for a tensor that is no wrapper, from its name and itself.
    """
    for name, inner in inner_tensors(wrapper):
        within = f"{fqn}.{name}"
        if is_wrapper(inner):
            problem = inner_problem(within, inner, problem_of)
        else:
            problem = problem_of(within, inner)
        if problem is not None:
            return problem
    return None


def what_no_file_holds(fqn: str, memory: Any) -> str | None:
    """The reason why no checkpoint can hold a tensor of this type, naming the key, or None."""
    if memory.is_nested:
        return f"{fqn!r} is a nested tensor: save its values() and offsets()"
    if isinstance(memory, torch.masked.MaskedTensor):
        return f"{fqn!r} is a masked tensor: save its get_data() and get_mask()"
    if memory.layout is not torch.strided:
        return f"{fqn!r} has layout {memory.layout}: save its to_dense()"
    if memory.is_quantized:
        return f"{fqn!r} is quantized ({memory.dtype}): save its int_repr(), scale and zero point"
    if memory.dtype not in STORED_DTYPES:
        return f"{fqn!r} has dtype {memory.dtype}, which no checkpoint holds: view or convert it"
    return None
