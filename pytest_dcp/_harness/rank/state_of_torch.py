"""The parts of a process's state that belong to torch and numpy.

Settings that only some versions have are looked at where they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
import torch._C._distributed_c10d as c10d
import torch.nn.modules.module as modules
import torch.optim.optimizer as optimizers

from pytest_dcp._harness.rank.process_state import Facet

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]
"""A function that reads a value, and a function that sets it."""

MISSING = "missing"
PLAIN_SETTINGS = (
    "deterministic_fill_uninitialized_memory", "cudnn_enabled", "cudnn_benchmark",
    "cudnn_deterministic", "mkldnn_enabled", "mkldnn_deterministic", "nnpack_enabled",
    "math_sdp_allow_fp16_bf16_reduction", "cublas_allow_fp16_accumulation", "warnAlways",
)  # fmt: skip
ATTENTION = ("flash", "math", "mem_efficient", "cudnn")
PRECISIONS = (
    ("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"),
    ("mkldnn", "all"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"),
)  # fmt: skip
"""Backend and operation of torch's float32 precisions; the ones that others inherit come first."""
HOOKS = [
    hooks
    for owner in (modules, optimizers)
    for name, hooks in sorted(vars(owner).items())
    if name.startswith("_global_") and isinstance(hooks, dict)
]
"""Hooks of all modules and optimizers."""


def _c_settings(*names: tuple[str, str]) -> list[Setting]:
    """Settings with a C function in torch, by the suffix of `_get_` and `_set_`."""
    inside = vars(torch._C)
    pairs = [(inside.get(f"_get_{get}"), inside.get(f"_set_{put}")) for get, put in names]
    return [(get, put) for get, put in pairs if get is not None and put is not None]


def _autocast_settings(device: str) -> list[Setting]:
    return [
        (partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device)),
        (partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device)),
    ]


def _future_settings(*names: str) -> list[Setting]:
    """Settings of `torch.__future__`, by the suffix of `get_` and `set_`."""
    inside = vars(torch.__future__)
    return [(inside[f"get_{name}"], inside[f"set_{name}"]) for name in names]


def _set_default_device(context: Any) -> None:
    torch.set_default_device(None if context is None else context.device)


SETTINGS: list[Setting] = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    # Subnormal numbers, tested with Python's own arithmetic: torch has no function to query it.
    (lambda: sys.float_info.min / 2 == 0.0, torch.set_flush_denormal),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    *_autocast_settings("cpu"),
    *_autocast_settings("cuda"),
    *_c_settings(
        *((name, name) for name in PLAIN_SETTINGS),
        *((f"{kind}_sdp_enabled", f"sdp_use_{kind}") for kind in ATTENTION),
    ),
    (c10d.get_debug_level, c10d.set_debug_level),
    (torch.multiprocessing.get_sharing_strategy, torch.multiprocessing.set_sharing_strategy),
    *_future_settings("overwrite_module_params_on_conversion", "swap_module_params_on_conversion"),
]


def _read_settings() -> list[Any]:
    try:
        return [get() for get, _ in SETTINGS]
    except RuntimeError:
        return [_quietly(get) for get, _ in SETTINGS]


def _quietly(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError:  # some combinations of settings cannot be read
        return MISSING


def _put_back_settings(then: Sequence[Any]) -> None:
    for (get, put), value in zip(SETTINGS, then, strict=True):
        if value is not MISSING and _quietly(get) != value:
            put(value)


def _read_precisions() -> list[Any]:
    matmul = _quietly(torch._C._get_float32_matmul_precision)
    read = getattr(torch._C, "_get_fp32_precision_getter", None)  # torch 2.9 and later
    return [matmul, *([] if read is None else [read(*which) for which in PRECISIONS])]


def _put_back_precisions(then: Sequence[Any]) -> None:
    matmul, *precisions = then
    if matmul is not MISSING:
        with suppress(RuntimeError):
            torch.set_float32_matmul_precision(matmul)
    for which, value in zip(PRECISIONS, precisions, strict=False):
        torch._C._set_fp32_precision_setter(*which, value)


def _put_back_safe_globals(then: set[Any]) -> None:
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*then])


def _put_back_hooks(then: Sequence[dict[int, Any]]) -> None:
    for hooks, value in zip(HOOKS, then, strict=True):
        hooks.clear()
        hooks.update(value)


def _read_printing() -> tuple[Any, ...]:
    numpy: Any = sys.modules.get("numpy")
    own = dict(vars(torch._tensor_str.PRINT_OPTS))
    return own, None if numpy is None else numpy.get_printoptions()


def _put_back_printing(then: tuple[Any, ...]) -> None:
    own, numpys = then
    vars(torch._tensor_str.PRINT_OPTS).update(own)
    if numpys is not None:
        import numpy

        numpy.set_printoptions(**numpys)


@cache
def _dynamo_overrides() -> list[Setting]:
    """The entries set in torch.compile's configuration.

    Private: its public functions take 0.5 ms to read it.
    """
    entries: dict[str, Any] = getattr(sys.modules["torch._dynamo.config"], "_config", {})
    settings: list[Setting] = []
    for entry in entries.values():
        override = entry.user_override
        if isinstance(override, ContextVar):  # torch 2.13 and later
            settings.append((override.get, override.set))
        else:
            put = partial(setattr, entry, "user_override")
            settings.append((partial(getattr, entry, "user_override"), put))
    return settings


def _read_dynamo() -> list[Any]:
    if "torch._dynamo.config" not in sys.modules:
        return []
    return [get() for get, _ in _dynamo_overrides()]


def _put_back_dynamo(then: list[Any]) -> None:
    for (get, put), value in zip(_dynamo_overrides(), then, strict=False):
        if get() is not value:
            put(value)


def _read_numpy_errors() -> tuple[Any, ...]:
    numpy: Any = sys.modules.get("numpy")
    return () if numpy is None else (numpy.geterr(), numpy.geterrcall())


def _put_back_numpy_errors(then: tuple[Any, ...]) -> None:
    import numpy

    errors, call = then
    numpy.seterr(**errors)
    numpy.seterrcall(call)


FACETS = (
    # A device is a mode on the stack that is looked at below.
    Facet(
        "torch's default device",
        lambda: getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
        _set_default_device,
    ),
    Facet("torch's settings", _read_settings, _put_back_settings),
    Facet("torch's float32 precision", _read_precisions, _put_back_precisions),
    Facet("torch's inference mode", torch.is_inference_mode_enabled),
    Facet(
        "torch's function and dispatch modes",
        lambda: (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
    ),
    Facet("torch's number of interop threads", torch.get_num_interop_threads),
    Facet(
        "torch's safe globals",
        lambda: {*torch.serialization.get_safe_globals()},
        _put_back_safe_globals,
    ),
    Facet(
        "hooks of all modules and optimizers",
        lambda: [dict(hooks) for hooks in HOOKS],
        _put_back_hooks,
    ),
    Facet("torch.compile's configuration", _read_dynamo, _put_back_dynamo),
    Facet("print options", _read_printing, _put_back_printing),
    Facet("numpy's handling of errors", _read_numpy_errors, _put_back_numpy_errors),
)
