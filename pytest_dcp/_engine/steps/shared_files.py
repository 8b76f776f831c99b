"""Data files that steps of a run share in an object store, which has no hard links.

    run/shared-data/__0_0-SAVE.distcp    the data files of all incremental steps of the run
    run/shared-data.metadata             the ledger: which step has which of them
    run/step-00000100/.metadata          names them as ../shared-data/__0_0-SAVE.distcp

A file is never moved or written twice; a later step names it again. It is removed with the last
step that has it. The ledger says which that is: a listing, which may be out of date, decides
nothing. It is read and replaced by its key, in one request each, by the coordinator alone.

One rule holds at every instant: **the ledger has each file that the index of a step names**, under
that step. It may have more. So a file that the ledger has under no other step can be removed:

    save      the ledger gets the step, with all files of the earlier step, and the save's id
              data files are written, under names of this save alone
              the ledger gets the files that the new index will name
              the index is put: the step is there
              the ledger gets the index's files alone, and no save any more
    removal   the index is removed: the step is gone
              its files are removed, unless the ledger has them under another step
              the ledger loses the step
              the step's other objects are removed, last of them the note of the removal

A crash leaves a ledger that has too much, and perhaps files that no index names. The next save
removes the files of a crashed one, by the id in the ledger; a later removal ends a removal. Files
that a listing has hidden from them are left to `gc` (`find_unnamed_files`), which changes no
ledger. It keeps the files that the ledger has under a step that is there or is being saved, and all
files of the save whose id the ledger has: so it cannot disturb a save that is under way.

A step that the ledger lacks is not referred to, and a removal of it leaves its files: so a ledger
that is lost or damaged costs space, and no data.

Assumes, as steps in stores do anyway, that one job saves and removes in a run; and that a store's
answer to a read by key is current.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from pytest_dcp._engine.format.shared_names import (
    SHARED_FOLDER,
    own_name,
    save_part,
    shared_name,
)
from pytest_dcp._engine.io.commit import METADATA
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.steps.small_files import read_small, write_small
from pytest_dcp._engine.steps.step_names import step_name
from pytest_dcp._engine.storages.folder_metadata import files_named

LEDGER = f"{SHARED_FOLDER}{METADATA}"
"""A name of metadata: an object disk reads and puts these in one request."""
MOST_LEDGER_BYTES = 256 << 20
Names = frozenset[str]


@dataclass(frozen=True, slots=True)
class Ledger:
    """Which step has which shared files, by their names in the folder of these. Pure."""

    files: Mapping[int, Names] = field(default_factory=dict)
    saving: tuple[int, str] | None = None
    """The step of the save that has begun last, and its part of file names, until it has ended."""

    def others(self, step: int) -> Names:
        """The files of all steps but this one."""
        return Names().union(*(names for number, names in self.files.items() if number != step))

    def with_step(self, step: int, names: Iterable[str], saving: tuple[int, str] | None) -> Ledger:
        """The ledger with just these files of a step."""
        return Ledger({**self.files, step: Names(names)}, saving)

    def without_step(self, step: int) -> Ledger:
        """The ledger without the step, and without a save of it."""
        files = {number: names for number, names in self.files.items() if number != step}
        return Ledger(files, None if self.saving and self.saving[0] == step else self.saving)

    def to_bytes(self) -> bytes:
        """As JSON, in which each name is there once."""
        names = sorted(Names().union(*self.files.values()))
        number = {name: at for at, name in enumerate(names)}
        steps = {str(step): sorted(number[n] for n in own) for step, own in self.files.items()}
        return json.dumps({"names": names, "steps": steps, "saving": self.saving}).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Ledger | None:
        """Inverse of `to_bytes`; None for anything else, of which nothing is believed."""
        with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raw = json.loads(data)
            names = [str(name) for name in raw["names"]]
            if any(own_name(shared_name(name)) is None for name in names):
                return None
            steps = {int(n): Names(names[at] for at in own) for n, own in raw["steps"].items()}
            saving = raw["saving"]
            return Ledger(steps, None if saving is None else (int(saving[0]), str(saving[1])))
        return None


def read_ledger(root: Folder) -> Ledger | None:
    """The ledger of a run; None if it has none, or a damaged one."""
    return Ledger.from_bytes(read_small(root, LEDGER, MOST_LEDGER_BYTES))


def own_names(names: Iterable[str]) -> Names:
    """The names of shared files among names in an index, as they are in the folder of these."""
    return Names(own for own in map(own_name, names) if own is not None)


@dataclass(frozen=True, slots=True)
class SharedFiles:
    """The shared files of a run, from the view of one step. The coordinator's alone to change."""

    root: Folder
    """Of the run."""
    step: int

    @property
    def folder(self) -> Folder:
        """Of the step."""
        return self.root.below(step_name(self.step))

    def begin_save(self, save: str, earlier: int | None) -> None:
        """Enter the save, with all files of the earlier step; end a save that has crashed."""
        self._pool().make()
        ledger = read_ledger(self.root) or Ledger()
        if ledger.saving is not None:
            ledger = self._end_crashed_save(ledger, ledger.saving)
        before = ledger.files.get(self.step, Names()) if self.folder.exists(METADATA) else Names()
        if earlier is not None:
            before |= ledger.files.get(earlier, Names())
        self._write(ledger.with_step(self.step, before, (self.step, save)))

    def note_files(self, save: str, names: Iterable[str]) -> None:
        """Enter the files that the index, which is put next, names."""
        ledger = read_ledger(self.root) or Ledger()
        noted = ledger.files.get(self.step, Names()) | own_names(names)
        self._write(ledger.with_step(self.step, noted, (self.step, save)))

    def end_save(self) -> None:
        """Enter the files of the index alone; remove files that only the step had before."""
        ledger = read_ledger(self.root)
        if ledger is not None and self.step in ledger.files:
            self._write(self._settle(ledger))

    def remove_step(self) -> None:
        """Remove the files that only this step has; its index is gone."""
        ledger = read_ledger(self.root)
        if ledger is None:
            return
        if ledger.saving is not None and ledger.saving[0] == self.step:
            self._write(self._end_crashed_save(ledger, ledger.saving))
        elif self.step in ledger.files:
            self._write(self._without_files(ledger, ledger.files[self.step]))

    def _end_crashed_save(self, ledger: Ledger, saving: tuple[int, str]) -> Ledger:
        step, save = saving
        crashed = SharedFiles(self.root, step)
        if crashed.folder.exists(METADATA):
            return crashed._settle(ledger)
        listed = {name for name in self._pool().names() if save_part(shared_name(name)) == save}
        return crashed._without_files(ledger, ledger.files.get(step, Names()) | listed)

    def _settle(self, ledger: Ledger) -> Ledger:
        in_index = own_names(files_named(self.folder, METADATA))
        self._remove(ledger.files.get(self.step, Names()) - in_index - ledger.others(self.step))
        saving = ledger.saving if ledger.saving and ledger.saving[0] != self.step else None
        return ledger.with_step(self.step, in_index, saving)

    def _without_files(self, ledger: Ledger, names: Names) -> Ledger:
        self._remove(names - ledger.others(self.step))
        return ledger.without_step(self.step)

    def _remove(self, names: Iterable[str]) -> None:
        pool = self._pool()
        for name in sorted(names):
            pool.remove(name)

    def _write(self, ledger: Ledger) -> None:
        write_small(self.root, LEDGER, ledger.to_bytes())

    def _pool(self) -> Folder:
        return self.root.below(SHARED_FOLDER)
