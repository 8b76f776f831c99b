"""Names of files in Hugging Face folders, and which of them are one save. Pure (no I/O).

A save never overwrites a file of another: if the usual names are taken, its files get other names.
So wherever a save dies, the folder holds the old checkpoint or the new one:

1. every rank writes its files under temporary names, which no reader takes for a checkpoint's;
2. they get their final names, which no file had. With an index the old checkpoint is still in
   force, since the index names the old files. Without one, the files themselves decide: each says
   how many files its save has (`FILES_KEY`) and the number of its save (`NUMBER_KEY`), and the
   newest save with all files present is in force. The last renaming is then the instant of the
   change;
3. one rename replaces the old index by the new one; or the old one is removed, if the new save has
   none;
4. files of earlier saves are removed.

Between 2 and 4, readers that ignore the index and read all files of a folder find both saves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pytest_dcp._engine.format.safetensors_header import Header
from pytest_dcp.errors import CheckpointCorruptError

INDEX_NAME = "model.safetensors.index.json"
SUFFIX = ".safetensors"
TEMPORARY = ".tmp"
SAVE_KEY = "DCP_SAVE_ID"
"""In the files' `__metadata__` and in the index's `metadata`."""
FILES_KEY = "DCP_SAVE_FILES"
"""In the files' `__metadata__`: how many files the save has, in decimal."""
NUMBER_KEY = "DCP_SAVE_NUMBER"
"""In the files' `__metadata__`: one more than the number of the previous save in the folder."""

DATA_NAME = re.compile(
    r"(?P<shard>shard-\d{5,}-)?model-\d{5,}-of-(?P<count>\d{5,})(-[0-9a-f]+)?\.safetensors"
)
LEFT_OVER = re.compile(rf"({DATA_NAME.pattern}|{re.escape(INDEX_NAME)})-[0-9a-f]+\.tmp")
_COUNT = re.compile(r"[1-9]\d{0,11}")


def data_name(number: int, count: int, shard: int | None = None) -> str:
    """The name of file 1 to `count` of a checkpoint, or of one rank's shards."""
    name = f"model-{number:05d}-of-{count:05d}{SUFFIX}"
    return name if shard is None else f"shard-{shard:05d}-{name}"


def temporary_name(name: str, save_id: str) -> str:
    """The name of a file until its save is complete."""
    return f"{name}-{save_id}{TEMPORARY}"


def is_temporary(name: str) -> bool:
    """Whether a file has a temporary name, which it loses once its save is complete."""
    return name.endswith(TEMPORARY) and SUFFIX in name


def save_of(temporary: str) -> str:
    """The id of the save that a file is of."""
    return temporary.removesuffix(TEMPORARY).rpartition("-")[2]


def final_names(temporary: Collection[str], existing: Collection[str]) -> dict[str, str]:
    """Final names for temporary files, once their save is complete: names that no other file has.

    The usual names if none of them is taken, else all with the save's id in them.
    """
    usual = {name: name[: name.rindex(SUFFIX) + len(SUFFIX)] for name in temporary}
    found, n = usual, 0
    while not set(existing).isdisjoint(found.values()):
        # A planner that remembers plans may give the same id twice.
        more = f"{n:x}" if n else ""
        found = {
            name: f"{final.removesuffix(SUFFIX)}-{save_of(name)}{more}{SUFFIX}"
            for name, final in usual.items()
        }
        n += 1
    return found


def number_of(header: Header) -> int:
    """The number of the file's save; 0 if the file does not say."""
    return _stated_number(header, NUMBER_KEY) or 0


def _stated_number(header: Header, key: str) -> int | None:
    text = header.metadata.get(key, "")
    return int(text) if _COUNT.fullmatch(text) else None


@dataclass(frozen=True, slots=True)
class _Save:
    """Files grouped by save, according to their metadata."""

    headers: Mapping[str, Header]

    @property
    def files(self) -> int | None:
        """How many files the save has; None if the files do not give a number, or disagree."""
        stated = {_stated_number(header, FILES_KEY) for header in self.headers.values()}
        return stated.pop() if len(stated) == 1 else None

    @property
    def number(self) -> int:
        return max(map(number_of, self.headers.values()))

    @property
    def is_whole(self) -> bool:
        return self.files == len(self.headers)

    @property
    def is_foreign(self) -> bool:
        """Whether another program named its files."""
        return not all(map(DATA_NAME.fullmatch, self.headers))

    @property
    def is_sharded(self) -> bool:
        return any(name.startswith("shard-") for name in self.headers)


def files_of_newest_save(headers: Mapping[str, Header]) -> Mapping[str, Header]:
    """The files of the newest whole save in a folder without an index.

    All files, if none of them can be left out: the caller must check that they are of one save.
    Raises CheckpointCorruptError if files of the only save are missing.
    """
    by_id: dict[str | None, dict[str, Header]] = {}
    for name, header in headers.items():
        by_id.setdefault(header.metadata.get(SAVE_KEY), {})[name] = header
    saves = [_Save(some) for some in by_id.values()]
    counted = [save for save in saves if save.files is not None]
    others = [save for save in saves if save.files is None]
    whole = sorted((save for save in counted if save.is_whole), key=lambda save: save.number)
    if not others and counted and not whole:
        _refuse_unfinished(counted[0])
    if len(others) == 1 and (not whole or others[0].is_foreign):
        # Whole tensors get an index: without one their save has not been committed.
        if not any(save.is_sharded for save in whole):
            return others[0].headers
        return headers
    alone = len(whole) == 1 or (len(whole) > 1 and whole[-1].number > whole[-2].number)
    return whole[-1].headers if alone and len(others) <= 1 else headers


def _refuse_unfinished(save: _Save) -> None:
    raise CheckpointCorruptError(
        f"expected the {save.files} files of this save, got {len(save.headers)}, and no other save "
        "is whole: the save did not end, or files were removed",
        file=min(save.headers),
    )
