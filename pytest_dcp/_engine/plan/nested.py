"""Nested state dicts as flat ones, and back. Pure (no I/O).

Mappings are always walked; lists only if they contain a tensor or a mapping at any depth; tuples
and everything else are values. A flat name is the path's keys joined with dots. Checkpoints of
torch before 2.4 also kept a mapping without tensors as one value: `plain_mappings_whole` walks this
way.

The way there:

>>> state = {"model": {"w": torch.zeros(2)}, "optimizer": [{"lr": 0.1}], "steps": [1, 2]}
>>> flat, paths = flatten(state)
>>> flat
{'model.w': tensor([0., 0.]), 'optimizer.0.lr': 0.1, 'steps': [1, 2]}
>>> paths["optimizer.0.lr"]
('optimizer', 0, 'lr')

A name does not say whether `0` is a position or a key, so the checkpoint stores the paths as well
(`as_saved`), and the way back follows them:

>>> again = {}
>>> for fqn, path in as_saved(paths).items():
...     set_element(again, path, flat[fqn])
>>> again == {"model": {"w": flat["model.w"]}, "optimizer": [{"lr": 0.1}], "steps": [1, 2]}
True

Names must be distinct, even if the paths are:

>>> flatten({"a.b": 1, "a": {"b": 2}})
Traceback (most recent call last):
    ...
ValueError: duplicated flatten key 'a.b': both ('a.b',) and ('a', 'b') lead to it

Assumes nothing about a path from a file: when a checkpoint is read, `Room` puts values instead of
`set_element`, since one forged position could otherwise ask for a list of any length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch

from pytest_dcp._engine.plan.containers import is_plain
from pytest_dcp._engine.plan.per_rank import PerRank, check_per_rank
from pytest_dcp.errors import CheckpointCorruptError, PlanError

Path = tuple[Any, ...]
"""The keys from the root to a value: a mapping's own keys, and positions in lists."""
TEXT = frozenset({str})


Note = Callable[[Path, Any], None]


def flatten(
    state_dict: Mapping[Any, Any],
    *,
    plain_mappings_whole: bool = False,
    note: Note = lambda path, container: None,
) -> tuple[dict[str, Any], dict[str, Path]]:
    """PlanError for a PerRank of distributed tensors, and for too deep nesting."""
    flat: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    # Nearly every mapping has only string keys, which cannot collide: one C loop checks this.
    if not TEXT.issuperset(map(type, state_dict)):
        _check_keys((), state_dict)
        note((), dict(state_dict))
    elif all(issubclass(kind, torch.Tensor) for kind in set(map(type, state_dict.values()))):
        # It is flat already, as many are: the walk would make three calls for each tensor.
        return dict(state_dict.items()), {key: (key,) for key in state_dict}

    def visit(path: Path, value: Any) -> None:
        fqn = str(path[0]) if len(path) == 1 else ".".join(map(str, path))
        if fqn in flat:
            raise ValueError(
                f"duplicated flatten key {fqn!r}: both {paths[fqn]!r} and {path!r} lead to it"
            )
        flat[fqn] = value
        paths[fqn] = path

    for key, value in state_dict.items():
        if isinstance(value, torch.Tensor):
            visit((key,), value)  # the common case
            continue
        try:
            _walk((key,), value, visit, note, plain_mappings_whole)
        except RecursionError:
            raise PlanError(
                f"the state dict is nested more deeply than Python can walk, below {str(key)!r}, "
                "or holds a container that is inside itself: save fewer levels"
            ) from None
    return flat, paths


def as_saved(paths: Mapping[str, Path]) -> dict[str, Path]:
    """The paths as metadata keeps them: keys of mappings as strings, positions as int."""
    return {
        fqn: path if TEXT.issuperset(map(type, path)) else as_saved_path(path)
        for fqn, path in paths.items()
    }


def as_saved_path(path: Path) -> Path:
    """One path as metadata keeps it."""
    return tuple(int(key) if isinstance(key, Position) else str(key) for key in path)


class Position(int):
    """A position in a list, as opposed to an integer key of a mapping."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


def set_element(root: Any, path: Path, value: Any) -> None:
    """Put the value at the path, making the containers that are missing.

    A string after a key means a mapping there, an int a list; lists grow with None.
    """
    container = root
    for key, after in pairwise(path):
        container = _enter(container, key, list if isinstance(after, int) else dict)
    if isinstance(container, list):
        _grow(container, path[-1])
    container[path[-1]] = value


def get_element(root: Any, path: Path, default: Any = None) -> Any:
    """The value at the path, or the default."""
    for key in path:
        if isinstance(root, list) and isinstance(key, int):
            if not 0 <= key < len(root):
                return default
        elif not isinstance(root, Mapping) or key not in root:
            return default
        root = root[key]
    return root


def _enter(container: Any, key: Any, kind: type[list[Any]] | type[dict[Any, Any]]) -> Any:
    if isinstance(container, list):
        _grow(container, key)
        if container[key] is None:
            container[key] = kind()
    elif key not in container:
        container[key] = kind()
    return container[key]


def _grow(values: list[Any], position: int) -> None:
    values.extend([None] * (position + 1 - len(values)))


def _walk(
    path: Path, value: Any, visit: Callable[[Path, Any], None], note: Note, whole: bool
) -> None:
    if isinstance(value, Mapping) and (not whole or _is_walked(value)):
        if not is_plain(value):
            _check_keys(path, value)
            note(path, value)
            if isinstance(value, PerRank):
                check_per_rank(".".join(map(str, path)), value.value)
        for key, inner in value.items():
            if isinstance(inner, torch.Tensor):
                visit((*path, key), inner)
            else:
                _walk((*path, key), inner, visit, note, whole)
    elif isinstance(value, list) and _holds(value, whole):
        if type(value) is not list:
            note(path, value)
        for position, inner in enumerate(value):
            _walk((*path, Position(position)), inner, visit, note, whole)
    else:
        visit(path, value)


def _check_keys(path: Path, mapping: Mapping[Any, Any]) -> None:
    """Raise ValueError if two keys of a mapping give the same string: their contents would be
    mixed."""
    key_of_text: dict[str, Any] = {}
    for key in mapping:
        other = key_of_text.setdefault(str(key), key)
        if other is not key:
            raise ValueError(
                f"duplicated flatten key {'.'.join(map(str, (*path, key)))!r}: both "
                f"{(*path, other)!r} and {(*path, key)!r} lead to it"
            )


def _is_walked(value: Mapping[Any, Any]) -> bool:
    """Whether a mapping is walked even if plain ones are kept whole."""
    return isinstance(value, PerRank) or _holds(value.values(), True)


def _holds(values: Any, whole: bool) -> bool:
    """Whether it contains something to walk to: a tensor, or a mapping that is not kept whole."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return True
        if isinstance(value, Mapping) and (not whole or _holds(value.values(), whole)):
            return True
        if isinstance(value, list) and _holds(value, whole):
            return True
    return False


ROOM_PER_KEY = 64
ROOM_AT_LEAST = 1 << 16
"""How many list positions a checkpoint's paths may need besides the ones they name: lists are
padded with None, and a path of a damaged file could ask for any number.
"""


_NOTHING = object()


class Room:
    """Puts values at paths from a file, with bounded list lengths."""

    def __init__(self, keys: int) -> None:
        self._spare_items = ROOM_AT_LEAST + ROOM_PER_KEY * keys

    def check_path(self, fqn: str, path: Any) -> Path:
        """The path; raises CheckpointCorruptError, naming the key, if it is not a valid one."""
        if isinstance(path, list):
            path = tuple(path)
        if not isinstance(path, tuple) or not path or not isinstance(path[0], str):
            raise CheckpointCorruptError(f"its path is {str(path)[:80]!r}", entry=fqn)
        if len(path) > sys.getrecursionlimit():
            raise CheckpointCorruptError(
                f"its path has {len(path)} keys, more levels than Python can walk", entry=fqn
            )
        for key in path:
            if type(key) is int:
                if not 0 <= key < self._spare_items:
                    raise CheckpointCorruptError(f"its path has position {key}", entry=fqn)
            elif type(key) is not str:
                raise CheckpointCorruptError(f"its path has a {type(key).__name__}", entry=fqn)
        return path

    def put(self, root: Any, fqn: str, path: Path, value: Any) -> None:
        """Put the value there; raises CheckpointCorruptError if another value is in the way."""
        container = root
        for depth, key in enumerate(path):
            container_type = list if isinstance(key, int) else dict
            if container is not None and not isinstance(container, container_type):
                raise CheckpointCorruptError(
                    f"its path {path!r} leads through another value at {path[:depth]!r}", entry=fqn
                )
            if container_type is list:
                self._spare_items -= max(0, key + 1 - len(container or ()))
            inner = _NOTHING if container is None else get_element(container, (key,), _NOTHING)
            below, exists = depth < len(path) - 1, inner is not _NOTHING
            # None is a hole in a list, and a value to be read in a mapping.
            if (
                exists
                and (isinstance(inner, list | dict) is not below)
                and (inner is not None or container_type is dict)
            ):
                raise CheckpointCorruptError(
                    f"its path {path!r} leads through another value at {path[: depth + 1]!r}",
                    entry=fqn,
                )
            container = inner if exists else None
        if self._spare_items < 0:
            raise CheckpointCorruptError("its path needs longer lists than it has", entry=fqn)
        set_element(root, path, value)
