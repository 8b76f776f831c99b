"""A deep copy of any Python value whose tensors are staged, tied as they were.

`copy.deepcopy` copies every tensor where it is. Here a tensor becomes one on the CPU, and tensors
of one storage become tensors of one copied storage: tied weights stay tied, and are copied once.
Two passes, since the memory for all storages is to be had at once:

1. `copy` walks the value. For each tensor it makes an empty one, and notes both.
2. `settle` gives every empty tensor its part of the copied storage.

Everything else is copied as `copy.deepcopy` does it: one object in two places stays one, cycles are
kept, functions, classes and modules are not copied, and an object's `__deepcopy__` is called.
Instances of other classes are copied by their `__reduce_ex__`, so that tensors in their attributes
are staged, too.
"""

from __future__ import annotations

import copyreg
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.opaque import map_inner_tensors
from pytest_dcp._engine.staging.stager import dtensor, move_shard
from pytest_dcp._torch_internals.dtensors import local_tensor, spec_of
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor, make_detached_sharded_tensor
from pytest_dcp._torch_internals.tensors import identity_of_storage, is_traceable_wrapper_subclass

Memo = dict[int, Any]

ATOMIC: frozenset[type] = frozenset(
    {
        *(type(None), type(Ellipsis), type(NotImplemented)),
        *(int, float, bool, complex, bytes, str, type, range, property),
        *(types.CodeType, types.BuiltinFunctionType, types.FunctionType, types.ModuleType),
        weakref.ref,
    }
)
"""Classes whose instances `copy.deepcopy` returns unchanged. Modules fail there; here they are
their own copies, too."""


@dataclass(frozen=True, slots=True)
class StagedTensor:
    """A tensor to copy, and its copy, which has no memory yet."""

    source: torch.Tensor
    copied: torch.Tensor

    @property
    def storage(self) -> torch.UntypedStorage:
        """The storage to copy."""
        return self.source.untyped_storage()


class DeepCopy:
    """One deep copy."""

    def __init__(self, memo: Memo | None = None, device: torch.device | str = "cpu") -> None:
        """memo: copies of objects by their id, as `copy.deepcopy` has it.

        device: where the copied storages will be.
        """
        self.memo: Memo = {} if memo is None else memo
        self._device = device
        self._noted: list[StagedTensor] = []
        self._originals: list[Any] = []
        """Originals, kept alive so that their ids stay theirs."""

    def storages(self) -> Iterator[torch.UntypedStorage]:
        """The storages to copy, each once."""
        seen = set()
        for noted in self._noted:
            storage = noted.storage
            if identity_of_storage(storage) not in seen:
                seen.add(identity_of_storage(storage))
                yield storage

    def settle(self, copies: Callable[[torch.UntypedStorage], torch.UntypedStorage]) -> None:
        """Give each staged tensor its part of its storage's copy."""
        for noted in self._noted:
            source = noted.source
            noted.copied.set_(
                copies(noted.storage), source.storage_offset(), source.size(), source.stride()
            )
        self._noted = []

    def copy(self, value: Any) -> Any:
        """The copy of a value; its tensors have no memory before `settle`."""
        kind = type(value)
        if kind in ATOMIC or issubclass(kind, type):
            return value
        if (earlier_copy := self.memo.get(id(value), self)) is not self:
            return earlier_copy
        copied = self._copy_new(value, kind)
        if copied is not value:
            self.memo[id(value)] = copied
            self._originals.append(value)
        return copied

    def _copy_new(self, value: Any, kind: type) -> Any:
        if isinstance(value, torch.Tensor):
            return self._stage_tensor(value)
        if kind is dict:
            dict_copy: dict[Any, Any] = {}
            self.memo[id(value)] = dict_copy
            for key, inner in value.items():
                dict_copy[self.copy(key)] = self.copy(inner)
            return dict_copy
        if kind is list:
            items: list[Any] = []
            self.memo[id(value)] = items
            items.extend(map(self.copy, value))
            return items
        if kind is tuple:
            return self._copy_tuple(value)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if (own := getattr(value, "__deepcopy__", None)) is not None:
            return own(self.memo)
        return self._copy_by_reduction(value, kind)

    def _copy_tuple(self, value: tuple[Any, ...]) -> Any:
        parts = [self.copy(inner) for inner in value]
        if id(value) in self.memo:  # One of its parts holds the tuple itself.
            return self.memo[id(value)]
        changed = any(new is not old for new, old in zip(parts, value, strict=True))
        return tuple(parts) if changed else value

    def _copy_by_reduction(self, value: Any, kind: type) -> Any:
        reduce = copyreg.dispatch_table.get(kind)
        reduced = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        if isinstance(reduced, str):  # A name: the value is a singleton.
            return value
        make, arguments, *rest = reduced
        state, items, pairs, *setter = (*rest, None, None, None)[: max(3, len(rest))]
        copied = make(*map(self.copy, arguments))
        self.memo[id(value)] = copied
        if state is not None:
            self._set_state(copied, self.copy(state), setter[0] if setter else None)
        for item in items or ():
            copied.append(self.copy(item))
        for key, inner in pairs or ():
            copied[self.copy(key)] = self.copy(inner)
        return copied

    def _set_state(self, copied: Any, state: Any, setter: Callable[[Any, Any], Any] | None) -> None:
        if setter is not None:
            setter(copied, state)
        elif hasattr(copied, "__setstate__"):
            copied.__setstate__(state)
        else:
            plain, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            if plain:
                copied.__dict__.update(plain)
            for name, inner in (slots or {}).items():
                setattr(copied, name, inner)

    def _stage_tensor(self, tensor: Any) -> torch.Tensor:
        """A tensor on the device, which has no memory yet where it can share some with others."""
        if isinstance(tensor, DTensor):
            return dtensor(self.copy(local_tensor(tensor)), spec_of(tensor))
        if isinstance(tensor, ShardedTensor):
            shards = [move_shard(shard, self.copy(shard.tensor)) for shard in tensor.local_shards()]
            sharded: torch.Tensor = make_detached_sharded_tensor(
                shards, tensor.metadata(), tensor.sharding_spec()
            )
            return sharded
        if is_traceable_wrapper_subclass(tensor):
            return map_inner_tensors(tensor, self.copy)
        copied = self._stage_plain(tensor.detach())
        self.memo[id(tensor)] = copied
        self._copy_attributes(tensor, copied)
        return copied

    def _stage_plain(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            return tensor.to(self._device, copy=True)
        if tensor.is_meta:
            return tensor
        if tensor.is_conj() or tensor.is_neg():  # Lazy bits, which the bytes do not show.
            tensor = tensor.resolve_conj().resolve_neg()
        copied = torch.empty(0, dtype=tensor.dtype, device=self._device)
        self._noted.append(StagedTensor(tensor, copied))
        return copied

    def _copy_attributes(self, tensor: torch.Tensor, copied: torch.Tensor) -> None:
        """Attributes that the user has set on a tensor."""
        for name, value in vars(tensor).items():
            setattr(copied, name, self.copy(value))
