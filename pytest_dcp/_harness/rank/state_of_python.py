"""The process's state in the system, Python and its standard library."""

from __future__ import annotations

import contextlib
import decimal
import gc
import locale
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from pytest_dcp._harness.protocol import linux
from pytest_dcp._harness.protocol.launcher import HELPERS
from pytest_dcp._harness.rank import logger_changes
from pytest_dcp._harness.rank.process_state import Facet

SIGNALS = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
LIMITS = tuple(
    getattr(resource, f"RLIMIT_{name}")
    for name in ("AS", "CORE", "CPU", "DATA", "FSIZE", "MEMLOCK", "NOFILE", "NPROC", "STACK")
)
TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
PATHS = ("path", "meta_path", "path_hooks")
DECIMAL = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")
HOOKS = ("excepthook", "unraisablehook", "displayhook", "breakpointhook", "dont_write_bytecode")

CURRENT_TEST = "PYTEST_CURRENT_TEST"
"""pytest sets this variable anew for each phase."""

_environ = os.environ
# The function in C: the one in Python makes an enumeration's member of each handler.
_handler_of = getattr(signal, "_signal", signal).getsignal


def _read_environment() -> dict[Any, Any]:
    # As it is kept: to decode all of it takes longer than a small example.
    raw = dict(_raw(os.environ))
    raw.pop(os.fsencode(CURRENT_TEST), None)
    return raw


def _raw(environ: Mapping[str, str]) -> Mapping[Any, Any]:
    """A test may have put a mapping of its own in the environment's place."""
    raw: Mapping[Any, Any] = getattr(environ, "_data", environ)
    return raw


def _put_back_environment(then: dict[Any, Any]) -> None:
    os.environ = _environ  # noqa: B003 - the object that was there, not a new one
    zone = os.environ.get("TZ")
    variables = {os.fsdecode(name): os.fsdecode(value) for name, value in then.items()}
    for name in [name for name in os.environ if name not in (*variables, CURRENT_TEST)]:
        del os.environ[name]
    for name, value in variables.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if os.environ.get("TZ") != zone:
        time.tzset()


def _read_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def _read_umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _read_handlers() -> list[Any]:
    return [_handler_of(signum) for signum in SIGNALS]


def _put_back_handlers(then: list[Any]) -> None:
    for signum, handler, now in zip(SIGNALS, then, _read_handlers(), strict=True):
        if now != handler and handler is not None:
            signal.signal(signum, handler)


def _read_timers() -> list[bool]:
    return [signal.getitimer(timer)[0] > 0 for timer in TIMERS]


def _put_back_timers(then: list[bool]) -> None:
    for timer, armed in zip(TIMERS, then, strict=True):
        if not armed:
            signal.setitimer(timer, 0)


def _read_paths() -> list[list[Any]]:
    return [list(getattr(sys, name)) for name in PATHS]


def _put_back_paths(then: list[list[Any]]) -> None:
    for name, entries in zip(PATHS, then, strict=True):
        getattr(sys, name)[:] = entries


def _put_back_arguments(then: list[str]) -> None:
    sys.argv = [*then]


def _read_interpreter() -> list[Any]:
    hooks = [getattr(sys, name) for name in HOOKS]
    numbers = (sys.getrecursionlimit(), sys.getswitchinterval(), sys.get_int_max_str_digits())
    return [*hooks, threading.excepthook, *numbers]


def _put_back_interpreter(then: list[Any]) -> None:
    *hooks, threading.excepthook, recursion_limit, switch_interval, digits = then
    for name, hook in zip(HOOKS, hooks, strict=True):
        setattr(sys, name, hook)
    sys.setrecursionlimit(recursion_limit)
    sys.setswitchinterval(switch_interval)
    sys.set_int_max_str_digits(digits)


def _put_back_collector(then: tuple[bool, tuple[int, int, int], int]) -> None:
    enabled, thresholds, debug = then
    (gc.enable if enabled else gc.disable)()
    gc.set_threshold(*thresholds)
    gc.set_debug(debug)


def _users(handlers: list[logging.Handler]) -> list[logging.Handler]:
    """Without pytest's own handlers, which it hangs where it likes."""
    return [handler for handler in handlers if type(handler).__module__ != "_pytest.logging"]


AS_MADE = (logging.NOTSET, False, True, (), ())
"""The settings of a logger that was not set up."""


class _Loggers(dict[str, Any]):
    """The settings of loggers by name."""

    changes = -1
    """How many changes there had been when the settings were these."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        modules = settings.modules if isinstance(settings, _Loggers) else frozenset(sys.modules)
        self.modules: frozenset[str] = modules
        """Modules imported by then."""


def _read_logging() -> _Loggers:
    found = _Loggers(_read_root())
    found.changes = logger_changes.count()
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger):
            found[name] = _settings_of(logger)
    return found


def _read_root() -> dict[str, Any]:
    return {"": (*_settings_of(logging.root), logging.root.manager.disable)}


def _has_other_loggers(then: _Loggers) -> bool:
    """Whether loggers that were there differ, or new ones are not as `getLogger` makes them."""
    if then[""] != _read_root()[""]:
        return True
    if logger_changes.count() == then.changes:
        return False
    now = _read_logging()
    changed = any(now.get(name) != settings for name, settings in then.items())
    changed = changed or any(now[name] != AS_MADE for name in _new_loggers(now, then))
    if not changed:
        then.changes = now.changes
    return changed


def _new_loggers(names: Iterable[str], then: _Loggers) -> list[str]:
    """The loggers that a test has made.

    Leaves out those of modules imported since: the import set them up, and does not run again.
    """
    new = [name for name in names if name not in then]
    imported = sys.modules.keys() - then.modules if new else set()
    return [name for name in new if imported.isdisjoint(_prefixes(name))]


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _settings_of(logger: logging.Logger) -> tuple[Any, ...]:
    handlers = (*_users(logger.handlers),) if logger.handlers else ()
    filters = (*logger.filters,) if logger.filters else ()
    return logger.level, logger.disabled, logger.propagate, handlers, filters


def _put_back_logging(then: _Loggers) -> None:
    logging.disable(then[""][-1])
    new = _new_loggers(_read_logging(), then)
    for name, settings in {**then, **dict.fromkeys(new, AS_MADE)}.items():
        logger = logging.getLogger(name) if name else logging.root
        level, logger.disabled, logger.propagate, handlers, filters = settings[:5]
        logger.setLevel(level)
        pytests = [handler for handler in logger.handlers if not _users([handler])]
        logger.handlers[:] = [*handlers, *pytests]
        logger.filters[:] = filters


def _put_back_filters(then: list[Any]) -> None:
    warnings.filters[:] = then  # type: ignore[index]  # a list, despite typeshed's annotation
    # The cached decisions of each module are void. Both names are private; can go when
    # `warnings` has a function for that.
    for name in ("_filters_mutated", "_filters_mutated_lock_held"):
        if (mutated := getattr(warnings, name, None)) is not None:
            with getattr(warnings, "_lock", contextlib.nullcontext()):
                mutated()
            return


def _read_decimal() -> list[Any]:
    # All that makes a context, in one call: its settings in the order of DECIMAL, flags, traps.
    *settings, _, traps = decimal.getcontext().__reduce__()[1]
    return [*settings, traps]


def _put_back_decimal(then: list[Any]) -> None:
    context = decimal.getcontext()
    *settings, traps = then
    for trap in context.traps:
        context.traps[trap] = trap in traps
    for name, value in zip(DECIMAL, settings, strict=True):
        setattr(context, name, value)


def _read_limits() -> list[tuple[int, int]]:
    return [resource.getrlimit(which) for which in LIMITS]


def _put_back_limits(then: list[tuple[int, int]]) -> None:
    for which, limits in zip(LIMITS, then, strict=True):
        if resource.getrlimit(which) != limits:
            resource.setrlimit(which, limits)


def _read_children() -> frozenset[int]:
    return frozenset(linux.children())


def _has_children() -> bool:
    """Costs a hundredth of what looking for them does."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _has_new_child(then: frozenset[int]) -> bool:
    return _has_children() and any(
        pid not in then
        and linux.state_of(pid) not in ("Z", "X", "")
        and not any(helper in linux.command_of(pid) for helper in HELPERS)
        for pid in linux.children()
    )


def _has_new_thread(then: frozenset[threading.Thread]) -> bool:
    return any(thread not in then for thread in threading.enumerate())


FACETS = (
    Facet(
        "threads",
        lambda: frozenset(threading.enumerate()),
        differs=_has_new_thread,
        is_quick=False,
    ),
    Facet("child processes", _read_children, differs=_has_new_child, is_quick=False),
    Facet("the environment", _read_environment, _put_back_environment),
    Facet("the working folder", _read_folder, os.chdir),
    Facet("the umask", _read_umask, os.umask),
    Facet("signal handlers", _read_handlers, _put_back_handlers),
    Facet(
        "blocked signals",
        lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        lambda then: signal.pthread_sigmask(signal.SIG_SETMASK, then),
    ),
    Facet("interval timers", _read_timers, _put_back_timers),
    Facet("sys.path and import hooks", _read_paths, _put_back_paths),
    Facet("sys.argv", lambda: list(sys.argv), _put_back_arguments),
    Facet("the interpreter's settings", _read_interpreter, _put_back_interpreter),
    Facet(
        "the garbage collector's settings",
        lambda: (gc.isenabled(), gc.get_threshold(), gc.get_debug()),
        _put_back_collector,
    ),
    Facet(
        "logging",
        _read_logging,
        _put_back_logging,
        differs=_has_other_loggers,
        is_quick=False,
    ),
    Facet("warning filters", lambda: list(warnings.filters), _put_back_filters),
    Facet(
        "the locale",
        lambda: locale.setlocale(locale.LC_ALL),
        lambda then: locale.setlocale(locale.LC_ALL, then),
    ),
    Facet("the decimal context", _read_decimal, _put_back_decimal),
    Facet("resource limits", _read_limits, _put_back_limits),
    Facet("the processors", lambda: os.sched_getaffinity(0), lambda v: os.sched_setaffinity(0, v)),
    Facet("the priority", lambda: os.getpriority(os.PRIO_PROCESS, 0)),
    Facet("the sockets' timeout", socket.getdefaulttimeout, socket.setdefaulttimeout),
    Facet(
        "the folder of temporary files",
        lambda: tempfile.tempdir,
        lambda then: setattr(tempfile, "tempdir", then),
    ),
    Facet(
        "multiprocessing's start method",
        lambda: multiprocessing.get_start_method(allow_none=True),
        lambda then: multiprocessing.set_start_method(then, force=True),
    ),
)
