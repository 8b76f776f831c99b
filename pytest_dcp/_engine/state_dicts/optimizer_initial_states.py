"""The states that an optimizer begins with, found without touching it or its parameters.

Optimizers make their states inside their first step. A twin of the optimizer takes one step on
zeros with gradients of zero, and the first value of each entry is kept: Adam's step count is 0,
Rprop's step size the learning rate, although the twin's own have moved on by the end of its step.
To find only the names of the entries, the twin steps on meta tensors, which cost neither memory nor
time.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pytest_dcp._engine.plan.opaque import is_wrapper, map_inner_tensors
from pytest_dcp._engine.state_dicts.packing import Spec
from pytest_dcp._torch_internals.dtensors import local_tensor, spec_of
from pytest_dcp._torch_internals.modules import drop_step_hooks
from pytest_dcp._torch_internals.tensors import is_traceable_wrapper_subclass
from pytest_dcp.errors import CheckpointError

BATCH_BYTES = 64 << 20
"""Make stand-ins for parameters of at most this many bytes at a time, or for one parameter: the
twin needs three to four times the memory."""


def initial_states(
    optimizer: Optimizer, group: dict[str, Any], parameters: Sequence[torch.Tensor]
) -> list[dict[str, Any]]:
    """The state of each of these parameters of a group before its first step.

    {} if the optimizer keeps none. Raises CheckpointError if the optimizer cannot step on
    stand-ins.
    """
    states: list[dict[str, Any]] = []
    for batch in _batches(parameters):
        states += _step_of_twin(optimizer, group, batch)
    return states


def _batches(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    size_bytes = 0
    for parameter in parameters:
        nbytes = parameter.numel() * parameter.itemsize
        if batch and size_bytes + nbytes > BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
        batch.append(parameter)
        size_bytes += nbytes
    if batch:
        yield batch


def _step_of_twin(
    optimizer: Optimizer, group: dict[str, Any], parameters: Sequence[torch.Tensor]
) -> list[dict[str, Any]]:
    stand_ins = [torch.zeros_like(p, requires_grad=True) for p in parameters]
    return _first_step(optimizer, group, stand_ins)


def _first_step(
    optimizer: Optimizer, group: dict[str, Any], stand_ins: Sequence[torch.Tensor]
) -> list[dict[str, Any]]:
    """The first values of each stand-in's entries, set by a twin that steps on them."""
    # Not by its constructor, whose arguments are unknown: copy the attributes, then change them.
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    # A scheduler's or a user's replacement of `step` would step the optimizer itself.
    twin.__dict__.pop("step", None)
    drop_step_hooks(twin)
    # A step may change a tensor among the settings in place, such as a learning rate.
    settings = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in group.items()}
    twin.param_groups = [{**settings, "params": list(stand_ins)}]
    states: defaultdict[torch.Tensor, Any] = defaultdict(_FirstValues)
    twin.state = states
    with _without_gradients(optimizer):
        for stand_in in stand_ins:
            stand_in.grad = torch.zeros_like(stand_in)
        try:
            twin.step()
        except Exception as error:
            kind = type(optimizer).__name__
            raise CheckpointError(
                f"{kind} has not been stepped, and its states cannot be made without a step "
                f"({type(error).__name__}: {error}): step it once before you ask for its state dict"
            ) from error
    return [states[s].first if s in states else {} for s in stand_ins]


@contextmanager
def _without_gradients(optimizer: Optimizer) -> Iterator[None]:
    """Remove the parameters' gradients within the block: a twin that holds the real parameters
    outside of its groups then has nothing to step on."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


REAL_BYTES = 1 << 20
"""An optimizer that cannot step on meta tensors steps on real ones, of at most this size."""

PLAIN_STEP = {"foreach": False, "fused": False, "capturable": False}
"""Settings of torch's optimizers that change only how they compute, not their states: meta tensors
allow only the plain way."""


def initial_entries(
    optimizer: Optimizer, group: dict[str, Any], specs: Sequence[Spec]
) -> dict[Spec, dict[str, Any]]:
    """The names of the entries, as far as the optimizer reveals them."""
    plain = {**group, **{key: value for key, value in PLAIN_STEP.items() if key in group}}
    # On meta tensors first; some optimizers read values as they step, which meta tensors lack.
    try:
        return _entries_on("meta", optimizer, plain, specs)
    except CheckpointError:
        small = [spec for spec in specs if spec.packed_bytes <= REAL_BYTES]
    try:
        return _entries_on("cpu", optimizer, plain, small)
    except CheckpointError:
        return {}


def _entries_on(
    device: str, optimizer: Optimizer, group: dict[str, Any], specs: Sequence[Spec]
) -> dict[Spec, dict[str, Any]]:
    stand_ins = [
        torch.zeros(spec.shape, dtype=spec.dtype, device=device, requires_grad=True)
        for spec in specs
    ]
    return dict(zip(specs, _first_step(optimizer, group, stand_ins), strict=True))


class _FirstValues(dict[str, Any]):
    """A state that remembers the first value of each entry."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first:
            self.first[key] = _copy_value(value)
        super().__setitem__(key, value)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **more: Any) -> None:
        for key, value in dict(*args, **more).items():
            self[key] = value


def _copy_value(value: Any) -> Any:
    return _copy_tensor(value) if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def _copy_tensor(value: Any) -> torch.Tensor:
    """A copy, on its device.

    A wrapper subclass is rebuilt around copies of its inner tensors: torchao's states cannot be
    cloned.
    """
    if isinstance(value, DTensor) and is_wrapper(local_tensor(value)):
        local = _copy_tensor(local_tensor(value))
        return DTensor(local, spec_of(value), requires_grad=False)  # type: ignore[no-untyped-call]
    if isinstance(value, DTensor) or not is_traceable_wrapper_subclass(value):
        copied: torch.Tensor = value.detach().clone()
        return copied
    return map_inner_tensors(value, _copy_tensor)
