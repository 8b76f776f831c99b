"""Describes the containers of a nested state dict in addition to its flat names. Pure (no I/O).

A flat name gives the keys as strings, and shows neither empty containers nor classes other than
plain dicts. This module describes these in JSON. A rank sends its description with its plan, as one
more path (`DESCRIPTION`); the coordinator joins them (`DescribedPaths`), and the manifest keeps the
text with the planner's paths. So `Metadata` and its pickle are the same as torch's, and readers
that do not know the description skip it. Checkpoints whose containers are plain dicts with string
keys have none.

One entry per container:

    path    keys as strings, positions in lists as ints
    kind    one of KINDS, or "?" and the full name of any other class
    empty   true where nothing is in it
    keys    "int" where all are ints; else [string, typed key] of each that is no string
    order   of an ordered kind that holds containers, which may be empty: its keys as strings
    factory of a defaultdict
"""

from __future__ import annotations

import builtins
import importlib
import json
from collections import Counter, OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pytest_dcp._engine.plan.per_rank import RANK_KEY, PerRank
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError

DESCRIPTION = "pytest_dcp:containers"
Path = tuple[Any, ...]
Entry = dict[str, Any]


class DescribedPaths(dict[str, Path]):
    """The planner's paths by flat name, and the description of their containers.

    It is pickled as the plain dict that it equals.
    """

    def __init__(self, paths: Mapping[str, Path], description: str) -> None:
        super().__init__(paths)
        self.description = description

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def description_of(planner_data: object) -> str | None:
    """The text that describes the containers of these paths, if there is one."""
    text = getattr(planner_data, "description", None)
    return text if isinstance(text, str) else None


_STRINGS = frozenset({str})
_ORDERED = frozenset({"OrderedDict"})
_FACTORIES = ("list", "dict", "set", "int", "float", "str", "tuple", "bool", "bytes", "complex")
_UNKNOWN = "?"


def _by_rank(items: Mapping[Any, Any]) -> dict[int, Any]:
    """The values of a PerRank that each rank saved, by rank."""
    found = {key: RANK_KEY.fullmatch(str(key)) for key in items}
    return {int(match[1]): items[key] for key, match in found.items() if match is not None}


KINDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "dict": (dict, lambda items: items),
    "OrderedDict": (OrderedDict, OrderedDict),
    "Counter": (Counter, Counter),
    "defaultdict": (defaultdict, lambda items: items),
    "UserDict": (UserDict, UserDict),
    "mappingproxy": (MappingProxyType, MappingProxyType),
    "PerRank": (PerRank, _by_rank),
    "list": (list, lambda items: items),
}
"""By name: the class, and a function that makes one from a plain dict or list."""
_NAME_OF = {kind: name for name, (kind, _) in KINDS.items()}


# ---- describing


def is_plain(container: Mapping[Any, Any]) -> bool:
    """Whether the flat names of the mapping's items describe it completely."""
    return type(container) is dict and bool(container) and _STRINGS.issuperset(map(type, container))


def describe(containers: Iterable[tuple[Path, Any]]) -> str | None:
    """The description of these containers, by their paths as saved; None if there are none."""
    entries = [_entry(list(path), container) for path, container in containers]
    return json.dumps(entries, separators=(",", ":")) if entries else None


def _entry(path: list[Any], container: Any) -> Entry:
    kind = type(container)
    name = _NAME_OF.get(kind, f"{_UNKNOWN}{kind.__module__}.{kind.__qualname__}")
    entry: Entry = {"path": path, "kind": name}
    if not len(container):
        entry["empty"] = True
    if not isinstance(container, Mapping):
        return entry
    if not _STRINGS.issuperset(map(type, container)):
        entry["keys"] = _keys(container)
    if name in _ORDERED and any(isinstance(v, Mapping | list) for v in container.values()):
        entry["order"] = [str(key) for key in container]
    if isinstance(container, defaultdict):
        factory = container.default_factory
        name = getattr(factory, "__name__", "")
        if factory is None or (name in _FACTORIES and getattr(builtins, name) is factory):
            entry["factory"] = name or None
        else:
            entry["kind"] = f"{_UNKNOWN}collections.defaultdict of {factory!r}"
    return entry


def _keys(container: Mapping[Any, Any]) -> Any:
    if all(type(key) is int for key in container):
        return "int"
    return [[str(key), _encode_key(key)] for key in container if type(key) is not str]


def _encode_key(key: Any) -> list[Any]:
    kind = type(key)
    if kind in (str, bool):
        return [kind.__name__, key]
    if kind in (int, float):
        return [kind.__name__, repr(key)]
    if key is None:
        return ["None"]
    if kind is bytes:
        return ["bytes", key.decode("latin1")]
    if kind is tuple:
        return ["tuple", [_encode_key(part) for part in key]]
    return [_UNKNOWN, f"{kind.__module__}.{kind.__qualname__}"]


def merge_descriptions(texts: Iterable[str]) -> str | None:
    """Joins the descriptions of several ranks; for each container the first one counts."""
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < 2:
        return distinct[0] if distinct else None
    merged: dict[str, Entry] = {}
    for text in distinct:
        for entry in json.loads(text):
            before = merged.setdefault(json.dumps(entry["path"]), entry)
            if before is entry:
                continue
            if not entry.get("empty"):
                before.pop("empty", None)
            if isinstance(before.get("keys"), list) and isinstance(entry.get("keys"), list):
                before["keys"] += [pair for pair in entry["keys"] if pair not in before["keys"]]
    return json.dumps(list(merged.values()), separators=(",", ":"))


def paths_of_kind(text: str, kind: str | None = None) -> frozenset[Path]:
    """Where the description has containers of these kinds; None: of any kind."""
    if kind is not None and f'"{kind}"' not in text:
        return frozenset()
    entries = json.loads(text)
    return frozenset(tuple(e["path"]) for e in entries if kind in (None, e["kind"]))


def alike(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A container of these items with the original's description: of its class if that is known."""
    name = _NAME_OF.get(type(original), "dict")
    if isinstance(original, defaultdict):
        return defaultdict(original.default_factory, items)
    return KINDS[name][1](items)


# ---- giving back


class Description:
    """A checkpoint's description of its containers."""

    def __init__(self, text: str | None) -> None:
        """Raises CheckpointCorruptError for a text that is not a description."""
        self._entries: dict[Path, Entry] = {}
        self._above: set[Path] = set()
        for entry in _parse_entries(text) if text is not None else ():
            path = tuple(entry["path"])
            self._entries[path] = entry
            self._above.update(path[:depth] for depth in range(len(path)))

    def rebuilt(
        self, root: dict[str, Any], included: Callable[[Path], bool], *, trusted: bool
    ) -> dict[Any, Any]:
        """The state dict of plain dicts and lists with the containers and keys that were saved.

        included: whether an empty container at this path is wanted. trusted: make containers of any
        class, which is imported and called with the items.

        Raises CheckpointMismatchError, naming each, for containers and keys of unknown classes,
        unless `trusted`; CheckpointCorruptError where the description does not fit.
        """
        for path, entry in self._entries.items():
            if entry.get("empty") and path and included(path):
                _put_empty(root, path, [] if entry["kind"] == "list" else {})
        refused: list[str] = []
        state_dict = self._rebuild(root, (), refused, trusted)
        if refused:
            raise CheckpointMismatchError(
                f"{len(refused)} container(s) or key(s) cannot be given back as they were saved:\n"
                + "\n".join(refused[:20])
                + "\nLoad into a state dict that has them, or only other keys, or pass "
                "weights_only=False if you trust the checkpoint's writer"
            )
        return state_dict if isinstance(state_dict, dict) else root

    def _rebuild(self, value: Any, path: Path, refused: list[str], trusted: bool) -> Any:
        entry = self._entries.get(path)
        if (entry is None and path not in self._above) or not isinstance(value, dict | list):
            return value
        if isinstance(value, list):
            parts: Any = [
                self._rebuild(v, (*path, at), refused, trusted) for at, v in enumerate(value)
            ]
        else:
            name = _key_names(entry, value, refused, path)
            order = [k for k in (entry or {}).get("order", ()) if k in value]
            keys = [*order, *(k for k in value if k not in set(order))]
            parts = {name[k]: self._rebuild(value[k], (*path, k), refused, trusted) for k in keys}
        return parts if entry is None else _of_kind(entry, parts, path, refused, trusted)


def _put_empty(root: Any, path: Path, empty: Any) -> None:
    """Put an empty container at a path that is free; its parents are made as plain dicts and
    lists."""
    container = root
    for depth, key in enumerate(path):
        deeper = path[depth + 1 :]
        element: Any = empty if not deeper else [] if type(deeper[0]) is int else {}
        if isinstance(container, list) and type(key) is int and key >= 0:
            if key > len(container):
                return  # beyond the loaded items of the list
            if key == len(container):
                container.append(None)
            if container[key] is None:
                container[key] = element
        elif isinstance(container, dict) and type(key) is str:
            container.setdefault(key, element)
        else:
            raise CheckpointCorruptError(f"the container at {path!r:.200} is below a value")
        container = container[key]


def _key_names(
    entry: Entry | None, value: Mapping[str, Any], refused: list[str], path: Path
) -> dict[str, Any]:
    """The original keys, by the strings that represent them."""
    stored_keys = (entry or {}).get("keys", [])
    if stored_keys == "int":
        # A key that is not an int here is from a rank whose own keys were strings.
        return {key: int(key) if _is_int(key) else key for key in value}
    typed_keys: dict[str, Any] = dict(stored_keys)
    names: dict[str, Any] = {}
    for key in value:
        typed = typed_keys.get(key)
        if typed is not None and typed[0] == _UNKNOWN:
            refused.append(f"{_name((*path, key))!r}: the key is a {typed[1]}")
        names[key] = key if typed is None or typed[0] == _UNKNOWN else _decode_key(typed)
    return names


def _is_int(text: str) -> bool:
    return len(text) < 1000 and text.removeprefix("-").isdigit() and str(int(text)) == text


def _decode_key(typed: Sequence[Any]) -> Any:
    kind, *rest = typed
    if kind == "None":
        return None
    (text,) = rest
    if kind == "tuple":
        return tuple(_decode_key(part) for part in text)
    if kind == "bytes":
        return str(text).encode("latin1")
    if kind in ("int", "float", "str"):
        return {"int": int, "float": float, "str": str}[kind](text)
    if kind == "bool" and type(text) is bool:
        return text
    raise ValueError(f"a key of kind {kind!r:.80}")


def _of_kind(entry: Entry, parts: Any, path: Path, refused: list[str], trusted: bool) -> Any:
    kind = entry["kind"]
    if kind.startswith(_UNKNOWN):
        if not trusted:
            refused.append(f"{_name(path)!r} is a {kind.removeprefix(_UNKNOWN)}")
            return parts
        return _import_class(kind.removeprefix(_UNKNOWN))(parts)
    expected, make = KINDS[kind]
    if isinstance(parts, list) is not (expected is list):
        raise CheckpointCorruptError(f"the container at {path!r:.200} is no {kind}")
    if expected is defaultdict:
        factory = entry.get("factory")
        return defaultdict(None if factory is None else getattr(builtins, factory), parts)
    return make(parts)


def _import_class(name: str) -> Any:
    module, _, inside = name.rpartition(".")
    return getattr(importlib.import_module(module), inside)


def _name(path: Path) -> str:
    return ".".join(map(str, path)) or "the state dict"


def _parse_entries(text: str) -> list[Entry]:
    try:
        entries = json.loads(text)
        for entry in entries:
            _check_entry(entry)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointCorruptError(
            f"expected a description of the containers, got {error!r:.200}"
        ) from None
    return list(entries)


def _check_entry(entry: Any) -> None:
    if not all(type(part) in (str, int) for part in entry["path"]):
        raise ValueError(f"a path that is {entry['path']!r:.80}")
    kind, keys = entry["kind"], entry.get("keys", [])
    if kind not in KINDS and not str(kind).startswith(_UNKNOWN):
        raise ValueError(f"a container of kind {kind!r:.80}")
    if entry.get("factory") not in (None, *_FACTORIES) and kind == "defaultdict":
        raise ValueError(f"a factory {entry['factory']!r:.80}")
    if keys != "int":
        for name, typed in keys:
            if type(name) is not str:
                raise ValueError(f"a key {name!r:.80}")
            if typed[0] != _UNKNOWN:
                hash(_decode_key(typed))
    if not all(type(key) is str for key in entry.get("order", ())):
        raise ValueError("an order of keys that are no strings")
