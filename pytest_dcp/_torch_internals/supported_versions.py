"""Which versions of torch the doors beside this module were written for, and how they say no."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from pytest_dcp.errors import UnsupportedVersionError

OLDEST, NEWEST = "2.10", "2.14"
"""Inclusive; the private names of other versions may be elsewhere, or gone."""


@contextmanager
def explain_missing_names() -> Iterator[None]:
    """Inside the block, a name that cannot be imported is an `UnsupportedVersionError` in words."""
    try:
        yield
    except ImportError as error:
        raise refuse_version(missing_name(error)) from error


def require_attributes(owner: type | ModuleType, *names: str) -> None:
    """Raise `UnsupportedVersionError` unless a module, or objects of a class, have these names.

    A class also declares an attribute by an annotation, as torch does for those that `__init__`
    sets.
    """
    is_module = isinstance(owner, ModuleType)
    path = owner.__name__ if is_module else f"{owner.__module__}.{owner.__qualname__}"
    declaring = (owner,) if is_module else owner.__mro__
    for name in names:
        declared = any(name in vars(one).get("__annotations__", {}) for one in declaring)
        if not declared and not hasattr(owner, name):
            raise refuse_version(f"{path}.{name}")


def refuse_version(missing: str) -> UnsupportedVersionError:
    """The error for a torch that lacks a name."""
    return UnsupportedVersionError("torch", torch.__version__, missing, f"{OLDEST} to {NEWEST}")


def missing_name(error: ImportError) -> str:
    """The full name that an import did not find. Pure (no I/O)."""
    # "cannot import name 'X' from 'a.b' (file)"; Python 3.12 has `name_from` beside `name`.
    text = str(error)
    if text.startswith("cannot import name"):
        return f"{error.name}.{text.split(chr(39))[1]}"
    return error.name or text
