"""The tester is tested: savers with one thing wrong each are all found out, a right one is not.

The savers keep named bytes: data files and an index of them. Each step of the right one can be left
out or done wrongly. Four searches are made of each: the crash states of a save over an older one, a
save after every crash, faults while it saves, and damage at rest.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter as TorchWriter
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

import pytest_dcp.checkpoint as dcp
from pytest_dcp.faults import FaultyStorage, NoSpace, ShortWrite, recorded
from pytest_dcp.faults.crash_models import MODELS
from pytest_dcp.faults.crashes.crash_state import loads_one_of
from pytest_dcp.faults.damage import every_bit, every_sector, every_truncation

Values = dict[str, bytes]
OLD: Values = {"a": b"old a" * 3, "b": b"old b" * 3}
NEW: Values = {"a": b"NEW A" * 3, "b": b"NEW B" * 3}
MIXED: Values = {"a": b"a", "c": b"third"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


class DamagedError(Exception):
    """Raised by a saver for a folder that it cannot load."""


@dataclass(frozen=True)
class Saver:
    """Keeps named bytes in a folder, replaced as a whole. Right as it is."""

    sync_data: bool = True
    flush_data: bool = True
    """Before the sync; else the buffer goes to the kernel when the file is closed."""
    sync_late: bool = False
    """The last bytes of a data file are written after its sync."""
    sync_names: bool = True
    """The folder's, before the commit."""
    sync_index: bool = True
    sync_commit: bool = True
    """The folder's, after the commit."""
    sync_above: bool = False
    """Of the wrong folder."""
    unlink_first: bool = False
    index_first: bool = False
    in_place: bool = False
    """The data files of the old save are written over."""
    index_in_place: bool = False
    clean_early: bool = False
    """Files of the old save are removed before the commit."""
    reuse_temporary: bool = False
    """The rest of a longer, earlier index is not cut off."""
    rename_early: bool = False
    """The index gets its name before it is synced."""
    commit_in_two: bool = False
    """Each name is committed by a rename of its own."""
    checksum: bool = True
    swallow: bool = False
    """Errors of the writing thread."""
    once: bool = False
    """A write that takes a part is not continued."""

    def save(self, folder: Path, values: Values) -> None:
        number = 1 + max((int(p.name.split("-")[1]) for p in folder.glob("data-*")), default=0)
        names = {key: f"data-{0 if self.in_place else number}-{key}" for key in values}
        index = {key: [names[key], zlib.crc32(data)] for key, data in values.items()}
        if self.index_first:
            self._commit(folder, index)
        self._in_a_thread(lambda: self._write_all(folder, names, values))
        if self.clean_early:
            self._clean(folder, index)
        if self.sync_names:
            self._sync_folder(folder)
        if self.commit_in_two:
            for key in index:
                self._commit(folder, {key: index[key]}, f"index-{key}")
        elif not self.index_first:
            self._commit(folder, index)
        self._clean(folder, index)

    def load(self, target: dict[str, Any], checkpoint_id: Path) -> None:
        index: dict[str, Any] = {}
        for file in checkpoint_id.glob("index*"):
            try:
                body = file.read_bytes()
                text, _, crc = body.rpartition(b"#")
                index |= json.loads(text)
                whole = int(crc) == zlib.crc32(text)
            except ValueError as error:
                raise DamagedError(file.name) from error
            if self.checksum and not whole:
                raise DamagedError(file.name)
        if set(index) != set(target):
            raise DamagedError(f"holds {sorted(index)}")
        for key, (name, crc) in index.items():
            data = (checkpoint_id / name).read_bytes()
            if self.checksum and zlib.crc32(data) != crc:
                raise DamagedError(name)
            target[key] = data

    def _write_all(self, folder: Path, names: dict[str, str], values: Values) -> None:
        for key, data in values.items():
            self._write(folder / names[key], data)

    def _write(self, path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            half = len(data) // 2 if self.sync_late else len(data)
            if self.once:
                os.write(file.fileno(), data)
            else:
                file.write(data[:half])
            if self.flush_data:
                file.flush()
            if self.sync_data:
                os.fsync(file.fileno())
            if not self.once:
                file.write(data[half:])

    def _commit(self, folder: Path, index: dict[str, Any], name: str = "index") -> None:
        text = json.dumps(index).encode()
        body = text + b"#%d" % zlib.crc32(text)
        temporary = folder / (name if self.index_in_place else f"{name}.new".replace("index", "x"))
        mode = "r+b" if self.reuse_temporary and temporary.exists() else "wb"
        with temporary.open(mode) as file:
            file.write(body)
            file.flush()
            if self.rename_early:
                temporary.rename(folder / name)
            if self.sync_index:
                os.fsync(file.fileno())
        if self.unlink_first:
            (folder / name).unlink(missing_ok=True)
        if not (self.index_in_place or self.rename_early):
            temporary.rename(folder / name)
        if self.sync_commit:
            self._sync_folder(folder)

    def _clean(self, folder: Path, index: dict[str, Any]) -> None:
        named = {name for name, _ in index.values()}
        for path in folder.glob("data-*"):
            if path.name not in named:
                path.unlink()

    def _sync_folder(self, folder: Path) -> None:
        fd = os.open(folder.parent if self.sync_above else folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _in_a_thread(self, work: Any) -> None:
        errors: list[Exception] = []

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if errors and not self.swallow:
            raise errors[0]


def crash_violations(saver: Saver) -> Iterator[str]:
    """Crashes of a save over an older one after which neither is whole, or the new one is lost."""
    trace = recorded(lambda f: saver.save(f, NEW), lambda f: saver.save(f, OLD))
    for model in MODELS:
        for state in trace.crash_states(model, budget=400):
            try:
                loads_one_of(state, OLD, NEW, saver.load)
            except AssertionError as error:
                yield f"{model}: {error}"


def retry_violations(saver: Saver) -> Iterator[str]:
    """Crashes after which the next save does not load as saved."""
    trace = recorded(lambda f: saver.save(f, NEW), lambda f: saver.save(f, OLD))
    for state in trace.crash_states("posix", budget=100):
        with state.restored() as folder:
            target = dict.fromkeys(MIXED)
            try:
                saver.save(folder, MIXED)
                saver.load(target, folder)
            except Exception as error:  # noqa: BLE001 - told
                yield f"{state!r}: {error!r}"
            else:
                if target != MIXED:
                    yield f"{state!r}: {target}"


def fault_violations(saver: Saver, storage: FaultyStorage) -> Iterator[str]:
    """Faults after which a save returns and has not saved, or raises and has harmed the old."""
    folder = storage.checkpoint_dir
    for fault in (NoSpace(), ShortWrite(2)):
        for path in folder.iterdir():
            path.unlink()
        saver.save(folder, OLD)
        injected = storage.inject(fault, on="write")
        try:
            saver.save(folder, NEW)
            expected = NEW
        except OSError:
            expected = OLD
        assert injected.fired == 1
        target = dict.fromkeys(expected)
        try:
            saver.load(target, folder)
        except (OSError, DamagedError) as error:
            yield f"{fault!r}: {error!r}"
        else:
            if target != expected:
                yield f"{fault!r}: {target}"


def damage_violations(saver: Saver, folder: Path) -> Iterator[str]:
    """Damage after which wrong bytes are loaded without an error."""
    folder.mkdir()
    saver.save(folder, NEW)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for damages in (every_bit(whole, 7), every_truncation(whole), every_sector(whole)):
            for damaged in damages:
                path.write_bytes(damaged.data)
                target = dict.fromkeys(NEW)
                try:
                    saver.load(target, folder)
                except (OSError, DamagedError):
                    continue
                if target != NEW:
                    yield f"{path.name}: {damaged.what}"
        path.write_bytes(whole)


RIGHT = Saver()
PLANTED: dict[str, tuple[str, Saver]] = {
    "no sync of data": ("crash", replace(RIGHT, sync_data=False)),
    "no flush before the sync": ("crash", replace(RIGHT, flush_data=False)),
    "a sync before the last write": ("crash", replace(RIGHT, sync_late=True)),
    "no sync of the folder": ("crash", replace(RIGHT, sync_names=False)),
    "no sync of the index": ("crash", replace(RIGHT, sync_index=False)),
    "no sync after the commit": ("crash", replace(RIGHT, sync_commit=False)),
    "no sync at all": (
        "crash",
        replace(RIGHT, sync_data=False, sync_names=False, sync_index=False, sync_commit=False),
    ),
    "the wrong folder synced": ("crash", replace(RIGHT, sync_above=True)),
    "unlink, then rename": ("crash", replace(RIGHT, unlink_first=True)),
    "the index before the data": ("crash", replace(RIGHT, index_first=True)),
    "data in place": ("crash", replace(RIGHT, in_place=True)),
    "the index in place": ("crash", replace(RIGHT, index_in_place=True)),
    "old data removed before the commit": ("crash", replace(RIGHT, clean_early=True)),
    "rename before the sync": ("crash", replace(RIGHT, rename_early=True)),
    "a commit by two renames": ("crash", replace(RIGHT, commit_in_two=True)),
    "an old temporary file reused": ("retry", replace(RIGHT, reuse_temporary=True)),
    "a thread's error swallowed": ("fault", replace(RIGHT, swallow=True)),
    "a short write not continued": ("fault", replace(RIGHT, once=True)),
    "no checksum": ("damage", replace(RIGHT, checksum=False)),
}


def violations(search: str, saver: Saver, storage: FaultyStorage, tmp_path: Path) -> Iterator[str]:
    if search == "crash":
        return crash_violations(saver)
    if search == "retry":
        return retry_violations(saver)
    if search == "fault":
        return fault_violations(saver, storage)
    return damage_violations(saver, tmp_path / "damaged")


@pytest.mark.parametrize("wrong", PLANTED)
def test_a_broken_saver_is_found_out(
    wrong: str, faulty_storage: FaultyStorage, tmp_path: Path
) -> None:
    search, saver = PLANTED[wrong]
    assert next(violations(search, saver, faulty_storage, tmp_path), None) is not None


@pytest.mark.parametrize("search", ["crash", "retry", "fault", "damage"])
def test_a_right_saver_passes(search: str, faulty_storage: FaultyStorage, tmp_path: Path) -> None:
    assert list(violations(search, RIGHT, faulty_storage, tmp_path)) == []


@pytest.mark.parametrize(
    ("wrong", "models"),
    [
        ("no sync of the folder", {"posix"}),
        ("no sync after the commit", {"posix", "ext4-ordered"}),
        ("no sync of the index", {"posix"}),
        ("no flush before the sync", {"posix", "ext4-ordered"}),
        ("rename before the sync", {"posix", "nfs", "s3"}),
        ("unlink, then rename", {"kill", "posix", "ext4-ordered", "nfs", "s3"}),
        ("the index before the data", {"kill", "posix", "ext4-ordered", "nfs", "s3"}),
    ],
)
def test_each_file_system_forgives_the_bugs_that_it_promises_to(
    wrong: str, models: set[str]
) -> None:
    found = {told.partition(":")[0] for told in crash_violations(PLANTED[wrong][1])}
    assert found == models


def torch_state(fill: float) -> dict[str, Any]:
    return {"w": torch.full((30,), fill), "b": torch.full((20,), fill)}


@pytest.mark.parametrize("model", ["kill", "posix", "ext4-ordered", "nfs"])
def test_torchs_own_writer_is_found_out(model: Any) -> None:
    def save(folder: Path, fill: float) -> None:
        torch_save(torch_state(fill), storage_writer=TorchWriter(folder), no_dist=True)

    trace = recorded(lambda f: save(f, 2), lambda f: save(f, 1))
    states = trace.crash_states(model, budget=60)
    assert violated(states, torch_load) > 10


@pytest.mark.parametrize("model", MODELS)
def test_our_writer_is_not(model: Any) -> None:
    def save(folder: Path, fill: float) -> None:
        dcp.save(torch_state(fill), checkpoint_id=folder, no_dist=True)

    trace = recorded(lambda f: save(f, 2), lambda f: save(f, 1))
    assert violated(trace.crash_states(model, budget=60), dcp.load) == 0


def violated(states: list[Any], load: Any) -> int:
    count = 0
    for state in states:
        try:
            loads_one_of(state, torch_state(1), torch_state(2), load, no_dist=True)
        except AssertionError:
            count += 1
    return count
