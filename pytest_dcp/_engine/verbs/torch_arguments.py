"""Arguments as torch's verbs take them: Stateful objects, positional storages, older hooks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, wraps
from types import FunctionType, MethodType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.stateful import Stateful

from pytest_dcp._engine.verbs.call_events import CallEvents
from pytest_dcp.tracebacks import BOUNDARY, warn_caller

P = ParamSpec("P")
R = TypeVar("R")


def check_planner(planner: SavePlanner | LoadPlanner, kind: str) -> None:
    """Raise TypeError unless it is a planner; `kind` is the name of torch's class."""
    if not hasattr(planner, "create_local_plan"):
        raise TypeError(f"planner must be a {kind}, got {type(planner).__name__}")


def is_stateful(value: Any) -> bool:
    """Whether a save asks the value for its state, and a load gives it back.

    The protocol's own check looks at every attribute of every class above the value's; tensors,
    of which there are thousands, are never Stateful.
    """
    return not isinstance(value, torch.Tensor) and isinstance(value, Stateful)


def check_state_dict(state_dict: object) -> None:
    """Raise TypeError unless it is a mapping or has `items`, as a ModuleDict does."""
    if not isinstance(state_dict, Mapping) and not hasattr(state_dict, "items"):
        kind = type(state_dict).__name__
        raise TypeError(f"state_dict must be a mapping of names to values, got {kind}")


def resolve_stateful(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict with the state of each Stateful object in its place."""
    return {
        # Tensors first, inline: a call for each would be one of every fifteen of a small save.
        key: value
        if isinstance(value, torch.Tensor) or not is_stateful(value)
        else value.state_dict()
        for key, value in state_dict.items()
    }


def accepts_parameter(function: Callable[..., Any], *names: str) -> bool:
    """Whether a hook has one of these parameters, or takes any keyword by **kwargs."""
    return any(p.name in names or p.kind is p.VAR_KEYWORD for p in _parameters(function))


def _parameters(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    if isinstance(function, MethodType) and isinstance(function.__func__, FunctionType):
        return _parameters_of_method(function.__func__)
    return tuple(inspect.signature(function).parameters.values())


@lru_cache(maxsize=64)
def _parameters_of_method(function: FunctionType) -> tuple[inspect.Parameter, ...]:
    """Without the first. Each save and load inspects the same few hooks, at 70 us each."""
    return tuple(inspect.signature(function).parameters.values())[1:]


def allow_positional_storage(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let the storage be the second positional argument, as it was before torch 2.2.

    The call is logged (`call_events`), and errors are raised as by `drop_inner_frames`: one wrapper
    for all three leaves two frames less.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            if len(args) == 2:
                warn_caller(
                    f"The argument order of {function.__name__} has been changed. "
                    "Please check the document to avoid future breakages.",
                )
                if name in kwargs:
                    raise TypeError(f"{function.__name__}() got {name} twice")
                kwargs[name] = args[1]
                args = args[:1]  # type: ignore[assignment]  # one fewer, by intent
            with BOUNDARY, CallEvents(function.__name__, kwargs, log_exceptions=True):
                return function(*args, **kwargs)

        return called

    return decorate


def resolve_no_dist(no_dist: bool, verb: str) -> bool:
    """Whether this rank is alone; warns if it is."""
    no_dist = no_dist or not dist.is_available() or not dist.is_initialized()
    if no_dist:
        warn_caller(
            "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is "
            f"to {verb} in a single process.",
        )
    return no_dist


@contextmanager
def without_single_process_warning() -> Iterator[None]:
    """Suppress the warning of `resolve_no_dist`: the caller has chosen a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
