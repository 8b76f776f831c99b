"""Looks up names that torch's modules have and ours do not define.

Code that was written for torch takes any name from `torch.distributed.checkpoint.utils`, even
imported and private ones. Each of our modules with one of torch's names has this as its
`__getattr__`. It looks a name up in torch's module of the same name. If the object is a module, or
is defined in another of torch's modules, and we have a counterpart of that name, it returns ours:
our modules never return torch's class where the engine has its own.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

TORCH = "torch.distributed.checkpoint"
OURS = "pytest_dcp.checkpoint"


def names_of_torch(ours: str) -> Callable[[str], Any]:
    """The `__getattr__` of our module of this full name.

    It raises AttributeError for names that torch's module lacks, too.
    """

    def find(name: str) -> Any:
        if not name.startswith("__"):
            theirs = importlib.import_module(TORCH + ours.removeprefix(OURS))
            if hasattr(theirs, name):
                return _counterpart(getattr(theirs, name), name, theirs.__name__)
            if ours == OURS and (module := _submodule(name)) is not None:
                return module
        raise AttributeError(f"module {ours!r} has no attribute {name!r}")

    return find


def _counterpart(value: Any, name: str, importing_module: str) -> Any:
    """Our replacement for an object that torch's module has under this name."""
    if isinstance(value, ModuleType):
        inside, _, path = value.__name__.partition(TORCH)
        return value if inside or not path else our_module(path) or value
    home = getattr(value, "__module__", None)
    if not isinstance(home, str) or not home.startswith(f"{TORCH}.") or home == importing_module:
        return value
    module = our_module(home.removeprefix(TORCH))
    return value if module is None else vars(module).get(name, value)


def _submodule(name: str) -> ModuleType | None:
    """A module of the package that is not imported yet; torch's, if only torch has it."""
    if (module := our_module(f".{name}")) is not None:
        return module
    found = importlib.util.find_spec(f"{TORCH}.{name}")
    return None if found is None else importlib.import_module(f"{TORCH}.{name}")


def our_module(path: str) -> ModuleType | None:
    """Our counterpart of torch's module, imported; None if we have none.

    path: what follows the package in the module's name, such as ".metadata"; empty: the package.
    """
    package, _, _ = path.rpartition(".")
    if package and importlib.util.find_spec(OURS + package) is None:
        return None  # Of a package that we do not have.
    found = importlib.util.find_spec(OURS + path)
    return None if found is None else importlib.import_module(OURS + path)
