"""Finds what torch's engine has made before ours took its place: it keeps torch's code."""

from __future__ import annotations

import enum
import gc
from collections import Counter
from collections.abc import Iterable

from pytest_dcp._engine.torch_names import TORCH

OURS_OR_TORCHS = ("pytest_dcp", "torch")

ROOMS = {f"{TORCH}.{room}" for room in ("planner", "staging", "storage")}
"""The modules with the bases of all objects that a program makes and passes on; others are only
parts of those."""


def describe_leftovers(replaced: Iterable[type]) -> str:
    """One sentence that names the objects and subclasses of these classes; empty if none exist.

    replaced: classes of torch's engine that ours have replaced. Enums are left out: their members
    exist since their import.
    """
    classes = {cls for cls in replaced if not issubclass(cls, enum.Enum)}
    heirs = sorted({name for cls in classes for name in _subclass_names(cls)})
    parts = {cls for cls in classes if any(base.__module__ in ROOMS for base in cls.__mro__[1:])}
    found = Counter(type(item).__name__ for item in gc.get_objects() if type(item) in parts)
    descriptions = [f"{count} {name}" for name, count in sorted(found.items())]
    descriptions += [f"the class {name}" for name in heirs]
    if not descriptions:
        return ""
    return (
        f"torch's engine was in use before pytest_dcp's took its place, and stays in use in "
        f"{', '.join(descriptions)}: swap first, or import and make these later"
    )


def _subclass_names(cls: type) -> list[str]:
    """The full names of the subclasses that are not torch's or ours."""
    heirs: list[type] = cls.__subclasses__()
    return [
        f"{heir.__module__}.{heir.__qualname__}"
        for heir in heirs
        if heir.__module__.partition(".")[0] not in OURS_OR_TORCHS
    ]
