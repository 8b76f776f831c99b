"""Settings of a whole process that torch reads or sets in private only.

A rank puts them back after each test. Names that only some versions have are used where they exist,
so nothing here is required. Each can go when torch has a public way to read and to set it, or one
for all of its state.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.modules.module as modules
import torch.optim.optimizer as optimizers

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # Has the level of checks on collectives, see `DEBUG_LEVEL`.
    import torch._C._distributed_c10d as c10d

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]
"""A function that reads a value, and a function that sets it."""
DEBUG_LEVEL: Setting = (c10d.get_debug_level, c10d.set_debug_level)
"""How much torch checks and logs of collectives; in public, only a variable of the environment."""
GLOBAL_HOOKS = [
    hooks
    for owner in (modules, optimizers)
    for name, hooks in sorted(vars(owner).items())
    if name.startswith("_global_") and isinstance(hooks, dict)
]
"""Hooks of all modules and optimizers; torch can add and remove one, but not list them."""


def settings_in_c(*names: tuple[str, str]) -> list[Setting]:
    """Settings with a C function in torch, by the suffix of `_get_` and `_set_`.

    Their public forms are descriptors of modules, such as `torch.backends.cudnn.flags`, that differ
    from one version to the next.
    """
    inside = vars(torch._C)
    pairs = [(inside.get(f"_get_{get}"), inside.get(f"_set_{put}")) for get, put in names]
    return [(get, put) for get, put in pairs if get is not None and put is not None]


def read_matmul_precision() -> str:
    """As `torch.get_float32_matmul_precision`, which warns where two settings disagree."""
    precision: str = torch._C._get_float32_matmul_precision()
    return precision


def read_precisions(which: Sequence[tuple[str, str]]) -> list[str]:
    """The float32 precision of each (backend, operation); none before torch 2.9."""
    read = getattr(torch._C, "_get_fp32_precision_getter", None)
    return [] if read is None else [read(*pair) for pair in which]


def set_precision(backend: str, operation: str, precision: str) -> None:
    """Set a precision that `read_precisions` has read."""
    torch._C._set_fp32_precision_setter(backend, operation, precision)


def print_options() -> dict[str, Any]:
    """The very dict of torch's print options, to copy and to update."""
    return vars(torch._tensor_str.PRINT_OPTS)


def default_device_context() -> Any:
    """The mode that `torch.set_default_device` has entered; None where it has not."""
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def depths_of_mode_stacks() -> tuple[int, int]:
    """How many function modes and how many dispatch modes are active."""
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def clear_dynamo_caches() -> None:
    """Empty the caches of torch.compile's rules, which `init_process_group` does where it is
    imported.

    A process forked from here then has nothing to empty: to free an inherited cache copies its
    pages.
    """
    rules: Any = sys.modules.get("torch._dynamo.trace_rules")
    if (clear := getattr(rules, "clear_lru_cache", None)) is not None:
        clear()


def is_dynamo_configured() -> bool:
    """Whether torch.compile's configuration was imported; it takes seconds."""
    return "torch._dynamo.config" in sys.modules


def dynamo_overrides() -> Iterator[Setting]:
    """The entries set in torch.compile's configuration.

    Its public functions take 0.5 ms to read all of it.
    """
    entries: dict[str, Any] = getattr(sys.modules["torch._dynamo.config"], "_config", {})
    for entry in entries.values():
        override = entry.user_override
        if isinstance(override, ContextVar):  # torch 2.13 and later
            yield override.get, override.set
        else:
            yield partial(getattr, entry, "user_override"), partial(setattr, entry, "user_override")
