"""Hooks the imports of torch's package: each imported module gets our names."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from pytest_dcp._engine.torch_names import OURS, TORCH, our_module
from pytest_dcp._swap.fallbacks import note_fallback
from pytest_dcp._swap.leftovers import describe_leftovers
from pytest_dcp._swap.replaced_names import replace_names

_ENGINE = ("pytest_dcp._engine", OURS)
"""The packages of our engine."""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torch's modules and ours as before, and is called when they are loaded.

    torch's modules get our names only while no module of ours is being loaded, since that module
    would be incomplete. A save's background process, for example, imports our engine first.
    """

    def __init__(self) -> None:
        self.loading_ours = 0
        """How many of our modules are being loaded."""
        self.importing_ours = False
        """Whether our engine is being imported; torch's modules then keep their names."""
        self.has_ours = False
        """Whether our engine has been imported."""
        self.waiting: list[ModuleType] = []
        """torch's modules that were imported meanwhile."""
        self.replaced: list[type] = []
        """torch's classes that ours have replaced."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's own spec, with a loader that calls us afterwards."""
        if not _belongs_to(fullname, TORCH, *_ENGINE):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def take_loaded(self, module: ModuleType) -> None:
        """Give one of torch's modules our names, once the whole package is imported.

        Notes a module that code imports directly and that we do not have.
        """
        self.waiting.append(module)
        if self.is_importing() or not (module.__name__ == TORCH or _is_whole(TORCH)):
            return
        self.swap_waiting()
        if our_module(module.__name__.removeprefix(TORCH)) is None:
            note_fallback(module.__name__)

    @contextlib.contextmanager
    def load_ours(self) -> Iterator[None]:
        """Load one of our modules in the block, then swap torch's modules that waited for it."""
        self.loading_ours += 1
        try:
            yield
        finally:
            self.loading_ours -= 1
        if self.waiting and not self.is_importing() and _is_whole(TORCH):
            self.swap_waiting()

    def is_importing(self) -> bool:
        """Whether some of our modules are incomplete."""
        return self.importing_ours or self.loading_ours > 0

    def swap_waiting(self) -> None:
        """Import all of our modules, then give our names to the modules that wait."""
        if not self.has_ours:
            self.importing_ours = True
            try:
                _import_ours()
            finally:
                self.importing_ours = False
            self.has_ours = True
        waiting, self.waiting = self.waiting, []
        for module in waiting:
            self.replaced += replace_names(module)


class _Loader(importlib.abc.Loader):
    """A module's own loader, followed by a call to the finder."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the module; if it is torch's, give it our names then."""
        if _belongs_to(module.__name__, TORCH):
            self._loader.exec_module(module)
            self._finder.take_loaded(module)
        else:
            with self._finder.load_ours():
                self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_installed: list[_Finder] = []


def install() -> str:
    """Make imports of torch's engine return ours, including earlier imports. Idempotent.

    Imports neither torch nor our engine if torch's has not been imported. Returns a sentence that
    names the objects that torch's engine has already made; empty if there are none.
    """
    if _installed:
        return ""
    finder = _Finder()
    _installed.append(finder)
    sys.meta_path.insert(0, finder)
    if TORCH in sys.modules:
        finder.waiting.extend(_loaded_modules())
        finder.swap_waiting()
    return describe_leftovers(finder.replaced) if finder.replaced else ""


def _loaded_modules() -> list[ModuleType]:
    return [
        module for name, module in list(sys.modules.items())
        if _belongs_to(name, TORCH) and isinstance(module, ModuleType)
    ]  # fmt: skip


def _belongs_to(name: str, *packages: str) -> bool:
    """Whether a module is one of the packages, or within one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _import_ours() -> None:
    """Import each of our modules that has one of torch's names.

    All at once, because a module imported while torch loads one of its own would be incomplete.
    """
    ours = importlib.import_module(OURS)
    for found in pkgutil.walk_packages(ours.__path__, f"{OURS}."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in ("pytest_dcp", "torch"):
                raise  # Not a package that need not be installed, such as fsspec.


def _is_whole(name: str) -> bool:
    """Whether a module has been imported completely."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)
