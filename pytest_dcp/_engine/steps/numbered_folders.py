"""The folders of any run, in the order of the numbers at the end of their names.

Every trainer names its checkpoints in its own way: `step-00000100`, `checkpoint-100`,
`iter_0000100`, `global_step100`. All end in a number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pytest_dcp._engine.steps.run_place import RunPlace

NUMBERED = re.compile(r"(.*?)(\d{1,18})")
STEP = "step-"
"""The prefix of `CheckpointManager` and torchtitan, which is preferred to others."""


@dataclass(frozen=True, slots=True)
class NumberedFolder:
    """One folder of a run."""

    name: str
    number: int
    path: Any
    """A Path, or a URL."""


def find_numbered_folders(
    run: str | os.PathLike[str], pattern: str | None = None
) -> list[NumberedFolder]:
    """The folders, by ascending number.

    pattern: of their names, shell-style. None: `step-*`, if there are such folders; else all that
        end in a number.

    Raises FileNotFoundError if there are none, and ValueError if their numbers do not order them:
    two are equal, or the names differ in more than the number.
    """
    folders = RunPlace(run).open_folders()
    chosen = choose_numbered(folders.folder_names(), pattern)
    if not chosen:
        matching = "" if pattern is None else f" that {pattern!r} matches"
        raise FileNotFoundError(
            f"{os.fspath(run)} has no folders with a number at the end{matching}"
        )
    return [NumberedFolder(name, number, folders.path_of(name)) for number, name in chosen]


def choose_numbered(names: Sequence[str], pattern: str | None) -> list[tuple[int, str]]:
    """Numbers and names, ascending. Pure. Raises ValueError as `find_numbered_folders`.

    >>> choose_numbered(["checkpoint-20", "checkpoint-3", "logs"], None)
    [(3, 'checkpoint-3'), (20, 'checkpoint-20')]
    >>> choose_numbered(["step-7", "old-1"], None)
    [(7, 'step-7')]
    """
    matches = [match for name in names if (match := NUMBERED.fullmatch(name))]
    if pattern is not None:
        matches = [match for match in matches if fnmatchcase(match[0], pattern)]
    elif any(match[1] == STEP for match in matches):
        matches = [match for match in matches if match[1] == STEP]
    by_number: dict[int, str] = {}
    prefixes: dict[str, str] = {}
    for match in matches:
        prefixes.setdefault(match[1], match[0])
        if (other := by_number.setdefault(int(match[2]), match[0])) != match[0]:
            raise ValueError(f"{other!r} and {match[0]!r} have the same number: choose one kind")
    if len(prefixes) > 1:
        examples = ", ".join(map(repr, list(prefixes.values())[:5]))
        raise ValueError(
            f"the folders are of several kinds, such as {examples}: choose one with a pattern "
            "(--folders)"
        )
    return sorted(by_number.items())
