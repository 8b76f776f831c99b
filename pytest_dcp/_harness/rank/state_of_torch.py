"""The process's state in torch and numpy.

Settings that only some versions have are looked at where they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch

from pytest_dcp._harness.rank.process_state import Facet
from pytest_dcp._torch_internals import global_state as internals

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


def _autocast_settings(device: str) -> list[internals.Setting]:
    return [
        (partial(torch.is_autocast_enabled, device), partial(torch.set_autocast_enabled, device)),
        (partial(torch.get_autocast_dtype, device), partial(torch.set_autocast_dtype, device)),
    ]


def _future_settings(*names: str) -> list[internals.Setting]:
    """Settings of `torch.__future__`, by the suffix of `get_` and `set_`."""
    inside = vars(torch.__future__)
    return [(inside[f"get_{name}"], inside[f"set_{name}"]) for name in names]


def _set_default_device(context: Any) -> None:
    torch.set_default_device(None if context is None else context.device)


SETTINGS: list[internals.Setting] = [
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
    *internals.settings_in_c(
        *((name, name) for name in PLAIN_SETTINGS),
        *((f"{kind}_sdp_enabled", f"sdp_use_{kind}") for kind in ATTENTION),
    ),
    internals.DEBUG_LEVEL,
    (torch.multiprocessing.get_sharing_strategy, torch.multiprocessing.set_sharing_strategy),
    *_future_settings("overwrite_module_params_on_conversion", "swap_module_params_on_conversion"),
]


def _read_settings() -> list[Any]:
    try:
        return [get() for get, _ in SETTINGS]
    except RuntimeError:
        return [_read_or_missing(get) for get, _ in SETTINGS]


def _read_or_missing(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError:  # some combinations of settings cannot be read
        return MISSING


def _put_back_settings(then: Sequence[Any]) -> None:
    for (get, put), value in zip(SETTINGS, then, strict=True):
        if value is not MISSING and _read_or_missing(get) != value:
            put(value)


def _read_precisions() -> list[Any]:
    return [
        _read_or_missing(internals.read_matmul_precision),
        *internals.read_precisions(PRECISIONS),
    ]


def _put_back_precisions(then: Sequence[Any]) -> None:
    matmul, *precisions = then
    if matmul is not MISSING:
        with suppress(RuntimeError):
            torch.set_float32_matmul_precision(matmul)
    for which, value in zip(PRECISIONS, precisions, strict=False):
        internals.set_precision(*which, value)


def _put_back_safe_globals(then: set[Any]) -> None:
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([*then])


def _put_back_hooks(then: Sequence[dict[int, Any]]) -> None:
    for hooks, value in zip(internals.GLOBAL_HOOKS, then, strict=True):
        hooks.clear()
        hooks.update(value)


def _read_printing() -> tuple[Any, ...]:
    numpy: Any = sys.modules.get("numpy")
    own = dict(internals.print_options())
    return own, None if numpy is None else numpy.get_printoptions()


def _put_back_printing(then: tuple[Any, ...]) -> None:
    own, numpys = then
    internals.print_options().update(own)
    if numpys is not None:
        import numpy

        numpy.set_printoptions(**numpys)


@cache
def _dynamo_overrides() -> list[internals.Setting]:
    return [*internals.dynamo_overrides()]


def _read_dynamo() -> list[Any]:
    if not internals.is_dynamo_configured():
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
        internals.default_device_context,
        _set_default_device,
    ),
    Facet("torch's settings", _read_settings, _put_back_settings),
    Facet("torch's float32 precision", _read_precisions, _put_back_precisions),
    Facet("torch's inference mode", torch.is_inference_mode_enabled),
    Facet(
        "torch's function and dispatch modes",
        internals.depths_of_mode_stacks,
    ),
    Facet("torch's number of interop threads", torch.get_num_interop_threads),
    Facet(
        "torch's safe globals",
        lambda: {*torch.serialization.get_safe_globals()},
        _put_back_safe_globals,
    ),
    Facet(
        "hooks of all modules and optimizers",
        lambda: [dict(hooks) for hooks in internals.GLOBAL_HOOKS],
        _put_back_hooks,
    ),
    Facet("torch.compile's configuration", _read_dynamo, _put_back_dynamo),
    Facet("print options", _read_printing, _put_back_printing),
    Facet("numpy's handling of errors", _read_numpy_errors, _put_back_numpy_errors),
)
