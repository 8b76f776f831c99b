"""Functions and classes that a test has replaced, in modules and classes.

Checks the functions of the standard library, of torch and of this package that tests usually
replace, all names of `torch.distributed`, and all modules of the suite itself; more would take too
long. Other values of a module, such as caches, counters and flags, are left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from pytest_dcp._harness.protocol.launcher import is_of_suite
from pytest_dcp._harness.rank.process_state import Facet

FUNCTIONS = {
    "builtins": "open print input __import__ exec eval sorted isinstance getattr",
    "io": "open BytesIO StringIO",
    "json": "dump dumps load loads",
    "os": "_exit abort access chmod close cpu_count environ execv fdopen fork fork_exec fstat "
    "fsync ftruncate getcwd getenv getpid getppid kill link listdir lseek lstat makedirs mkdir "
    "open pipe posix_fallocate pread preadv putenv pwrite pwritev read readlink remove removedirs "
    "rename renames replace rmdir scandir sendfile stat statvfs symlink sync system truncate "
    "unlink urandom utime wait waitpid walk write writev",
    "pickle": "dump dumps load loads Pickler Unpickler",
    "posixpath": "abspath exists getmtime getsize isdir isfile islink join realpath",
    "random": "choice choices getrandbits randint random randrange sample seed shuffle uniform",
    "shutil": "copy copyfile copytree disk_usage move rmtree which",
    "socket": "create_connection getaddrinfo getfqdn gethostbyname gethostname socket",
    "subprocess": "Popen call check_call check_output run",
    "tempfile": "NamedTemporaryFile TemporaryDirectory TemporaryFile gettempdir mkdtemp mkstemp",
    "threading": "Condition Event Lock RLock Thread Timer current_thread",
    "time": "monotonic monotonic_ns perf_counter perf_counter_ns process_time sleep strftime time "
    "time_ns",
    "uuid": "uuid1 uuid4",
    "torch": "arange as_tensor cat compile device empty empty_like equal from_numpy full "
    "get_default_dtype load manual_seed no_grad ones ones_like rand rand_like randint randn "
    "randn_like randperm save seed set_default_device set_default_dtype set_rng_state stack "
    "tensor zeros zeros_like allclose matmul where autocast",
    "torch.cuda": "current_device current_stream device_count empty_cache get_device_name "
    "is_available is_initialized manual_seed memory_allocated set_device synchronize Event Stream",
    "torch.distributed.checkpoint": "async_save load save FileSystemReader FileSystemWriter",
    "torch.nn.functional": "cross_entropy dropout embedding gelu layer_norm linear mse_loss relu "
    "scaled_dot_product_attention softmax",
    "torch.nn.utils": "clip_grad_norm_ clip_grad_value_",
    "torch.serialization": "load save add_safe_globals _load _save",
    "pytest_dcp.checkpoint": "async_save load save FileSystemReader FileSystemWriter",
}
"""Functions of these modules that tests replace."""
MODULES = ("torch.distributed",)
"""Modules of which every name is looked at."""
CLASSES = (
    ("torch", "Tensor"),
    ("torch.nn", "Module"),
    ("torch.nn", "Linear"),
    ("torch.optim", "Optimizer"),
    ("pathlib", "Path"),
)
"""Not the optimizers themselves: torch wraps their `step` when the first one is made."""
INHERITED = object()

_root = ""
"""The folder of the suite; set by `watch_suite`."""
_owners: list[_Owner] = []
_module_count = -1
"""How many modules there were when `_owners` was made."""


def watch_suite(root: Path) -> None:
    """Look at the modules below this folder, too."""
    global _root, _module_count
    _root, _module_count = f"{root}/", -1


@dataclass(frozen=True, slots=True)
class _Owner:
    """A module or class, and its names that are looked at."""

    owner: Any
    pick: Callable[[Any], Any] | None
    """Takes the values of some names; None for all that there are."""
    names: tuple[str, ...] = ()

    def values(self) -> Sequence[Any]:
        """Those of its names, in order."""
        inside = vars(self.owner)
        if self.pick is None:
            return [*inside.values()]
        try:
            found: Sequence[Any] = self.pick(inside)
        except KeyError:  # a test has deleted one
            found = [inside.get(name) for name in self.names]
        return found


@dataclass(frozen=True, slots=True)
class _Names:
    """The values of the names of some modules and classes."""

    owners: list[_Owner]
    names: list[Sequence[str]]
    values: list[Sequence[Any]]

    @classmethod
    def read(cls) -> _Names:
        owners = _current_owners()
        names: list[Sequence[str]] = [one.names or [*vars(one.owner)] for one in owners]
        return cls(owners, names, [one.values() for one in owners])

    def find_changed(self) -> list[tuple[Any, str, Any]]:
        """(owner, name, value) of functions and classes that are not in their places now.

        The value is `INHERITED` where a class now has one of its own instead of its base's.
        """
        found: list[tuple[Any, str, Any]] = []
        for one, names, values in zip(self.owners, self.names, self.values, strict=True):
            if _are_equal(one.values(), values):
                continue
            owner, now = one.owner, vars(one.owner)
            found += [
                (owner, name, value)
                for name, value in zip(names, values, strict=True)
                if now.get(name) is not value and _is_code(value)
            ]
            if isinstance(owner, type):
                base = super(owner, owner)
                new = [name for name in now.keys() - {*names} if hasattr(base, name)]
                found += [(owner, name, INHERITED) for name in new if _is_code(now[name])]
        return found


def _are_equal(now: Sequence[Any], then: Sequence[Any]) -> bool:
    """Compares by identity first, all in C; values that are not the same may not like it."""
    try:
        return now == then
    except Exception:  # noqa: BLE001 - the values are the suite's: tensors, arrays
        return False


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, classmethod | staticmethod | property)


def _put_back(then: _Names) -> None:
    for owner, name, value in then.find_changed():
        if value is INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


def _current_owners() -> list[_Owner]:
    global _owners, _module_count
    if len(sys.modules) != _module_count:
        _module_count = len(sys.modules)
        some = [_some_of(name, names) for name, names in FUNCTIONS.items() if name in sys.modules]
        modules = [sys.modules[name] for name in MODULES if name in sys.modules]
        suites = [module for module in [*sys.modules.values()] if _is_of_suite(module)]
        classes = [getattr(sys.modules[m], c) for m, c in CLASSES if m in sys.modules]
        own = [one for module in suites for one in vars(module).values() if _is_own(one, module)]
        _owners = [*some, *(_Owner(one, None) for one in (*modules, *suites, *classes, *own))]
    return _owners


def _some_of(module_name: str, listed: str) -> _Owner:
    module = sys.modules[module_name]
    names = tuple(name for name in listed.split() if name in vars(module))
    return _Owner(module, itemgetter(*names), names)


def _is_of_suite(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(module, ModuleType) and isinstance(file, str) and is_of_suite(file, _root)


def _is_own(value: Any, module: ModuleType) -> bool:
    return isinstance(value, type) and value.__module__ == module.__name__


FACETS = (
    Facet(
        "functions that were replaced",
        _Names.read,
        _put_back,
        differs=lambda then: bool(then.find_changed()),
        is_quick=False,
    ),
)
