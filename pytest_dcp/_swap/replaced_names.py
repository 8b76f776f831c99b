"""Puts our names into torch's modules, and into modules that imported names from these before."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

TORCH = "torch.distributed.checkpoint"
OURS = "pytest_dcp.checkpoint"
IMPORT_MACHINERY = frozenset({"__name__", "__loader__", "__spec__", "__path__", "__file__"})

_replaced: dict[int, tuple[Any, Any]] = {}
"""By the identity of torch's object: that object, which this keeps alive, and ours."""


def replace_names(theirs: ModuleType) -> bool:
    """Put our names into one of torch's modules, where ours differ; False if we lack the module.

    Modules that imported torch's objects from it get ours.
    """
    path = theirs.__name__.removeprefix(TORCH)
    if not _is_ours(path):
        return False
    ours = importlib.import_module(OURS + path)
    new: dict[int, tuple[Any, Any]] = {}
    for name, old in list(vars(theirs).items()):
        if name.startswith("__") or isinstance(old, ModuleType):
            continue
        value = getattr(ours, name, old)
        if value is not old:
            setattr(theirs, name, value)
            if _belongs_to_torch(old):
                new[id(old)] = (old, value)
    _replaced.update(new)
    if new:
        _rebind(new)
    return True


def _is_ours(path: str) -> bool:
    """Whether we have a module of this path below the package."""
    try:
        return importlib.util.find_spec(OURS + path) is not None
    except ModuleNotFoundError:  # A module of a package that we do not have.
        return False


def _belongs_to_torch(value: Any) -> bool:
    """Whether it is a class or function of torch's engine; a constant may be from anywhere."""
    home = getattr(value, "__module__", None)
    return isinstance(home, str) and home.startswith(TORCH) and callable(value)


def _rebind(new: dict[int, tuple[Any, Any]]) -> None:
    """Put our objects into all modules that hold one of torch's under some name.

    Except into our own modules: they hold torch's classes to register ours.
    """
    for module_name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if not isinstance(namespace, dict) or module_name.partition(".")[0] == "pytest_dcp":
            continue
        for name, value in list(namespace.items()):
            found = new.get(id(value))
            if found is not None and found[0] is value and name not in IMPORT_MACHINERY:
                namespace[name] = found[1]
