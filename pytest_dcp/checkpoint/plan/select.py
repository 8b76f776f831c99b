"""Which keys of a state dict to load, and what the checkpoint calls them. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pytest_dcp.errors import CheckpointMismatchError

Rename = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Selection:
    """A choice of keys and their names in the checkpoint."""

    keys: Sequence[str] | None = None
    """Flat names or shell-style patterns (`model.layers.0.*`); None: every key."""
    rename: Rename | None = None
    """From the state dict's flat names to the checkpoint's: a mapping of names or of prefixes that
    end in a dot, or a function; None: the names are the same."""

    def chosen(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The part of the flat state dict that is to be loaded.

        Raises CheckpointMismatchError for a pattern that fits no key.
        """
        if self.keys is None:
            return dict(state_dict)
        patterns = [self.keys] if isinstance(self.keys, str) else list(self.keys)
        # The name `groups[0]` is meant as it is; a name with a star would be an odd one.
        literal = {p for p in patterns if p in state_dict and not set("*?") & set(p)}
        shapes = [pattern for pattern in patterns if pattern not in literal]
        idle = [p for p in shapes if not any(fnmatchcase(fqn, p) for fqn in state_dict)]
        if idle:
            raise CheckpointMismatchError(
                f"keys={idle!r} fit nothing in the state dict: {len(state_dict)} flat names, "
                f"for instance {list(state_dict)[:3]!r}"
            )
        return {
            fqn: value
            for fqn, value in state_dict.items()
            if fqn in literal or any(fnmatchcase(fqn, pattern) for pattern in shapes)
        }

    def stored_as(self, fqns: Mapping[str, Any]) -> dict[str, str] | None:
        """What the checkpoint calls each of the names; None where all are the same."""
        if self.rename is None:
            return None
        if callable(self.rename):
            return {fqn: self.rename(fqn) for fqn in fqns}
        return {fqn: _renamed(fqn, self.rename) for fqn in fqns}


def _renamed(fqn: str, names: Mapping[str, str]) -> str:
    if fqn in names:
        return names[fqn]
    fitting = [old for old in names if old.endswith(".") and fqn.startswith(old)]
    if not fitting:
        return fqn
    longest = max(fitting, key=len)
    return names[longest] + fqn[len(longest) :]
