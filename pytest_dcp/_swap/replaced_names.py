"""Puts our names into torch's modules, and into modules that imported names from these before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pytest_dcp._engine.torch_names import TORCH, our_module


def replace_names(theirs: ModuleType) -> list[type]:
    """Put our names into one of torch's modules, where ours differ, if we have such a module.

    Modules that imported torch's objects from it get ours. Returns the classes of torch's that were
    replaced.
    """
    ours = our_module(theirs.__name__.removeprefix(TORCH))
    if ours is None:
        return []
    new: dict[int, tuple[Any, Any]] = {}
    for name, old in list(vars(theirs).items()):
        if name.startswith("__") or isinstance(old, ModuleType):
            continue
        value = getattr(ours, name, old)
        if value is not old:
            setattr(theirs, name, value)
            if _belongs_to_torch(old):
                new[id(old)] = (old, value)
    if "__getattr__" not in vars(theirs):
        vars(theirs)["__getattr__"] = _names_of_ours(theirs.__name__, ours)
    if new:
        _rebind(new)
    return [old for old, _ in new.values() if isinstance(old, type)]


def _names_of_ours(theirs: str, ours: ModuleType) -> Callable[[str], Any]:
    """The `__getattr__` of torch's module of this name, for names that this torch lacks.

    Not through the `__getattr__` of our module, which asks torch's.
    """

    def find(name: str) -> Any:
        value = vars(ours).get(name)
        if name.startswith("__") or value is None or isinstance(value, ModuleType):
            raise AttributeError(
                f"{theirs} has no {name!r}, neither in the installed torch nor in pytest_dcp: "
                "correct the name, or install the torch that has it",
                name=name,
                obj=sys.modules.get(theirs),
            )
        return value

    return find


def _belongs_to_torch(value: Any) -> bool:
    """Whether it is a class or function of torch's engine; a constant may be from anywhere."""
    home = getattr(value, "__module__", None)
    return isinstance(home, str) and home.startswith(TORCH) and callable(value)


def _rebind(new: dict[int, tuple[Any, Any]]) -> None:
    """Put our objects into all modules that hold one of torch's under some name.

    new: torch's object and ours, by the identity of torch's.

    Except into our own modules: they hold torch's classes to register ours.
    """
    for module_name, module in list(sys.modules.items()):
        namespace = getattr(module, "__dict__", None)
        if not isinstance(namespace, dict) or module_name.partition(".")[0] == "pytest_dcp":
            continue
        for name, value in list(namespace.items()):
            found = new.get(id(value))
            if found is not None:
                namespace[name] = found[1]
