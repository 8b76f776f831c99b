"""The names of a checkpoint: as a tree, by pattern, and the nearest to a wrong one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import translate

from pytest_dcp._engine.lazy_reading.lazy_values import Lazy

COMPARED = 2000
"""Names that a wrong one is compared with: comparing takes about 20 microseconds each."""
SHOWN = 3


class NameTree(Mapping[str, "Lazy | NameTree"]):
    """A part of the names, split at their dots.

    A name may be a tensor and the beginning of others: the tensor is then under the empty key.
    """

    def __init__(self, names: Sequence[str], find: Callable[[str], Lazy], prefix: str = "") -> None:
        """names: with the prefix. find: returns the tensor or value of a full name."""
        self._find = find
        self._prefix = prefix
        self._below: dict[str, list[str]] = {}
        for name in names:
            key = name[len(prefix) :].partition(".")[0]
            self._below.setdefault(key, []).append(name)

    def __getitem__(self, key: str) -> Lazy | NameTree:
        names = self._below[key]
        if self._is_leaf(key):
            return self._find(names[0])
        own = self._prefix + key
        inner = NameTree([name for name in names if name != own], self._find, own + ".")
        if own in names:
            inner._below[""] = [own]
        return inner

    def __iter__(self) -> Iterator[str]:
        return iter(self._below)

    def __len__(self) -> int:
        return len(self._below)

    def __repr__(self) -> str:
        return "\n".join(self._lines(0)) or "<no names>"

    def _lines(self, depth: int) -> Iterator[str]:
        for key, names in self._below.items():
            leaf = self._is_leaf(key)
            count = "" if leaf else f"  ({len(names)} name{'' if len(names) == 1 else 's'})"
            yield f"{'  ' * depth}{_show(key)}{count}"
            if not leaf and depth < 1:
                inner = self[key]
                if isinstance(inner, NameTree):
                    yield from inner._lines(depth + 1)

    def _is_leaf(self, key: str) -> bool:
        """Whether the key has a tensor or value, and no names below it."""
        own = [self._prefix[:-1]] if key == "" and self._prefix else []
        return self._below[key] in ([self._prefix + key], own)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._below)


def _show(key: str) -> str:
    """A key for a terminal: a name from a file may hold escape codes, or line ends."""
    return key if key.isprintable() else repr(key)


def find_names(names: Sequence[str], pattern: str) -> list[str]:
    """The names that a shell-style pattern matches; `*` matches dots too.

    >>> find_names(["layers.0.w", "layers.0.b", "step"], "layers.*.w")
    ['layers.0.w']
    """
    matches = re.compile(translate(pattern)).match
    return [name for name in names if matches(name)]


def find_nearest(names: Sequence[str], wrong: str) -> tuple[str, ...]:
    """The names that are spelled most like this one, the nearest first.

    Of many names, those with the same last part are compared, or else with the same
    beginning.

    >>> find_nearest(["model.layers.0.weight", "model.layers.0.bias"], "layers.0.weight")
    ('model.layers.0.weight',)
    """
    some: Sequence[str] = names
    if len(names) > COMPARED:
        last = wrong.rpartition(".")[2]
        some = [name for name in names if name.endswith(last)]
        if not some:
            some = [name for name in names if name.startswith(wrong[:4])]
    ending = [name for name in some if name.endswith(f".{wrong}")]
    close = get_close_matches(wrong, some[:COMPARED], SHOWN, 0.6)
    return tuple(dict.fromkeys([*ending, *close]))[:SHOWN]
