"""The default planner's paths (`planner_data`) in a few bytes per key. Pure (no I/O).

The default planner keeps, for each flat name, the keys that lead to the value: strings, and
positions in lists as ints. The name is the path's parts joined with dots, so the name and the
path's **form** rebuild it: for each part how many of the name's dot-separated words it takes, or -1
for an int. A thousand keys have a handful of forms. Paths that do not join to their name are kept
in full. With them goes the description of their containers (`plan.containers`), if any; files of
older versions lack it.

`PathTable` looks like the dict it stands for and makes each path when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pytest_dcp._engine.plan.containers import DescribedPaths, description_of
from pytest_dcp._engine.plan.lazy_containers import LazyDict
from pytest_dcp._engine.plan.packed_names import Fqns, PackedNames
from pytest_dcp.errors import CheckpointCorruptError

Path = tuple[str | int, ...]
Form = tuple[int, ...]
"""How many words of the name each part of the path takes, at least 1; -1: one word that is an
int."""
_NO_PATH = -1
_TEXT = frozenset((str,))


class PathTable(LazyDict[str, Path]):
    """Paths by name, made on demand. Equal to the dict it stands for, and pickled as one."""

    __slots__ = ("_row_of", "description", "extra", "form_of", "forms", "fqns")

    def __init__(
        self,
        fqns: Fqns | PackedNames,
        form_of: NDArray[np.int32],
        forms: tuple[Form, ...],
        extra: dict[str, Path],
        description: str | None = None,
    ) -> None:
        """form_of: (n,) positions in `forms`; -1: the name is in `extra` or has no path.

        description: of the containers that the paths lead through, if the paths do not say it all.
        """
        super().__init__()
        self.fqns, self.form_of, self.forms, self.extra = fqns, form_of, forms, extra
        self.description = description
        self._row_of: dict[str, int] | None = None
        # json treats a dict subclass as empty if its own storage is empty.
        for row in np.flatnonzero(form_of >= 0)[:1].tolist():
            dict.__setitem__(self, _name_at(fqns, row), self._path(row))
        for fqn in islice(extra, 1):
            dict.__setitem__(self, fqn, extra[fqn])

    @property
    def row_of(self) -> dict[str, int]:
        """The row of each name that has a form, and -1 for the names in `extra`."""
        if self._row_of is None:
            rows = np.flatnonzero(self.form_of >= 0).tolist()
            self._row_of = {_name_at(self.fqns, row): row for row in rows}
            self._row_of.update(dict.fromkeys(self.extra, _NO_PATH))
        return self._row_of

    def lazy_keys(self) -> Collection[str]:
        return self.row_of.keys()

    def make_value(self, key: str) -> Path:
        row = self.row_of[key]
        return self.extra[key] if row < 0 else self._path(row)

    def _path(self, row: int) -> Path:
        return _checked_path_of(_name_at(self.fqns, row), self.forms[self.form_of[row]])


def _name_at(fqns: Fqns | PackedNames, row: int) -> str:
    try:
        return fqns[row]
    except ValueError as error:
        raise CheckpointCorruptError(f"expected a name, got {error!r:.200}") from None


def path_of(fqn: str, form: Form) -> Path:
    """The path of this form that joins to the name. Raises ValueError if there is none."""
    words = fqn.split(".")
    if sum(map(abs, form)) != len(words):
        raise ValueError(f"expected a form of {len(words)} words for {fqn!r}, got {form}")
    path: list[str | int] = []
    at = 0
    for width in form:
        end = at + abs(width)
        part = ".".join(words[at:end])
        path.append(_int_of(part) if width < 0 else part)
        at = end
    return tuple(path)


def _int_of(word: str) -> int:
    number = int(word)
    if str(number) != word:
        raise ValueError(f"expected an int as it is printed, got {word!r}")
    return number


def form_of(fqn: str, path: Path) -> Form | None:
    """The form that rebuilds the path from the name, or None if there is none."""
    if len(path) == 1 and path[0] == fqn:
        return (fqn.count(".") + 1,)
    if not path or ".".join(map(str, path)) != fqn:
        return None
    return tuple(part.count(".") + 1 if isinstance(part, str) else -1 for part in path)


def pack_paths(planner_data: object, fqns: Fqns) -> tuple[NDArray[np.int32], bytes] | None:
    """The form of each name and a JSON text of the rest, or None if these are not plain paths."""
    if type(planner_data) not in (dict, PathTable, DescribedPaths):
        return None
    paths = dict(planner_data)  # type: ignore[call-overload]  # one of the two mappings above
    if not (_TEXT.issuperset(map(type, paths)) and all(map(_is_path, paths.values()))):
        return None
    form_numbers: dict[Form, int] = {}
    rows = np.full(len(fqns), _NO_PATH, dtype=np.int32)
    for row, fqn in enumerate(fqns):
        form = form_of(fqn, paths[fqn]) if fqn in paths else None
        if form is not None:
            rows[row] = form_numbers.setdefault(form, len(form_numbers))
            del paths[fqn]
    extra = [[fqn, [int(p) if isinstance(p, int) else p for p in paths[fqn]]] for fqn in paths]
    document: dict[str, Any] = {"forms": list(form_numbers), "extra": extra}
    description = description_of(planner_data)
    if description is not None:
        document["containers"] = description
    text = json.dumps(document, separators=(",", ":"))
    if extra and json.loads(text)["extra"] != extra:  # JSON joins halves of surrogate pairs
        return None
    return rows, text.encode()


def _is_path(path: object) -> bool:
    if type(path) is not tuple:
        return False
    return _TEXT.issuperset(map(type, path)) or all(
        isinstance(part, int) and type(part) is not bool if type(part) is not str else True
        for part in path
    )


def unpack_paths(
    fqns: Fqns | PackedNames,
    rows: NDArray[np.int32],
    text: bytes,
    *,
    check_each: bool = True,
) -> PathTable:
    """The paths of `pack_paths`.

    check_each: check now that each form fits its name; otherwise when its path is made.

    Raises:
        CheckpointCorruptError: a form does not fit its name, or the bytes are not paths.
    """
    try:
        document = json.loads(text)
        forms = tuple(_checked_form(form) for form in document["forms"])
        extra = {fqn: _checked_path(fqn, path) for fqn, path in document["extra"]}
        description = _checked_text(document.get("containers"))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointCorruptError(f"expected the planner's paths, got {error!r:.200}") from None
    if rows.size and not (rows.min() >= _NO_PATH and rows.max() < len(forms)):
        raise CheckpointCorruptError(f"expected forms of paths below {len(forms)}, got others")
    if check_each and isinstance(fqns, tuple):
        _check_forms(fqns, rows, forms)
    formed = {_name_at(fqns, row) for row in np.flatnonzero(rows >= 0).tolist()} if extra else set()
    if len(extra) != len(document["extra"]) or not extra.keys().isdisjoint(formed):
        raise CheckpointCorruptError("expected one path a key of the planner, got two of some")
    return PathTable(fqns, rows, forms, extra, description)


def _check_forms(fqns: Fqns, rows: NDArray[np.int32], forms: Sequence[Form]) -> None:
    widths = [sum(map(abs, form)) for form in forms]
    positions = [_int_positions(form) for form in forms]
    ints: set[str] = set()  # words that are ints as they are printed; names share most of them
    for fqn, row in zip(fqns, rows.tolist(), strict=True):
        if row < 0 or (not positions[row] and widths[row] == fqn.count(".") + 1):
            continue
        words = fqn.split(".")
        if len(words) == widths[row] and all(words[at] in ints for at in positions[row]):
            continue
        _checked_path_of(fqn, forms[row])
        ints.update(words[at] for at in positions[row])


def _int_positions(form: Form) -> list[int]:
    """Which words of a name are ints."""
    ends = np.abs(form).cumsum().tolist()
    return [end - 1 for width, end in zip(form, ends, strict=True) if width < 0]


def _checked_path_of(fqn: str, form: Form) -> Path:
    try:
        return path_of(fqn, form)
    except ValueError as error:
        raise CheckpointCorruptError(f"{error}"[:200], entry=fqn) from None


def _checked_text(text: object) -> str | None:
    if text is not None and not isinstance(text, str):
        raise TypeError(f"a description that is {text!r:.80}")
    return text


def _checked_form(form: object) -> Form:
    if not isinstance(form, list) or not form:
        raise TypeError(f"a form that is {form!r:.80}")
    for width in form:
        if type(width) is not int or width == 0 or width < -1:
            raise TypeError(f"a form with {width!r:.80}")
    return tuple(form)


def _checked_path(fqn: object, path: object) -> Path:
    if type(fqn) is not str or not isinstance(path, list):
        raise TypeError(f"a path that is {path!r:.80} of {fqn!r:.80}")
    for part in path:
        if type(part) not in (str, int):
            raise TypeError(f"a path with {part!r:.80}")
    return tuple(path)
