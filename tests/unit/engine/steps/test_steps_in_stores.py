"""Incremental steps in an object store: they share files without links, and with stale listings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from hypothesis import settings

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format.catalog_checks import check_files
from pytest_dcp._engine.format.shared_names import SHARED_FOLDER, own_name, shared_name
from pytest_dcp._engine.io.commit import METADATA
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.object_disk import ObjectDisk
from pytest_dcp._engine.steps import load_step
from pytest_dcp._engine.steps.clean_run import remove_leftovers
from pytest_dcp._engine.steps.known_steps import KnownSteps
from pytest_dcp._engine.steps.retention import RetentionPolicy
from pytest_dcp._engine.steps.run_place import RunPlace
from pytest_dcp._engine.steps.shared_files import LEDGER, Ledger, read_ledger
from pytest_dcp._engine.steps.step_names import step_name
from pytest_dcp._engine.storages.folder_metadata import read_catalog
from pytest_dcp.checkpoint import CheckpointManager
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError
from support.incremental_runs import SHARED, assert_holds, blank_like, mostly_frozen
from support.run_store import RUN, STORES, Crashed, RunStore, StoreState

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
IS_NIGHTLY = settings().max_examples >= 10_000
"""Then each request crashes once, and is refused once; else every sixth."""
OPTIONS = {"store": "tested"}
BELOW = "bucket/run/"


@pytest.fixture
def store() -> Iterator[StoreState]:
    STORES["tested"] = StoreState()
    yield STORES["tested"]
    del STORES["tested"]


def manager_of_store(**keywords: Any) -> CheckpointManager:
    return CheckpointManager(
        RUN, incremental=True, no_dist=True, storage_options=OPTIONS, **keywords
    )


def save_to_store(*steps: int, **keywords: Any) -> None:
    with manager_of_store(**keywords) as manager:
        for step in steps:
            manager.save(step, mostly_frozen(step))


def known_steps() -> KnownSteps:
    return KnownSteps(RunPlace(RUN, OPTIONS), RetentionPolicy(), "sizes")


def steps_in(store: StoreState) -> list[int]:
    """The steps that have an index, by the store's objects."""
    own = [name.removeprefix(BELOW) for name in store.objects]
    return sorted(int(n[5:13]) for n in own if n.startswith("step-") and n.endswith(METADATA))


def shared_in(store: StoreState) -> set[str]:
    prefix = f"{BELOW}{SHARED_FOLDER}/"
    return {n.removeprefix(prefix) for n in store.objects if n.startswith(prefix)}


def assert_all_load(store: StoreState) -> None:
    """Each step with an index is whole, by its values."""
    for step in steps_in(store):
        state = blank_like(mostly_frozen(step))
        where = f"{RUN}/{step_name(step)}"
        dcp.load(state, checkpoint_id=where, storage_options=OPTIONS, no_dist=True)
        assert torch.equal(state["frozen"], SHARED)
        assert state["moving"][0] == state["step"] == step


# What is kept.


def test_ten_steps_take_little_more_than_one(store: StoreState) -> None:
    frozen, sizes = torch.arange(1_000_000.0), []
    with manager_of_store() as manager:
        for step in range(10):
            manager.save(step, {"frozen": frozen, "moving": torch.full((50,), float(step))})
            sizes.append(sum(map(len, store.objects.values())))
        assert sizes[9] <= 1.1 * sizes[0]
        found = manager.steps(check="checksums")
        assert [step.number for step in found if step.is_verified] == list(range(10))
        one, *_, last = manager.measure()
    assert one.nbytes > frozen.nbytes
    assert last.own_nbytes < 10_000


def test_a_store_s_steps_are_loaded_listed_and_compared(store: StoreState) -> None:
    save_to_store(1, 2)
    state = blank_like(mostly_frozen(2))
    with manager_of_store() as manager:
        assert manager.latest() is not None
        found = manager.load_latest(state)
    assert found is not None
    assert (found.number, state["step"]) == (2, 2)
    urls = [f"{RUN}/{step_name(step)}" for step in (1, 2)]
    with dcp.open(urls[0], storage_options=OPTIONS, verify="full") as first:
        assert torch.equal(first["frozen"].tensor(), SHARED)


def test_a_background_save_shares_files(store: StoreState) -> None:
    with manager_of_store(keep_last=1) as manager:
        for step in (1, 2, 3):
            manager.async_save(step, mostly_frozen(step))
        manager.wait()
    assert steps_in(store) == [3]
    assert len(shared_in(store)) == 2
    assert_all_load(store)


def test_every_third_save_is_full(store: StoreState) -> None:
    save_to_store(1, 2, 3, 4, full_every=3)
    files = read_ledger(known_steps().folders.root)
    assert files is not None
    assert files.files[1] & files.files[3]
    assert not files.files[3] & files.files[4]


# Removals.


def test_a_removal_frees_files_that_no_other_step_has(store: StoreState) -> None:
    save_to_store(1, 2, 3, 4, keep_last=2)
    assert steps_in(store) == [3, 4]
    assert_all_load(store)
    ledger = read_ledger(known_steps().folders.root)
    assert ledger is not None
    assert shared_in(store) == ledger.files[3] | ledger.files[4]
    assert len(shared_in(store)) == 3
    with manager_of_store() as manager:
        manager.remove_after(3)
    assert len(shared_in(store)) == 2


# Removals beside a reader.


def remove_when_loaded(monkeypatch: pytest.MonkeyPatch, name: str, *, after: int) -> None:
    """Once a step has been chosen and is loaded, at the first request for an object whose name has
    this in it, another process removes the steps after this one."""
    cat_file, load = RunStore.cat_file, load_step.load

    def cat_after_removal(store: RunStore, path: str, *args: Any, **keywords: Any) -> bytes:
        if name in path:
            monkeypatch.undo()
            with manager_of_store() as other:
                other.remove_after(after)
        return cat_file(store, path, *args, **keywords)

    def load_beside_removal(*args: Any, **keywords: Any) -> Any:
        monkeypatch.setattr(RunStore, "cat_file", cat_after_removal)
        return load(*args, **keywords)

    monkeypatch.setattr(load_step, "load", load_beside_removal)


@pytest.mark.parametrize("name", [f"{step_name(2)}/{METADATA}", SHARED_FOLDER])
def test_the_step_before_is_loaded_if_the_newest_is_removed_meanwhile(
    name: str, store: StoreState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load is about to read the index, or has read it and begins with the data."""
    save_to_store(1, 2)
    state = blank_like(mostly_frozen(2))
    with manager_of_store() as manager:
        remove_when_loaded(monkeypatch, name, after=1)
        found = manager.load_latest(state)
    assert found is not None
    assert (steps_in(store), found.number, state["step"]) == ([1], 1, 1)
    assert torch.equal(state["frozen"], SHARED)
    assert torch.equal(state["moving"], mostly_frozen(1)["moving"])


def test_an_open_step_that_is_removed_names_the_file_it_lacks(store: StoreState) -> None:
    """What other steps have, too, is still read."""
    save_to_store(1, 2)
    with dcp.open(f"{RUN}/{step_name(2)}", storage_options=OPTIONS) as second:
        with manager_of_store() as other:
            other.remove_after(1)
        assert torch.equal(second["frozen"].tensor(), SHARED)
        with pytest.raises(CheckpointCorruptError, match="the data file is missing"):
            second["moving"].tensor()


def save_remove_and_save() -> None:
    """Two incremental saves with removals between them, and a removal of later steps."""
    save_to_store(1, 2, 3, keep_last=2)
    with manager_of_store() as manager:
        manager.remove_after(2)


def attempt(store: StoreState) -> None:
    """As a job that may die, or whose store may refuse a request; what it says is not looked at."""
    with (
        contextlib.suppress(Crashed, OSError, CheckpointError, dcp.CheckpointException),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        save_remove_and_save()


@pytest.mark.parametrize("kind", ["crash", "refusal"])
def test_no_crash_and_no_refusal_breaks_a_step(kind: str, store: StoreState) -> None:
    save_remove_and_save()
    count = store.changes
    assert count > 30
    for number in range(1, count + 1, 1 if IS_NIGHTLY else 6):
        store.begin_anew(lag=(number % 3) * 5)
        if kind == "crash":
            store.crash_at = number
        else:
            store.refuse_at = number
        attempt(store)
        store.restart()
        assert_all_load(store)
        remove_leftovers(known_steps())
        assert_all_load(store)
        newest = max(steps_in(store), default=0)
        save_to_store(newest + 1, newest + 2, keep_last=1)
        assert steps_in(store)[-1] == newest + 2
        assert_all_load(store)


def test_gc_removes_leftovers_of_crashes_but_not_of_the_last_save(store: StoreState) -> None:
    save_to_store(1, 2)
    store.crash_at = store.changes + 5  # notes, ledger, data, ledger, index
    with pytest.raises(Crashed):
        save_to_store(3)
    store.restart()
    before = shared_in(store)
    assert steps_in(store) == [1, 2]
    # The save may be under way, as far as gc knows.
    assert remove_leftovers(known_steps()) == []
    assert shared_in(store) == before
    save_to_store(4)
    assert len(shared_in(store)) == len(before)  # one more of step 4, one less of step 3
    store.objects[f"{BELOW}{SHARED_FOLDER}/__0_0-dead.distcp"] = b"hidden from that save"
    store.history.append(frozenset(store.objects))
    left = remove_leftovers(known_steps())
    assert [one.name for one in left] == [step_name(3), f"{SHARED_FOLDER}/__0_0-dead.distcp"]
    assert_all_load(store)


def test_gc_amid_a_save_leaves_its_files(
    store: StoreState, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_to_store(1)
    found: list[object] = []
    changed: list[str] = []
    change = StoreState.change

    def clean_before(state: StoreState, name: str, content: bytes | None) -> None:
        # Before the ledger has the save, its folder is like that of any save that has not ended.
        ledger = read_ledger(known_steps().folders.root)
        if ledger is not None and ledger.saving is not None:
            changed.append(name.rpartition("/")[2])
            found.extend(remove_leftovers(known_steps()))
        change(state, name, content)

    monkeypatch.setattr(StoreState, "change", clean_before)
    save_to_store(2)
    assert found == []
    assert len(changed) == 5  # data, ledger, index, latest.json, ledger
    assert steps_in(store) == [1, 2]
    assert_all_load(store)


def test_gc_amid_a_save_keeps_files_of_an_earlier_step_that_is_gone_by_then(
    store: StoreState, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointManager(RUN, no_dist=True, storage_options=OPTIONS) as manager:
        manager.save(
            0, mostly_frozen(0)
        )  # shares nothing, and without a whole step gc does nothing
    save_to_store(1)
    change = StoreState.change

    def remove_earlier(state: StoreState, name: str, content: bytes | None) -> None:
        if name == f"{BELOW}{step_name(2)}/{METADATA}":
            monkeypatch.undo()
            known_steps().remove(1)
            assert remove_leftovers(known_steps()) == []
        change(state, name, content)

    monkeypatch.setattr(StoreState, "change", remove_earlier)
    save_to_store(2)
    assert steps_in(store) == [0, 2]
    assert_all_load(store)


def test_a_ledger_that_is_lost_costs_space_alone(store: StoreState) -> None:
    save_to_store(1, 2)
    for content in (None, b"{", b'{"names": ["../x"], "steps": {"1": [0]}, "saving": null}'):
        store.change(BELOW + LEDGER, content)
        assert remove_leftovers(known_steps()) == []
        assert read_ledger(known_steps().folders.root) is None
        assert_all_load(store)
    store.crash_at = None
    save_to_store(3, 4, keep_last=2)  # 3 is full
    assert steps_in(store) == [3, 4]
    assert_all_load(store)
    assert len(remove_leftovers(known_steps())) == 2
    assert_all_load(store)


def test_a_step_whose_index_is_damaged_keeps_gc_from_guessing(store: StoreState) -> None:
    save_to_store(1)
    store.change(BELOW + LEDGER, None)
    save_to_store(2)
    store.change(f"{BELOW}{step_name(1)}/{METADATA}", b"damaged")
    before = shared_in(store)
    assert remove_leftovers(known_steps()) == []
    assert shared_in(store) == before


def test_a_ledger_is_read_back() -> None:
    ledger = Ledger({3: frozenset({"__0_0-a.distcp"}), 4: frozenset()}, (4, "b"))
    assert Ledger.from_bytes(ledger.to_bytes()) == ledger
    assert ledger.others(4) == {"__0_0-a.distcp"}
    assert ledger.without_step(4) == Ledger({3: frozenset({"__0_0-a.distcp"})})


# Copies.


def test_an_export_is_a_checkpoint_for_torch(store: StoreState, tmp_path: Path) -> None:
    save_to_store(1, 2)
    with manager_of_store() as manager:
        report = manager.export(2, tmp_path / "exported")
    assert report.files == 2
    state = blank_like(mostly_frozen(2))
    torch_dcp.load(state, checkpoint_id=tmp_path / "exported", no_dist=True)
    assert torch.equal(state["frozen"], SHARED)
    assert_holds(tmp_path / "exported", mostly_frozen(2))


def copy_run(store: StoreState, target: Path) -> None:
    for name, content in store.objects.items():
        path = target / name.removeprefix(BELOW)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_a_run_that_is_copied_whole_is_whole(store: StoreState, tmp_path: Path) -> None:
    save_to_store(1, 2)
    copy_run(store, tmp_path)
    assert_holds(tmp_path / step_name(2), mostly_frozen(2))
    state = blank_like(mostly_frozen(2))
    torch_dcp.load(state, checkpoint_id=tmp_path / step_name(2), no_dist=True)
    assert torch.equal(state["frozen"], SHARED)
    with CheckpointManager(tmp_path, incremental=True, keep_last=1, no_dist=True) as manager:
        manager.save(3, mostly_frozen(3))
        manager.save(4, mostly_frozen(4))
    assert_holds(tmp_path / step_name(4), mostly_frozen(4))
    assert not list((tmp_path / SHARED_FOLDER).iterdir())


def test_a_step_that_is_copied_alone_says_what_it_lacks(store: StoreState, tmp_path: Path) -> None:
    save_to_store(1, 2)
    copy_run(store, tmp_path)
    (tmp_path / SHARED_FOLDER).rename(tmp_path / "elsewhere")
    words = r"in the folder shared-data beside theirs.*\.export\(step, target\)"
    with pytest.raises(dcp.CheckpointException, match=words):
        assert_holds(tmp_path / step_name(2), mostly_frozen(2))
    with CheckpointManager(tmp_path, no_dist=True) as manager:
        problem = manager.steps()[-1].problem
    assert problem is not None
    assert "export(step, target)" in problem


# Hostile names.


@pytest.mark.parametrize(
    "name",
    [
        "../shared-data/../step-00000001/__0_0-a.distcp",
        "../shared-data/.metadata",
        "../shared-data/__0_0-a.distcp\n",
        "../shared-data/__0_0-\u0661.distcp",
        "../shared-data/__\u0661_0-a.distcp",
        "../shared-data//__0_0-a.distcp",
        "../shared-data/sub/__0_0-a.distcp",
        "../shared-data/__0_0.distcp",
        "../../shared-data/__0_0-a.distcp",
        "./../shared-data/__0_0-a.distcp",
        "../other/__0_0-a.distcp",
        "../shared-data.metadata",
        "/shared-data/__0_0-a.distcp",
    ],
    ids=repr,
)
def test_no_other_name_leads_out_of_the_folder(name: str, store: StoreState) -> None:
    assert own_name(name) is None
    save_to_store(1)
    places = read_catalog(known_steps().folders.folder(1), METADATA).places
    check_files(places)
    with pytest.raises(CheckpointCorruptError, match="inside the checkpoint's folder"):
        check_files(replace(places, files=(name,)))


def test_the_folder_of_shared_files_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "__0_0-a.distcp").write_bytes(b"secret")
    (tmp_path / "run" / "step").mkdir(parents=True)
    (tmp_path / "run" / SHARED_FOLDER).symlink_to(tmp_path / "elsewhere")
    name = shared_name("__0_0-a.distcp")
    with (
        pytest.raises(CheckpointCorruptError, match="is a link"),
        LocalDisk().open(tmp_path / "run" / "step", name),
    ):
        pass
    (tmp_path / "run" / SHARED_FOLDER).unlink()
    (tmp_path / "run" / SHARED_FOLDER).mkdir()
    (tmp_path / "run" / SHARED_FOLDER / "__0_0-a.distcp").symlink_to(
        tmp_path / "elsewhere" / "__0_0-a.distcp"
    )
    with (
        pytest.raises(CheckpointCorruptError, match="leads out"),
        LocalDisk().open(tmp_path / "run" / "step", name),
    ):
        pass


def test_a_bucket_has_no_other_bucket_beside_it() -> None:
    disk = ObjectDisk(fsspec.filesystem("memory"), {})
    with pytest.raises(CheckpointCorruptError, match="nothing beside it"):
        disk.exists("bucket", shared_name("__0_0-a.distcp"))


class CachingStore(RunStore):
    """Remembers its listings until it is told to look anew, as s3fs does."""

    protocol = "cachingrunstore"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        folder = self._name(path)
        if folder not in self.dircache:
            self.dircache[folder] = super().ls(path, detail=True)
        return list(self.dircache[folder])

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        name = self._name(path)
        folder = name.rpartition("/")[0]
        if folder in self.dircache and all(e["name"] != name for e in self.dircache[folder]):
            raise FileNotFoundError(path)
        return super().info(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.pop(self._name(path or ""), None)


def test_a_shared_file_is_found_that_came_after_the_last_listing(store: StoreState) -> None:
    disk = ObjectDisk(CachingStore("tested"), {})
    store.change(f"{BELOW}{SHARED_FOLDER}/__0_0-a.distcp", b"1")
    assert disk.names(f"{BELOW}{SHARED_FOLDER}") == ["__0_0-a.distcp"]
    store.change(f"{BELOW}{SHARED_FOLDER}/__0_0-b.distcp", b"12")
    step, name = f"{BELOW}{step_name(1)}", shared_name("__0_0-b.distcp")
    with disk.open(step, name) as file:
        assert file.size == 2
    store.change(f"{BELOW}{SHARED_FOLDER}/__0_0-c.distcp", b"123")
    assert disk.names(f"{BELOW}{SHARED_FOLDER}")[1:] == ["__0_0-b.distcp", "__0_0-c.distcp"]
    store.change(f"{BELOW}{SHARED_FOLDER}/__0_0-d.distcp", b"1234")
    assert disk.exists(step, shared_name("__0_0-d.distcp"))
