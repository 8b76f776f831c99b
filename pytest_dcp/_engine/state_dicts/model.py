"""A model's state dict under canonical names, and back into the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pytest_dcp._engine.plan.materialise import empty_for_meta
from pytest_dcp._engine.state_dicts import fsdp1
from pytest_dcp._engine.state_dicts.agreement import raise_on_all_ranks
from pytest_dcp._engine.state_dicts.broadcast import broadcast_values, from_rank0, join_mismatches
from pytest_dcp._engine.state_dicts.canonical_names import wrapped_as
from pytest_dcp._engine.state_dicts.delivery import deliver_state
from pytest_dcp._engine.state_dicts.mismatch import Mismatch
from pytest_dcp._engine.state_dicts.packing import Spec
from pytest_dcp._engine.state_dicts.parts import copy_into, lay_out, size_of
from pytest_dcp._engine.state_dicts.scope import Scope, own_method
from pytest_dcp._torch_internals.modules import _IncompatibleKeys, has_own_loading
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp.errors import CheckpointMismatchError

FLAT_PARAMETER = "_flat_param"
"""Name of FSDP1's own parameter, in a state dict that was not made through FSDP1's root."""


@torch.no_grad()
def read_model(scope: Scope) -> dict[str, Any]:
    """The model's state dict, as the options say. Collective if they ask for whole tensors.

    Raises ValueError if two submodules share a name.
    """
    with fsdp1.states(scope):
        raw = own_method(scope.model, "state_dict")()
    state: dict[str, Any] = {}
    for key, value in raw.items():
        name = scope.names.canonical(key)
        asked_for = scope.key_of(name)
        if asked_for is None:
            continue
        if asked_for in state:
            raise ValueError(
                f"{asked_for!r} is in more than one of the submodules {list(scope.prefixes)}: "
                "ask for one of them, or keep_submodule_prefixes"
            )
        state[asked_for] = value
    _require_no_flat_parameter(state)
    return deliver_state(state, scope.options)


def _require_no_flat_parameter(state: Mapping[str, Any]) -> None:
    if flat := [name for name in state if FLAT_PARAMETER in name]:
        raise CheckpointMismatchError(
            f"{flat} are FSDP's own flat parameters: give the root of the model, not a part of it",
            mismatched=tuple(flat),
        )


@dataclass(frozen=True, slots=True)
class _Target:
    """The model that is loaded to."""

    scope: Scope
    own: dict[str, Any]
    """Its state dict by canonical names; the values are the model's own tensors."""
    keys: dict[str, str]
    """For each canonical name the key in the model's own state dict."""
    wrapped: bool
    """Whether it contains FSDP1."""

    @classmethod
    def of(cls, scope: Scope) -> _Target:
        wrapped = bool(scope.in_fsdp1)
        # Use the parameters themselves: loading them back into themselves copies nothing.
        raw = own_method(scope.model, "state_dict")(keep_vars=not wrapped)
        keys = {scope.names.canonical(key): key for key in raw}
        return cls(scope, {name: raw[key] for name, key in keys.items()}, keys, wrapped)

    @property
    def kind(self) -> str:
        """The model's class, for messages."""
        return type(self.scope.model).__name__

    def key_of(self, name: str) -> str:
        """The model's key for a canonical name, also for keys that only the model's hooks
        produce.
        """
        if name in self.keys:
            return self.keys[name]
        same = (k.removesuffix(n) for n, k in self.keys.items() if k.endswith(n))
        return next(same, "") + name

    def mismatch_of(self, result: Any) -> Mismatch:
        """Missing and unexpected keys reported by the model's own `load_state_dict`."""
        canonical = self.scope.names.canonical
        missing = map(canonical, result.missing_keys)
        return Mismatch(
            tuple(name for name in missing if name not in self.scope.frozen),
            tuple(map(canonical, result.unexpected_keys)),
        )

    def compare(self, state_dict: Mapping[str, Any]) -> Mismatch:
        """The mismatches of a state dict, or of the specs of one."""
        misfits = {}
        for name, value in state_dict.items():
            if name in self.own and (why := misfit(name, self.own[name], value)):
                misfits[name] = why
        frozen = self.scope.frozen
        return Mismatch(
            tuple(name for name in self.own if name not in state_dict and name not in frozen),
            tuple(name for name in state_dict if name not in self.own),
            misfits,
        )


@torch.no_grad()
def load_model(
    scope: Scope, state_dict: Mapping[str, Any], *, optional: bool = False
) -> _IncompatibleKeys:
    """Load a state dict under canonical names; returns the missing and unexpected keys.

    optional: an empty state dict leaves the model alone; see also `Scope.takes_nothing`. Tensors
    may be whole or sharded in any way. Collective with FSDP1, with `broadcast_from_rank0` and where
    tensors change their layout. Raises CheckpointMismatchError naming every mismatch.
    """
    optional = optional or scope.takes_nothing()
    if not state_dict and optional and not scope.options.broadcast_from_rank0:
        return _IncompatibleKeys([], [])
    with fsdp1.states(scope):
        if not scope.options.broadcast_from_rank0:
            return _load_here(_Target.of(scope), state_dict)
        with raise_on_all_ranks("while the models' own tensors were named"):
            target = _Target.of(scope)
        return _load_from_rank0(target, state_dict, optional)


def _load_here(target: _Target, state_dict: Mapping[str, Any]) -> _IncompatibleKeys:
    strict = target.scope.options.strict
    mismatch = target.compare(state_dict)
    # Sizes that differ are always an error; missing names only if no hook may rename them.
    if mismatch.misfits or target.wrapped or not _knows_other_names(target.scope.model):
        mismatch.require_none(target.kind, strict=strict)
    # One meta tensor is enough: load_state_dict can assign all values or copy all.
    assign = any(_is_meta(value) for value in target.own.values())
    values: dict[str, Any] = {}
    for name, value in state_dict.items():
        own: Any = target.own.get(name)
        if not _is_tensor(value) or not _is_tensor(own) or is_lazy(own):
            values[name] = value
        elif assign:
            values[name] = _fill_or_make(own, value)
        else:
            values[name] = lay_out(value, own, keep=False)
    return _load_with_hooks(target, values, mismatch, assign=assign)


def _knows_other_names(model: nn.Module) -> bool:
    """Whether loading may rename keys, so that only the model can say which ones it misses."""
    return any(
        has_own_loading(module) or type(module).load_state_dict is not nn.Module.load_state_dict
        for module in model.modules()
        if wrapped_as(type(module)) is None
    )


def _load_from_rank0(
    target: _Target, state_dict: Mapping[str, Any], optional: bool
) -> _IncompatibleKeys:
    """Fill the model's own tensors from rank 0; holds at most one bucket at a time."""
    own = target.own
    specs = broadcast_values(lambda: state_dict)
    if optional and not specs:
        return _IncompatibleKeys([], [])
    with raise_on_all_ranks("while rank 0's state was compared with the models"):
        mismatch = target.compare(specs)
    mismatch = join_mismatches(mismatch)
    mismatch.require_none(target.kind, strict=target.scope.options.strict)
    assign = any(_is_meta(value) for value in own.values())
    values = {name: spec for name, spec in specs.items() if name in own}

    def take(name: str, full: torch.Tensor) -> None:
        if name in own:
            values[name] = _fill_or_make(own[name], full) if _is_tensor(own[name]) else full.clone()

    from_rank0(state_dict, specs, own.values(), take)
    return _load_with_hooks(target, values, mismatch, assign=assign)


def _fill_or_make(own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The model's own tensor, or a new one if that is on the meta device, with the value."""
    tensor = empty_for_meta(own) if _is_meta(own) else own
    copy_into(tensor, value)
    return tensor


def _load_with_hooks(
    target: _Target, values: Mapping[str, Any], mismatch: Mismatch, *, assign: bool
) -> _IncompatibleKeys:
    """Load the values with the model's own `load_state_dict` and its hooks.

    Raises CheckpointMismatchError for keys that neither the model nor its hooks accept.
    """
    scope = target.scope
    if target.wrapped:
        # FSDP1 requires every key of its modules and accepts no other.
        values = {**target.own, **{n: v for n, v in values.items() if n in target.own}}
    prepared = {target.key_of(name): value for name, value in values.items()}
    more = {"assign": True} if assign else {}
    result = own_method(scope.model, "load_state_dict")(prepared, strict=False, **more)
    if not target.wrapped and not scope.options.broadcast_from_rank0:
        mismatch = target.mismatch_of(result)
        mismatch.require_none(target.kind, strict=scope.options.strict)
    return _IncompatibleKeys(list(mismatch.missing), list(mismatch.unexpected))


def misfit(name: str, own: Any, value: Any) -> str | None:
    """Why a value cannot replace the model's own tensor, or None."""
    if not _is_tensor(own) or is_lazy(own):
        return None
    here, there = size_of(own), value.shape if isinstance(value, Spec) else None
    if _is_tensor(value):
        there = size_of(value)
    if there is None:
        return f"{name!r}: expected a tensor of size {tuple(here)}, got {type(value).__name__}"
    if here != there:
        # The wording of torch's `load_state_dict`, which programs look for.
        return (
            f"size mismatch for {name}: copying a param with shape {there} from checkpoint, the "
            f"shape in current model is {here}."
        )
    return None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_meta(value: Any) -> bool:
    return _is_tensor(value) and not isinstance(value, ShardedTensor) and bool(value.is_meta)
