"""The scope of one call: a model, the names in it, the options, and the requested names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from pytest_dcp._engine.state_dicts.canonical_names import Names
from pytest_dcp._engine.state_dicts.options import StateDictOptions

PATCHED = "_pytest_dcp_patched"
"""Attribute that marks a method with which this package replaced an object's own."""


@dataclass(frozen=True, slots=True)
class Scope:
    """One call's model and options."""

    model: nn.Module
    names: Names
    options: StateDictOptions
    prefixes: tuple[str, ...]
    """The call asks for names that begin with one of these; () asks for all."""
    parameters: dict[str, nn.Parameter]
    """The parameters, by every canonical name."""
    frozen: frozenset[str]
    """The names that `ignore_frozen_params` leaves out."""
    in_fsdp1: tuple[FullyShardedDataParallel, ...]
    """The parts of the model that are in FSDP1, the outermost first."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        options: StateDictOptions | None,
        submodules: Iterable[nn.Module] | None = None,
    ) -> Scope:
        """The scope of a call. Raises ValueError for options that contradict each other."""
        options = StateDictOptions() if options is None else options
        if options.broadcast_from_rank0 and not options.full_state_dict:
            raise ValueError(
                "full_state_dict must be True when broadcast_from_rank0 is True: rank 0 sends "
                "whole tensors"
            )
        # One walk: each module passes through a generator of every module above it.
        modules = tuple(model.modules())
        _reshard(modules)
        names = Names(model, options.dsd_fqn_modifiers)
        parameters = dict(names.parameters())
        skip = options.ignore_frozen_params
        frozen = [name for name, p in parameters.items() if skip and not p.requires_grad]
        prefixes = names.prefixes(submodules) if submodules else ()
        in_fsdp1 = tuple(m for m in modules if isinstance(m, FullyShardedDataParallel))
        return cls(model, names, options, prefixes, parameters, frozenset(frozen), in_fsdp1)

    def takes_nothing(self) -> bool:
        """Whether an empty state dict leaves the model or the optimizers alone, as in torch.

        Otherwise everything counts as missing. Ranks other than 0 get an empty state dict with
        `cpu_offload` and `full_state_dict`.
        """
        options = self.options
        return not options.strict or (options.cpu_offload and options.full_state_dict)

    def first_names(self) -> dict[int, str]:
        """The first canonical name of each parameter, by its id: the key of its optimizer states.

        By id, because hashing a tensor calls a function in Python.
        """
        names: dict[int, str] = {}
        for name, parameter in self.parameters.items():
            names.setdefault(id(parameter), name)
        return names

    def asks_for_all(self) -> bool:
        """Whether the call asks for every name, so that `key_of` changes none."""
        return not self.prefixes and not self.frozen

    def key_of(self, name: str) -> str | None:
        """The key under which a canonical name is returned; None if it is not requested."""
        if name in self.frozen:
            return None
        if not self.prefixes:
            return name
        prefix = next((p for p in self.prefixes if name.startswith(p)), None)
        if prefix is None or self.options.keep_submodule_prefixes:
            return None if prefix is None else name
        return name[len(prefix) :]


def own_method(of: Any, name: str) -> Callable[..., Any]:
    """A method of a model or an optimizer: the class's, if this package patched the object's."""
    bound: Callable[..., Any] = getattr(of, name)
    if getattr(bound, PATCHED, False):
        bound = getattr(type(of), name).__get__(of)
    return bound


def _reshard(modules: Iterable[nn.Module]) -> None:
    """Restore the sharded parameters of FSDP2's modules, to which optimizers and names refer.

    After a forward without a backward the modules still hold the whole parameters.
    """
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()
