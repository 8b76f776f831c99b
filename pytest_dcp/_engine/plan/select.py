"""Which keys of a state dict to load, and their names in the checkpoint. Pure (no I/O)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pytest_dcp.errors import CheckpointMismatchError

Rename = Mapping[str, str] | Callable[[str], str]
"""From names of the state dict to names of the checkpoint: `{"mine.": "stored."}`."""
FUNCTION = "the function"
"""The entry's key for a rename that is a function."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A choice of keys and their names in the checkpoint.

    >>> state = {"model.w": 1, "model.b": 2, "step": 3}
    >>> chosen = Selection(keys=["model.*"], rename={"model.": "net.", "model.b": "bias"})
    >>> chosen.choose(state)
    {'model.w': 1, 'model.b': 2}
    >>> chosen.stored_as(chosen.choose(state))  # a whole name goes before a prefix
    {'model.w': 'net.w', 'model.b': 'bias'}
    >>> chosen.idle_renames(state, stored=["net.w"])
    {'model.b': "rename={'model.b': 'bias'}: the checkpoint has no 'bias'"}
    """

    keys: Sequence[str] | None = None
    """Flat names or shell-style patterns (`model.layers.0.*`); None: every key."""
    rename: Rename | None = None
    """From the state dict's flat names to the checkpoint's: a mapping of names or of prefixes that
    end in a dot, or a function; None: the names are the same."""

    def check_types(self) -> None:
        """Raise TypeError for keys that are no strings, or another `rename` than it takes."""
        keys: object = self.keys
        rename: object = self.rename
        if keys is not None and not (
            isinstance(keys, Collection) and all(isinstance(key, str) for key in keys)
        ):
            raise TypeError(f"keys must be a name, or a list of names or patterns, got {keys!r}")
        if not (rename is None or isinstance(rename, Mapping) or callable(rename)):
            kind = type(rename).__name__
            raise TypeError(f"rename must be a dict of names or a function, got {kind}")

    def choose(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The part of the flat state dict to load.

        Raises CheckpointMismatchError for a pattern that matches no key.
        """
        if self.keys is None:
            return dict(state_dict)
        patterns = [self.keys] if isinstance(self.keys, str) else list(self.keys)
        # The name `groups[0]` is literal; a name with a star would be unusual.
        literal = {p for p in patterns if p in state_dict and not set("*?") & set(p)}
        shapes = [pattern for pattern in patterns if pattern not in literal]
        idle = [p for p in shapes if not any(fnmatchcase(fqn, p) for fqn in state_dict)]
        if idle:
            names = f"{len(state_dict)} flat name{'' if len(state_dict) == 1 else 's'}"
            raise CheckpointMismatchError(
                f"keys={idle!r} match nothing in the state dict, which has {names}, "
                f"such as {list(state_dict)[:3]!r}"
            )
        return {
            fqn: value
            for fqn, value in state_dict.items()
            if fqn in literal or any(fnmatchcase(fqn, pattern) for pattern in shapes)
        }

    def stored_as(self, fqns: Mapping[str, Any]) -> dict[str, str] | None:
        """The checkpoint's name for each of the names; None if all are the same."""
        if self.rename is None:
            return None
        if callable(self.rename):
            return {fqn: self.rename(fqn) for fqn in fqns}
        return {fqn: _rename(fqn, self.rename) for fqn in fqns}

    def idle_renames(
        self, fqns: Collection[str], stored: Collection[str], moved: tuple[str, ...] = ()
    ) -> dict[str, str]:
        """Another rank may hold the names that an entry selects, so one rank alone cannot call it a
        mistake.
        """
        if self.rename is None:
            return {}
        if callable(self.rename):
            changed = [name for fqn in fqns if (name := self.rename(fqn)) != fqn]
            if not changed or any(name in stored for name in changed):
                return {}
            return {FUNCTION: f"rename gives names that are not there, such as {changed[0]!r}"}
        users: dict[str, list[str]] = {mine: [] for mine in self.rename}
        for fqn in fqns:
            if (entry := _entry_for(fqn, self.rename)) is not None:
                users[entry].append(fqn)
        idle = {}
        for mine, its_fqns in users.items():
            renamed = [_rename(fqn, self.rename) for fqn in its_fqns]
            is_overruled = not renamed and any(_fits(fqn, mine) for fqn in fqns)
            is_moved = any(fqn.startswith(moved) for fqn in its_fqns)
            if not (is_overruled or is_moved or any(name in stored for name in renamed)):
                idle[mine] = _reason(mine, self.rename[mine], renamed, fqns, stored)
        return idle


def _rename(fqn: str, names: Mapping[str, str]) -> str:
    entry = _entry_for(fqn, names)
    return fqn if entry is None else names[entry] + fqn[len(entry) :]


def _entry_for(fqn: str, names: Mapping[str, str]) -> str | None:
    """The entry that renames a name: its own, or that of its longest prefix."""
    if fqn in names:
        return fqn
    fitting = [mine for mine in names if mine.endswith(".") and fqn.startswith(mine)]
    return max(fitting, key=len, default=None)


def _reason(
    mine: str, theirs: str, renamed: Sequence[str], fqns: Iterable[str], stored: Iterable[str]
) -> str:
    """Why an entry of `rename` gives no name that the checkpoint has."""
    entry = f"rename={{{mine!r}: {theirs!r}}}"
    if renamed:
        return f"{entry}: the checkpoint has no {renamed[0]!r}"
    text = f"{entry}: the state dict has no {mine!r}"
    if any(_fits(fqn, theirs) for fqn in fqns) and any(_fits(name, mine) for name in stored):
        text += (
            "; the checkpoint has: an entry leads from the state dict's name to the checkpoint's, "
            f"so write {{{theirs!r}: {mine!r}}}"
        )
    return text


def _fits(name: str, entry: str) -> bool:
    return name == entry or (entry.endswith(".") and name.startswith(entry))
