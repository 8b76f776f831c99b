"""The folders of any run, in the order of the numbers at the end of their names.

Every trainer names its checkpoints in its own way: `step-00000100`, `checkpoint-100`,
`iter_0000100`, `global_step100`. All end in a number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint, open_checkpoint
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
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    """For the file system of the URL."""

    def open(self) -> OpenCheckpoint:
        """The checkpoint in it. Raises as `open_checkpoint`."""
        return open_checkpoint(self.path, storage_options=self.storage_options)


def find_numbered_folders(
    run: str | os.PathLike[str],
    pattern: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[NumberedFolder]:
    """The folders, by ascending number.

    pattern: of their names, shell-style. None: `step-*`, if there are such folders; else all that
        end in a number.
    storage_options: for the file system of a URL.

    Raises FileNotFoundError if there are none, and ValueError if their numbers do not order them:
    two are equal, or the names differ in more than the number.
    """
    options = dict(storage_options or {})
    folders = RunPlace(run, options).open_folders()
    chosen = choose_numbered(folders.folder_names(), pattern)
    if not chosen:
        matching = "" if pattern is None else f" that {pattern!r} matches"
        raise FileNotFoundError(
            f"{os.fspath(run)} has no folders with a number at the end{matching}"
        )
    return [NumberedFolder(name, number, folders.path_of(name), options) for number, name in chosen]


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
