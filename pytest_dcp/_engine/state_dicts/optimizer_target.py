"""One optimizer to load into: the names of its parameters, and the layout of its states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pytest_dcp._engine.state_dicts import fsdp1
from pytest_dcp._engine.state_dicts.optimizer_flattening import GROUPS, STATE
from pytest_dcp._engine.state_dicts.optimizer_groups import PARAMS, Group
from pytest_dcp._engine.state_dicts.optimizer_initial_states import initial_states
from pytest_dcp._engine.state_dicts.optimizer_reading import group_names
from pytest_dcp._engine.state_dicts.packing import Spec
from pytest_dcp._engine.state_dicts.parts import copy_into, lay_out, size_of
from pytest_dcp._engine.state_dicts.scope import Scope, own_method
from pytest_dcp.errors import CheckpointError, CheckpointMismatchError

States = Mapping[str, Any]
"""For each parameter a dict of its states; under other keys, the optimizer's global state."""


@dataclass(frozen=True, slots=True)
class Target:
    """An optimizer, with the model's names for its parameters."""

    scope: Scope
    optimizer: Optimizer
    groups: list[list[str]]
    """Names of the parameters in each group, in the optimizer's order."""
    layouts: Mapping[str, torch.Tensor]
    """For each parameter a tensor with its size and layout."""
    parameters: dict[str, torch.Tensor]
    """The optimizer's states by name; {} under FSDP1, which has other names."""
    fsdp_names: dict[str, str]
    """FSDP1's own names of the parameters; {} without FSDP1."""
    _initial: dict[str, dict[str, Any]] = field(default_factory=dict)
    _position_of_group: dict[str, int] = field(default_factory=dict)
    """Of each parameter's group, once computed."""
    _names_with_state: list[frozenset[str]] = field(default_factory=list)
    """Under FSDP1, once computed: the names for which the optimizer has a state."""

    @classmethod
    def of(cls, scope: Scope, optimizer: Optimizer) -> Target:
        """The target for an optimizer whose model is not in FSDP1.

        Raises CheckpointMismatchError for parameters that are not the model's or on the meta
        device, which would swallow their states.
        """
        groups = group_names(scope, optimizer)
        group_parameters = list(
            chain.from_iterable(group[PARAMS] for group in optimizer.param_groups)
        )
        parameters = dict(zip(chain.from_iterable(groups), group_parameters, strict=True))
        if meta := [name for name, parameter in parameters.items() if parameter.is_meta]:
            raise CheckpointMismatchError(
                f"parameters of {type(optimizer).__name__} are on the meta device: {meta[:20]}: "
                "load the model first and make the optimizer after that",
                mismatched=tuple(meta),
            )
        return cls(scope, optimizer, groups, parameters, parameters, {})

    @classmethod
    def of_fsdp1(
        cls, scope: Scope, optimizer: Optimizer, layouts: Mapping[str, torch.Tensor]
    ) -> Target:
        """The same within FSDP1. Collective."""
        settings = own_method(optimizer, "state_dict")()[GROUPS]
        named_state = fsdp1.name_own_state(scope.model, optimizer, {STATE: {}, GROUPS: settings})
        canonical = scope.names.canonical
        groups = [[canonical(name) for name in group[PARAMS]] for group in named_state[GROUPS]]
        theirs = {canonical(name): name for group in named_state[GROUPS] for name in group[PARAMS]}
        return cls(scope, optimizer, groups, layouts, {}, theirs)

    def names(self) -> set[str]:
        """Every parameter."""
        return set(chain.from_iterable(self.groups))

    def misfit(self, name: str, entry: str, value: Any) -> str | None:
        """Why a state, or the spec of one, cannot be the parameter's, or None."""
        size = value.shape if isinstance(value, Spec) else _size(value)
        if size is None or size == size_of(self.layouts[name]) or size.numel() == 1:
            return None
        expected = self.layouts[name] if self.fsdp_names else self._find_expected(name, entry)
        here = _size(expected)
        if here is None or here == size:
            return None
        return f"state {entry!r} of {name!r}: expected size {tuple(here)}, got {tuple(size)}"

    def lay_out(self, name: str, entry: str, value: Any) -> Any:
        """A state in the optimizer's own layout; values other than tensors are unchanged."""
        if not isinstance(value, torch.Tensor):
            return value
        like = self._layout(name, entry, size_of(value))
        return value if like is None else lay_out(value, like, keep=True)

    def fill(self, name: str, entry: str, full: torch.Tensor) -> Any:
        """The same for a whole tensor that will be overwritten; fills an existing state."""
        current: Any = self.current(name).get(entry)
        if _size(current) == full.shape and current.dtype == full.dtype:
            copy_into(current, full)
            return current
        like = self._layout(name, entry, full.shape)
        if like is None:
            # The optimizer moves it to the parameter's device, unless it keeps it on the CPU.
            return full.to("cpu", copy=True)
        part = lay_out(full, like, keep=True)
        return part.clone() if part is full else part

    def load(
        self,
        states: States,
        partners: Sequence[Group | None],
        lacking: Mapping[Any, Sequence[str]],
    ) -> None:
        """Load the states of its own parameters and the settings of its groups' partners.

        A parameter that is not in `states` keeps its own; {} removes them.
        lacking: the entries of each state that `states` lacks: these do not change.
        """
        groups = [
            {**settings_of(group), **settings_of(partner or {}), PARAMS: names}
            for group, partner, names in zip(
                self.optimizer.param_groups, partners, self.groups, strict=True
            )
        ]
        for group, own in zip(groups, self.optimizer.param_groups, strict=True):
            # Torch's own labels of the parameters: keep this optimizer's, not the saved ones.
            group.update({k: v for k, v in own.items() if k == "param_names"})
        mine = self.names()
        own_states = {key: value for key, value in states.items() if key in mine or self.keeps(key)}
        state = {STATE: own_states, GROUPS: groups}
        pack = self._pack_by_fsdp1 if self.fsdp_names else self._pack
        packed = pack(state, lacking)
        own_method(self.optimizer, "load_state_dict")(packed)

    def keeps(self, key: Any) -> bool:
        """Whether the optimizer has a state under this key, which is not a parameter's name."""
        return key in self.optimizer.state

    def common_keys(self) -> list[Any]:
        """The keys of the states that it keeps for all its parameters."""
        return [key for key in self.optimizer.state if not isinstance(key, torch.Tensor)]

    def _pack(self, state: dict[str, Any], lacking: Mapping[Any, Sequence[str]]) -> dict[str, Any]:
        ids = {name: at for at, name in enumerate(chain.from_iterable(self.groups))}
        states = {ids.get(key, key): value for key, value in state[STATE].items() if value != {}}
        for name in ids.keys() - state[STATE].keys():
            if current := self.current(name):
                states[ids[name]] = current
        for name in lacking.keys() & ids.keys() & state[STATE].keys():
            own = {entry: self._find_expected(name, entry) for entry in lacking[name]}
            current_entries = {entry: value for entry, value in own.items() if value is not None}
            states[ids[name]] = {**current_entries, **states[ids[name]]}
        states |= {key: self.optimizer.state[key] for key in self.common_keys() if key in lacking}
        groups = [
            {**g, PARAMS: _ParameterIds(ids[name] for name in g[PARAMS])} for g in state[GROUPS]
        ]
        return {STATE: states, GROUPS: groups}

    def _pack_by_fsdp1(
        self, state: dict[str, Any], lacking: Mapping[Any, Sequence[str]]
    ) -> dict[str, Any]:
        theirs = self.fsdp_names
        states = {theirs.get(key, key): of for key, of in state[STATE].items() if of != {}}
        if lacking or self.names() - state[STATE].keys():
            current = self._read_by_fsdp1()
            replaced = {theirs[name] for name in state[STATE].keys() & theirs.keys()}
            states |= {name: of for name, of in current.items() if name not in replaced}
            for name in lacking.keys() & state[STATE].keys():
                states[theirs[name]] = {**current.get(theirs[name], {}), **state[STATE][name]}
        groups = [{**g, PARAMS: [theirs[name] for name in g[PARAMS]]} for g in state[GROUPS]]
        return fsdp1.pack_own_state(
            self.scope.model, self.optimizer, {STATE: states, GROUPS: groups}
        )

    def current(self, name: str) -> Mapping[str, Any]:
        """The optimizer's states of a parameter; {} under FSDP1, which has other parameters."""
        parameter = self.parameters.get(name)
        return {} if parameter is None else self.optimizer.state.get(parameter, {})

    def holds(self, name: str) -> bool:
        """Whether the optimizer has a state of a parameter. Collective under FSDP1."""
        if not self.fsdp_names:
            return any(value is not None for value in self.current(name).values())
        if not self._names_with_state:
            states = self._read_by_fsdp1().items()
            canonical = self.scope.names.canonical
            self._names_with_state.append(frozenset(canonical(key) for key, of in states if of))
        return name in self._names_with_state[0]

    def _read_by_fsdp1(self) -> dict[str, Any]:
        """The optimizer's states of each parameter, by FSDP1's names. Collective."""
        own = own_method(self.optimizer, "state_dict")()
        states: dict[str, Any] = fsdp1.name_own_state(self.scope.model, self.optimizer, own)[STATE]
        return states

    def _layout(self, name: str, entry: str, size: torch.Size) -> torch.Tensor | None:
        """A tensor with the layout for the state; None to leave the state unchanged."""
        parameter = self.layouts[name]
        if size == size_of(parameter):
            return parameter
        if size.numel() == 1 or not isinstance(parameter, DTensor) or self.fsdp_names:
            return None
        expected = self._find_expected(name, entry)
        return expected if isinstance(expected, torch.Tensor) else None

    def _find_expected(self, name: str, entry: str) -> Any:
        """The state that the optimizer has or would begin with, or None."""
        current = self.current(name)
        if entry in current:
            return current[entry]
        if name not in self._initial:
            group = self.optimizer.param_groups[self._find_group(name)]
            parameter = self.parameters[name]
            try:
                (self._initial[name],) = initial_states(self.optimizer, group, [parameter])
            except CheckpointError:  # Unknown: accept the state unchanged.
                self._initial[name] = {}
        return self._initial[name].get(entry)

    def _find_group(self, name: str) -> int:
        """The position of the parameter's group."""
        if not self._position_of_group:
            for at, names in enumerate(self.groups):
                self._position_of_group.update(dict.fromkeys(names, at))
        return self._position_of_group[name]


class _ParameterIds(list[int]):
    """A group's parameters as `Optimizer.load_state_dict` takes them.

    For each tensor of the state it looks up the group that has the parameter (torch 2.13,
    `_process_value_according_to_param_policy`): in a plain list the time of a load would grow with
    the square of the number of parameters.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        super().__init__(ids)
        self._ids = frozenset(self)

    def __contains__(self, value: object) -> bool:
        return value in self._ids

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is a plain list, which its owner may change."""
        return list, (list(self),)


def _size(value: Any) -> torch.Size | None:
    return size_of(value) if isinstance(value, torch.Tensor) else None


def settings_of(group: Group) -> dict[str, Any]:
    """A group's settings, without its parameters."""
    return {key: value for key, value in group.items() if key != PARAMS}
