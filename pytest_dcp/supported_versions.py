"""Refuses a package that lacks a private name, in words, with the versions that have it.

Used by the three doors to private names: `_torch_internals`, `_pytest_internals`, and
`_harness.lockstep.hypothesis_internals`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from pytest_dcp.errors import UnsupportedVersionError


@dataclass(frozen=True, slots=True)
class SupportedVersions:
    """The versions of a package whose private names are known."""

    package: str
    installed: str
    oldest: str
    newest: str
    """Inclusive."""

    @contextmanager
    def explain_missing_names(self) -> Iterator[None]:
        """Inside the block, a failed import is an `UnsupportedVersionError` that names it."""
        try:
            yield
        except ImportError as error:
            raise self.refuse(missing_name(error)) from error

    def require_attributes(self, owner: type | ModuleType, *names: str) -> None:
        """Raise `UnsupportedVersionError` unless a module, or objects of a class, have the names.

        A class also declares an attribute by an annotation, as torch and pytest do for attributes
        that `__init__` sets.
        """
        is_module = isinstance(owner, ModuleType)
        path = owner.__name__ if is_module else f"{owner.__module__}.{owner.__qualname__}"
        declaring = (owner,) if is_module else owner.__mro__
        for name in names:
            declared = any(name in _annotations_of(one) for one in declaring)
            if not declared and not hasattr(owner, name):
                raise self.refuse(f"{path}.{name}")

    def refuse(self, missing: str) -> UnsupportedVersionError:
        """The error for an installed package that lacks a name."""
        return UnsupportedVersionError(
            self.package, self.installed, missing, f"{self.oldest} to {self.newest}"
        )


def _annotations_of(owner: type | ModuleType) -> Mapping[str, object]:
    """The owner's own annotations, not those of its bases."""
    if sys.version_info >= (3, 14):
        # They are made on demand there, and may name what only a type checker imports.
        import annotationlib

        return annotationlib.get_annotations(owner, format=annotationlib.Format.FORWARDREF)
    found: Mapping[str, object] = vars(owner).get("__annotations__", {})
    return found


def missing_name(error: ImportError) -> str:
    """The full name that an import did not find. Pure (no I/O)."""
    # "cannot import name 'X' from 'a.b' (file)"; only Python 3.12 has `name_from`.
    text = str(error)
    if text.startswith("cannot import name"):
        return f"{error.name}.{text.split(chr(39))[1]}"
    return error.name or text
