"""Process state that a test may leave changed: how to change it, and how to read it."""

from __future__ import annotations

import decimal
import gc
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import helpers_of_suite
import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist


def replaced(*args: object, **kwargs: object) -> None:
    """Takes the place of any function."""


def set_environment() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()


def block_signal() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})


def enable_autocast() -> None:
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)


def change_decimal() -> None:
    decimal.getcontext().prec = 3
    decimal.getcontext().traps[decimal.Inexact] = True


def hang_handler() -> None:
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed").propagate = False
    logging.disable(logging.INFO)


def look_at_logging() -> object:
    root = logging.getLogger()
    own = [h for h in root.handlers if type(h).__module__ == "logging"]
    torchs = logging.getLogger("torch")
    propagates = logging.getLogger("torch.distributed").propagate
    return own, torchs.level, propagates, root.manager.disable


def take_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def lower_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))


def no_subnormals() -> bool:
    return bool((torch.tensor([1e-310], dtype=torch.float64) / 2 == 0).item())


def hook(*args: object) -> None:
    """Of all modules."""


def replace_functions() -> None:
    dist.all_reduce = replaced
    time.sleep = replaced
    helpers_of_suite.help_out = replaced
    helpers_of_suite.Helper.help_out = replaced  # type: ignore[method-assign]
    torch.Tensor.sum = replaced  # type: ignore[assignment]
    torch.nn.Linear.forward = replaced  # type: ignore[assignment]
    torch.optim.Optimizer.step = replaced  # type: ignore[assignment]
    torch.nn.functional.relu = replaced


def look_at_functions() -> object:
    found = (dist.all_reduce, time.sleep, helpers_of_suite.help_out, torch.Tensor.sum)
    of_nn = (torch.nn.Linear.forward, torch.optim.Optimizer.step, torch.nn.functional.relu)
    return [one is replaced for one in (*found, *of_nn, helpers_of_suite.Helper.help_out)]


def set_up_new_logger() -> None:
    made = logging.getLogger("made.in_the_test")
    made.setLevel(logging.CRITICAL)
    made.propagate = False
    made.addHandler(logging.NullHandler())


def look_at_new_logger() -> object:
    made = logging.Logger.manager.loggerDict.get("made.in_the_test")
    if not isinstance(made, logging.Logger):
        return logging.NOTSET, True, []
    return made.level, made.propagate, made.handlers


def other_sharing_strategy() -> None:
    torch.multiprocessing.set_sharing_strategy("file_system")


CHANGES: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "environment": (set_environment, lambda: (os.environ.get("LEFT_BEHIND"), time.tzname)),
    "environ": (lambda: setattr(os, "environ", {}), lambda: "PATH" in os.environ),
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "umask": (lambda: os.umask(0o027), lambda: [os.umask(0o022), os.umask(0o022)][0]),
    "signal handler": (
        lambda: signal.signal(signal.SIGUSR1, replaced),
        lambda: signal.getsignal(signal.SIGUSR1),
    ),
    "blocked signal": (block_signal, lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "alarm": (lambda: signal.alarm(1), lambda: signal.getitimer(signal.ITIMER_REAL)),
    "path": (lambda: sys.path.insert(0, "/nowhere"), lambda: "/nowhere" in sys.path),
    "meta path": (lambda: sys.meta_path.append(None), lambda: None in sys.meta_path),  # type: ignore[arg-type]
    "argv": (lambda: sys.argv.append("left"), lambda: "left" in sys.argv),
    "excepthook": (
        lambda: setattr(sys, "excepthook", replaced),
        lambda: sys.excepthook is replaced,
    ),
    "thread hook": (
        lambda: setattr(threading, "excepthook", replaced),
        lambda: threading.excepthook is replaced,
    ),
    "recursion": (lambda: sys.setrecursionlimit(5000), sys.getrecursionlimit),
    "collector": (lambda: gc.set_threshold(1), lambda: (gc.isenabled(), gc.get_threshold())),
    "logging": (hang_handler, look_at_logging),
    "new logger": (set_up_new_logger, look_at_new_logger),
    "digits": (lambda: sys.set_int_max_str_digits(5000), sys.get_int_max_str_digits),
    "sharing strategy": (
        other_sharing_strategy,
        lambda: torch.multiprocessing.get_sharing_strategy(),
    ),
    "filters": (
        lambda: warnings.simplefilter("ignore"),
        lambda: warnings.filters[0][:3] == ("ignore", None, Warning),
    ),
    "locale": (
        lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"),
        lambda: locale.setlocale(locale.LC_ALL),
    ),
    "decimal": (change_decimal, lambda: repr(decimal.getcontext())),
    "limits": (lower_limit, lambda: resource.getrlimit(resource.RLIMIT_NOFILE)),
    "processors": (
        lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
        lambda: os.sched_getaffinity(0),
    ),
    "timeout": (lambda: socket.setdefaulttimeout(3), socket.getdefaulttimeout),
    "tempdir": (lambda: setattr(tempfile, "tempdir", "/x"), lambda: tempfile.tempdir == "/x"),
    "start method": (
        lambda: multiprocessing.set_start_method("spawn", force=True),
        lambda: multiprocessing.get_start_method(allow_none=True),
    ),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "device": (lambda: torch.set_default_device("meta"), torch.get_default_device),
    "grad mode": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "threads": (lambda: torch.set_num_threads(2), torch.get_num_threads),
    "determinism": (
        lambda: torch.use_deterministic_algorithms(True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        torch.get_float32_matmul_precision,
    ),
    "tf32": (
        take_precision,
        lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark),
    ),
    "fp32": (
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        lambda: (torch.backends.fp32_precision, torch.backends.mkldnn.conv.fp32_precision),
    ),
    "sdp": (
        lambda: torch.backends.cuda.enable_flash_sdp(False),
        torch.backends.cuda.flash_sdp_enabled,
    ),
    "anomalies": (lambda: torch.set_anomaly_enabled(True), torch.is_anomaly_enabled),
    "autocast": (
        enable_autocast,
        lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
    ),
    "subnormals": (lambda: torch.set_flush_denormal(True), no_subnormals),
    "debug level": (lambda: dist.set_debug_level(dist.DebugLevel.DETAIL), dist.get_debug_level),
    "safe globals": (
        lambda: torch.serialization.add_safe_globals([random.Random]),
        lambda: sorted(map(str, torch.serialization.get_safe_globals())),
    ),
    "module hooks": (
        lambda: torch.nn.modules.module.register_module_forward_hook(hook),
        lambda: len(torch.nn.modules.module._global_forward_hooks),
    ),
    "conversions": (
        lambda: torch.__future__.set_swap_module_params_on_conversion(True),
        torch.__future__.get_swap_module_params_on_conversion,
    ),
    "compile": (
        lambda: setattr(torch._dynamo.config, "recompile_limit", 3),
        lambda: torch._dynamo.config.recompile_limit,
    ),
    "printing": (
        lambda: [torch.set_printoptions(precision=1), np.set_printoptions(precision=1)],
        lambda: (repr(torch.tensor([0.12345])), repr(np.array([0.12345]))),
    ),
    "numpy": (lambda: np.seterr(all="raise"), lambda: np.geterr()),
    "functions": (replace_functions, look_at_functions),
}


def look(name: str) -> Any:
    """The state, as text that can be compared."""
    return str(CHANGES[name][1]())
