"""State dicts of models and optimizers that do not depend on how the model is wrapped or sharded.

Names, signatures and results are those of `torch.distributed.checkpoint.state_dict`: a state dict
from one engine can be set with the other. A plain module, DDP, `replicate`, FSDP1, FSDP2, tensor
parallelism and their mixtures, compiled modules and activation checkpoints all give the bare
model's names; tensors are sharded as the model is, or whole. Getting changes nothing, not even an
optimizer that was never stepped; setting accepts whole tensors and any other sharding.

Without a process group everything works on this process's tensors.

>>> def build(wrap=lambda layer: layer):
...     model = nn.Sequential(wrap(nn.Linear(2, 2, bias=False)))
...     return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
>>> model, optimizer = build()
>>> model_state, optimizer_state = get_state_dict(model, optimizer)
>>> list(model_state), list(optimizer_state["state"])
(['0.weight'], ['0.weight'])

A model with activation checkpoints has other names of its own, and accepts the same state:

>>> from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
>>> other, other_optimizer = build(checkpoint_wrapper)
>>> [name for name, _ in other.named_parameters()]
['0._checkpoint_wrapped_module.weight']
>>> set_state_dict(
...     other, other_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
<All keys matched successfully>
>>> torch.equal(model[0].weight, other[0].weight)
True

Everything that does not fit is in one error:

>>> set_model_state_dict(model, {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(2)})
Traceback (most recent call last):
    ...
pytest_dcp.errors.CheckpointMismatchError: ...0.bias...size mismatch for 0.weight...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pytest_dcp._engine.state_dicts.model import load_model, read_model
from pytest_dcp._engine.state_dicts.optimizer_loading import check_optimizers
from pytest_dcp._engine.state_dicts.optimizer_reading import read_optimizers
from pytest_dcp._engine.state_dicts.options import StateDictOptions
from pytest_dcp._engine.state_dicts.scope import PATCHED, Scope
from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._torch_internals.modules import _IncompatibleKeys
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp.tracebacks import drop_inner_frames

__all__ = [
    "FQNS_T",
    "PrimitiveType",
    "ValueType",
    "DictValueType",
    "ListDictValueType",
    "OptimizerStateType",
    "StateDictOptions",
    "get_model_state_dict",
    "get_optimizer_state_dict",
    "get_state_dict",
    "set_model_state_dict",
    "set_optimizer_state_dict",
    "set_state_dict",
]

FQNS_T: TypeAlias = set[str]
PrimitiveType: TypeAlias = DTensor | ShardedTensor | torch.Tensor | int | float | str
ValueType: TypeAlias = (
    PrimitiveType | list[PrimitiveType] | tuple[PrimitiveType] | dict[str, "ValueType"]
)
DictValueType: TypeAlias = dict[str, ValueType]
ListDictValueType: TypeAlias = list[DictValueType]
OptimizerStateType: TypeAlias = dict[str, DictValueType | ListDictValueType]


@drop_inner_frames
def get_model_state_dict(
    model: nn.Module,
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> dict[str, ValueType]:
    """The model's parameters, persistent buffers and extra state, by canonical names.

    submodules: return only the entries below these. Tensors share the model's memory unless they
    had to be gathered or moved. Collective with FSDP1 and with `full_state_dict`.
    """
    return read_model(Scope.of(model, options, submodules))


@drop_inner_frames
def get_optimizer_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> OptimizerStateType:
    """The states and groups of all the optimizers, by the model's canonical names.

    A parameter that was never stepped gets its initial states; the optimizers stay unchanged.
    Collective with FSDP1 and with `full_state_dict`.

    Raises CheckpointMismatchError if an optimizer has parameters that are not the model's.
    """
    return read_optimizers(Scope.of(model, options, submodules), _several(optimizers))


@drop_inner_frames
def get_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> tuple[dict[str, ValueType], OptimizerStateType]:
    """The state dicts of the model and of the optimizers: see the separate functions."""
    scope = Scope.of(model, options, submodules)
    return read_model(scope), read_optimizers(scope, _several(optimizers))


@drop_inner_frames
def set_model_state_dict(
    model: nn.Module,
    model_state_dict: dict[str, ValueType],
    *,
    options: StateDictOptions | None = None,
) -> _IncompatibleKeys:
    """Load the model's state dict; returns the missing and the unexpected keys.

    Tensors may be whole or sharded in any way; an empty state dict loads nothing, unless `strict`
    reports everything as missing. A model on the meta device gets new tensors of its own layout as
    parameters: make the optimizer after that. Collective with FSDP1, with `broadcast_from_rank0`,
    and if a DTensor has to change its layout.

    Raises a CheckpointMismatchError that names every key that does not fit.
    """
    scope = Scope.of(model, options)
    return load_model(scope, _by_name(scope, model_state_dict))


@drop_inner_frames
def set_optimizer_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    optim_state_dict: OptimizerStateType,
    *,
    options: StateDictOptions | None = None,
) -> None:
    """Load the state dict of all the optimizers, nested or flattened, or one optimizer's own.

    Groups are found by their parameters, in any order. An empty state dict loads nothing, unless
    `strict` reports everything as missing. If a tensor already has the optimizer's layout, the
    optimizer keeps it without a copy, as torch's own do. Collective as `set_model_state_dict`.

    Raises a CheckpointMismatchError that names every parameter, group, state and entry of a state
    that is missing, unexpected or of another size, before anything changes.
    """
    scope = Scope.of(model, options)
    if load := check_optimizers(scope, _several(optimizers), optim_state_dict):
        load.run()


@drop_inner_frames
def set_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    model_state_dict: dict[str, ValueType],
    optim_state_dict: OptimizerStateType,
    options: StateDictOptions | None = None,
) -> _IncompatibleKeys:
    """Load both state dicts; returns the missing and the unexpected keys of the model.

    An empty `model_state_dict` leaves the model alone; without optimizers only the model is loaded.
    The optimizers' half is checked before the model's is loaded.
    """
    scope = Scope.of(model, options)
    load = check_optimizers(scope, _several(optimizers), optim_state_dict)
    keys = load_model(scope, _by_name(scope, model_state_dict), optional=True)
    if load:
        load.run()
    return keys


def _patch_model_state_dict(model: nn.Module, *, options: StateDictOptions | None = None) -> None:
    """Replace `model.state_dict` and `model.load_state_dict` by this module's functions."""

    def state_dict() -> dict[str, ValueType]:
        return get_model_state_dict(model, options=options)

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        set_model_state_dict(model, state_dict, options=options)

    _patch(model, state_dict, load_state_dict)


def _patch_optimizer_state_dict(
    model: nn.Module,
    *,
    optimizers: tuple[Optimizer, ...],
    options: StateDictOptions | None = None,
) -> None:
    """Do the same for the optimizers: each one's methods get and set the state of all."""

    def state_dict() -> OptimizerStateType:
        return get_optimizer_state_dict(model, optimizers, options=options)

    def load_state_dict(state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(model, optimizers, state_dict, options=options)

    for optimizer in _several(optimizers):
        _patch(optimizer, state_dict, load_state_dict)


def _patch(of: Any, *methods: Callable[..., Any]) -> None:
    for method in methods:
        setattr(method, PATCHED, True)
        setattr(of, method.__name__, method)


def _several(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    return (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)


def _by_name(scope: Scope, state_dict: Mapping[Any, Any]) -> dict[str, Any]:
    """The state dict; the older form {submodule: state dict} is converted to the model's names."""
    if not any(isinstance(key, nn.Module) for key in state_dict):
        return cast(dict[str, Any], state_dict)
    return {
        prefix + name: value
        for module, inner in state_dict.items()
        for prefix in scope.names.prefixes([module])
        for name, value in inner.items()
    }


if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
