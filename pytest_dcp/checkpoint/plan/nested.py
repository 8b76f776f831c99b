"""Nested state dicts as flat ones, and back. Pure (no I/O).

Mappings are walked always; lists only when a tensor or a mapping is somewhere inside; tuples and
everything else are values. A flat name is the path's keys joined with dots. Checkpoints of torch
before 2.4 also kept a mapping without tensors as one value: `plain_mappings_whole` walks so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch

Path = tuple[Any, ...]
"""The keys from the root to a value: a mapping's own keys, and positions in lists."""


def flatten(
    state_dict: Mapping[Any, Any], *, plain_mappings_whole: bool = False
) -> tuple[dict[str, Any], dict[str, Path]]:
    """The values by flat name, and the path of each.

    Raises ValueError when two paths give one name.
    """
    flat: dict[str, Any] = {}
    paths: dict[str, Path] = {}

    def visit(path: Path, value: Any) -> None:
        fqn = ".".join(map(str, path))
        if fqn in flat:
            raise ValueError(
                f"duplicated flatten key {fqn!r}: both {paths[fqn]!r} and {path!r} lead to it"
            )
        flat[fqn] = value
        paths[fqn] = path

    for key, value in state_dict.items():
        _walk((key,), value, visit, plain_mappings_whole)
    return flat, paths


def as_saved(paths: Mapping[str, Path]) -> dict[str, Path]:
    """The paths as metadata keeps them: keys of mappings as strings, positions as int."""
    return {
        fqn: path if all(type(key) is str for key in path) else _stringly(fqn, path)
        for fqn, path in paths.items()
    }


def _stringly(fqn: str, path: Path) -> Path:
    return tuple(int(key) if isinstance(key, Position) else str(key) for key in path)


class Position(int):
    """A position in a list, told from an integer key of a mapping."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)


def set_element(root: Any, path: Path, value: Any) -> None:
    """Put the value at the path, making the containers that are missing.

    A string after a key means a mapping there, an int a list; lists grow with None.
    """
    container = root
    for key, after in pairwise(path):
        container = _entered(container, key, list if isinstance(after, int) else dict)
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


def _entered(container: Any, key: Any, kind: type[list[Any]] | type[dict[Any, Any]]) -> Any:
    if isinstance(container, list):
        _grow(container, key)
        if container[key] is None:
            container[key] = kind()
    elif key not in container:
        container[key] = kind()
    return container[key]


def _grow(values: list[Any], position: int) -> None:
    values.extend([None] * (position + 1 - len(values)))


def _walk(path: Path, value: Any, visit: Callable[[Path, Any], None], whole: bool) -> None:
    if isinstance(value, Mapping) and not (whole and not _holds(value.values(), whole)):
        for key, inner in value.items():
            _walk((*path, key), inner, visit, whole)
    elif isinstance(value, list) and _holds(value, whole):
        for position, inner in enumerate(value):
            _walk((*path, Position(position)), inner, visit, whole)
    else:
        visit(path, value)


def _holds(values: Any, whole: bool) -> bool:
    """Whether something inside must be walked to: a tensor; a mapping, unless kept whole."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return True
        if isinstance(value, Mapping) and (not whole or _holds(value.values(), whole)):
            return True
        if isinstance(value, list) and _holds(value, whole):
            return True
    return False
