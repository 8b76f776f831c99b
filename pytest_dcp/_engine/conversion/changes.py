"""The choices of a conversion: names, new names and dtypes. Pure (no I/O).

>>> changes = Changes(exclude="optim.*", rename={"model.": ""}, dtype=torch.bfloat16)
>>> changes.choose(["model.w", "model.mask", "optim.w"], "run")
{'model.w': 'w', 'model.mask': 'mask'}
>>> changes.dtype_of("model.w", torch.float32), changes.dtype_of("model.mask", torch.bool)
(torch.bfloat16, torch.bool)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

import torch

from pytest_dcp._engine.plan.select import Rename, Selection
from pytest_dcp.errors import CheckpointMismatchError

Patterns = str | Sequence[str]
"""Names, or shell-style patterns; `*` matches dots too."""
Dtypes = torch.dtype | Mapping[str, torch.dtype]
"""For all tensors of floating point, or by pattern of the source's names for any tensor."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Changes:
    """The choices of a conversion; without any, everything is kept."""

    include: Patterns | None = None
    """Names or patterns of the source; None: every name."""
    exclude: Patterns | None = None
    """Of the included ones."""
    rename: Rename | None = None
    """From the source's names to the target's: a mapping of names, or of prefixes that end in a
    dot, or a function."""
    dtype: Dtypes | None = None

    def __bool__(self) -> bool:
        return any(
            change is not None for change in (self.include, self.exclude, self.rename, self.dtype)
        )

    @property
    def keeps_names(self) -> bool:
        """Whether every name is converted, and stays the same."""
        return self.include is None and self.exclude is None and self.rename is None

    def choose(self, names: Sequence[str], where: str) -> dict[str, str]:
        """The target's name for each of the source's names that is converted.

        Raises CheckpointMismatchError for patterns that match nothing, a rename that changes
        nothing, and two names that become one.
        """
        included = _match(names, self.include, "include", where)
        excluded = _match(names, self.exclude, "exclude", where) if self.exclude else set()
        chosen = [n for n in names if n not in excluded and (self.include is None or n in included)]
        if not chosen and self:
            raise CheckpointMismatchError(f"nothing of {where} is left to convert")
        self._check_types()
        selection = Selection(rename=self.rename)
        selection.check_types()
        renamed = selection.stored_as(dict.fromkeys(chosen)) or {name: name for name in chosen}
        self._check_renamed(renamed, where)
        _match(names, list(self.dtype) if isinstance(self.dtype, Mapping) else None, "dtype", where)
        return renamed

    def dtype_of(self, name: str, stored: torch.dtype) -> torch.dtype:
        """The target's dtype for a tensor of the source."""
        if isinstance(self.dtype, Mapping):
            found = (dtype for pattern, dtype in self.dtype.items() if fnmatchcase(name, pattern))
            return next(found, stored)
        if self.dtype is None or not stored.is_floating_point:
            return stored
        return self.dtype

    def _check_types(self) -> None:
        dtypes = self.dtype.values() if isinstance(self.dtype, Mapping) else [self.dtype]
        for dtype in dtypes:
            if dtype is not None and not isinstance(dtype, torch.dtype):
                raise TypeError(f"dtype must be a torch.dtype, or map patterns to some: {dtype!r}")

    def _check_renamed(self, renamed: Mapping[str, str], where: str) -> None:
        if self.rename and all(name == new for name, new in renamed.items()):
            raise CheckpointMismatchError(
                f"rename changes none of the {len(renamed)} names of {where}, such as "
                f"{list(renamed)[:3]!r}: an entry leads from the source's name to the target's"
            )
        origin: dict[str, str] = {}
        for name, new in renamed.items():
            if type(new) is not str or (not new and name):
                raise CheckpointMismatchError(
                    f"rename gives {new!r} for {name!r}, which is no name"
                )
            if (other := origin.setdefault(new, name)) is not name:
                raise CheckpointMismatchError(
                    f"rename gives {new!r} for both {other!r} and {name!r}"
                )


def check_cast(name: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Raises CheckpointMismatchError if a tensor cannot be cast, or would lose imaginary parts."""
    if stored != dtype and (reason := _reason_against(stored, dtype)):
        raise CheckpointMismatchError(
            f"{name!r} is {stored}, and cannot become {dtype}: {reason}", mismatched=(name,)
        )


@lru_cache
def _reason_against(stored: torch.dtype, dtype: torch.dtype) -> str | None:
    if stored.is_complex and not dtype.is_complex:
        return "imaginary parts would be lost"
    try:
        torch.zeros(stored.itemsize, dtype=torch.uint8).view(stored).to(dtype)
    except (RuntimeError, TypeError):
        return "torch does not cast between them"
    return None


def _match(names: Sequence[str], choice: Patterns | None, argument: str, where: str) -> set[str]:
    """The names that any of the patterns matches."""
    if choice is None:
        return set()
    patterns = [choice] if isinstance(choice, str) else list(choice)
    there = set(names)
    found: set[str] = set()
    idle = []
    for pattern in patterns:
        # The name `groups[0]` is literal too; a name with a star would be unusual.
        hits = {pattern} if pattern in there else {n for n in names if fnmatchcase(n, pattern)}
        found |= hits
        if not hits:
            idle.append(pattern)
    if idle:
        raise CheckpointMismatchError(
            f"{argument}={idle[:SHOWN]!r} match nothing in {where}, which has {len(names)} names, "
            f"such as {list(names)[:3]!r}"
        )
    return found
