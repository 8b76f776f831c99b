from contextlib import contextmanager, nullcontext

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_dcp._engine.io.commit import data_name, metadata_name, publish, remove_unnamed, sweep
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError
from support.tilings import fewer

SAVE = "0123456789ab"


class FakeDisk:
    """Files in a dict; records each operation, and fails before or after a given one."""

    renames = True

    def __init__(self, files: dict[str, bytes] | None = None, fail_at: int = -1) -> None:
        self.files = dict(files or {})
        self.done: list[tuple] = []
        self.fail_at = fail_at

    def _step(self, *what) -> None:
        self.done.append(what)
        if len(self.done) - 1 == self.fail_at:
            raise OSError(28, "No space left on device")

    @contextmanager
    def create(self, folder, name):
        self._step("create", name)
        self.files[name] = b""
        yield FakeOut(self, name)
        self._step("close", name)

    def between_leases(self, folder, name):
        return nullcontext()

    def replace(self, folder, old, new):
        self._step("replace", old, new)
        self.files[new] = self.files.pop(old)

    def remove(self, folder, name):
        self._step("remove", name)
        self.files.pop(name, None)

    def sync_folder(self, folder):
        self._step("sync_folder")

    def names(self, folder):
        return sorted(self.files)


class FakeOut:
    def __init__(self, disk: FakeDisk, name: str) -> None:
        self.disk, self.name = disk, name

    def write(self, buffers) -> None:
        self.disk._step("write", self.name)
        self.disk.files[self.name] += b"".join(buffers)

    def sync(self) -> None:
        self.disk._step("sync", self.name)


TEMPORARY = f".metadata-{SAVE}.tmp"
PROTOCOL = [
    ("sync_folder",),
    ("create", TEMPORARY),
    ("write", TEMPORARY),
    ("sync", TEMPORARY),
    ("close", TEMPORARY),
    ("replace", TEMPORARY, ".metadata"),
    ("sync_folder",),
]


def test_a_commit_is_these_steps_in_this_order():
    disk = FakeDisk({".metadata": b"old"})
    publish(Folder(disk, "folder"), ".metadata", [b"ne", b"w"], SAVE, sync=True)
    assert disk.done == PROTOCOL
    assert disk.files == {".metadata": b"new"}


def test_without_sync_the_steps_are_the_same_but_nothing_is_waited_for():
    disk = FakeDisk({".metadata": b"old"})
    publish(Folder(disk, "folder"), ".metadata", [b"new"], SAVE, sync=False)
    assert disk.done == [step for step in PROTOCOL if "sync" not in step[0]]
    assert disk.files == {".metadata": b"new"}


@pytest.mark.parametrize("at", range(6))
def test_a_failure_before_the_rename_leaves_the_old_checkpoint_and_no_temporary(at):
    disk = FakeDisk({".metadata": b"old", "__0_0.distcp": b"data"}, fail_at=at)
    with pytest.raises(OSError, match="No space left"):
        publish(Folder(disk, "folder"), ".metadata", [b"new"], SAVE, sync=True)
    assert disk.files == {".metadata": b"old", "__0_0.distcp": b"data"}


def test_a_failure_after_the_rename_leaves_the_new_checkpoint_and_no_temporary():
    disk = FakeDisk({".metadata": b"old"}, fail_at=6)
    with pytest.raises(CheckpointError, match=r"is in place.*No space left"):
        publish(Folder(disk, "folder"), ".metadata", [b"new"], SAVE, sync=True)
    assert disk.files == {".metadata": b"new"}


def test_the_first_failure_is_the_one_that_is_raised_when_removing_fails_too():
    class Dead(FakeDisk):
        def remove(self, folder, name):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="No space left"):
        publish(Folder(Dead(fail_at=2), "folder"), ".metadata", [b"new"], SAVE, sync=True)


def test_names_say_the_rank_and_the_save():
    assert (metadata_name(), metadata_name(3)) == (".metadata", "__3.metadata")
    assert data_name("__3_", 1, SAVE) == f"__3_1-{SAVE}.distcp"


OTHERS = ["notes.txt", "model.distcp", "__a_0.distcp", "__0_0.distcp.bak", "sub", "__0_0-XY.distcp"]
DATA = [
    f"__{rank}_{n}{save}.distcp" for rank in range(2) for n in range(2) for save in ("", "-a", "-b")
]
RANKED = ["__0.metadata", "__1.metadata"]
LEFT = [".metadata.tmp", ".metadata-ab.tmp", "__0.metadata-ab.tmp"]
EVERYTHING = [".metadata", *OTHERS, *DATA, *RANKED, *LEFT]
files = st.lists(st.sampled_from(EVERYTHING), unique=True)


class LaggingDisk(FakeDisk):
    """Lists only a part of what is there."""

    def __init__(self, files: dict[str, bytes], listed: list[str]) -> None:
        super().__init__(files)
        self.listed = listed

    def names(self, folder):
        return sorted(self.listed)


def naming(disk: FakeDisk, kept: list[str]):
    """Names the same files for every existing metadata file."""

    def named(name: str) -> list[str]:
        if name not in disk.files:
            raise FileNotFoundError(name)
        return kept

    return named


@given(files, st.lists(st.sampled_from(DATA), unique=True))
@fewer(2)
def test_a_whole_commit_removes_every_file_of_another_save_and_nothing_else(present, kept):
    disk = FakeDisk(dict.fromkeys(present, b""))
    removed = sweep(Folder(disk, "folder"), naming(disk, kept), rank=None)
    ours = set(kept) if ".metadata" in present else set()
    expected = {n for n in present if n in (*DATA, *RANKED, *LEFT)} - ours
    assert set(removed) == expected
    assert set(disk.files) == set(present) - expected


@given(files, st.lists(st.sampled_from(DATA), unique=True), st.integers(0, 1))
@fewer(2)
def test_a_ranks_own_commit_removes_its_own_old_data_alone(present, kept, rank):
    disk = FakeDisk(dict.fromkeys(present, b""))
    sweep(Folder(disk, "folder"), naming(disk, kept), rank=rank)
    safe = set(kept) if {".metadata", metadata_name(rank)} & set(present) else set()
    gone = {n for n in present if n in DATA and n.startswith(f"__{rank}_")} - safe
    left_over = {n for n in present if n in LEFT}
    assert set(present) - set(disk.files) - left_over == gone


@given(files, files, st.lists(st.sampled_from(DATA), unique=True), st.sampled_from([None, 0, 1]))
@example([".metadata", "__0_0.distcp"], ["__0_0.distcp"], ["__0_0.distcp"], None)
@example(["__0.metadata", "__0_0.distcp"], ["__0_0.distcp"], ["__0_0.distcp"], 0)
@fewer(2)
def test_an_old_listing_never_costs_a_file_that_is_named(present, listed, kept, rank):
    disk = LaggingDisk(dict.fromkeys(present, b""), listed)
    sweep(Folder(disk, "folder"), naming(disk, kept), rank=rank)
    committed = {".metadata", metadata_name(rank)} & set(present)
    assert committed <= set(disk.files)
    assert not committed or set(kept) & set(present) <= set(disk.files)
    disk = LaggingDisk(dict.fromkeys(present, b""), listed)
    # Each rank's metadata names its own files only.
    remove_unnamed(
        Folder(disk, "folder"), lambda name: [n for n in naming(disk, kept)(name) if own(name, n)]
    )
    for name in set(present) & {".metadata", *RANKED}:
        assert {n for n in kept if own(name, n)} & set(present) <= set(disk.files)


def own(metadata: str, data: str) -> bool:
    """Whether a metadata file may name a data file."""
    return metadata == ".metadata" or data.startswith(metadata.removesuffix(".metadata") + "_")


def test_a_store_without_a_rename_commits_by_one_put():
    disk = FakeDisk({".metadata": b"old"})
    disk.renames = False
    publish(Folder(disk, "folder"), ".metadata", [b"ne", b"w"], SAVE, sync=True)
    assert disk.done == [
        ("sync_folder",),
        ("create", ".metadata"),
        ("write", ".metadata"),
        ("sync", ".metadata"),
        ("close", ".metadata"),
        ("sync_folder",),
    ]


@pytest.mark.parametrize("step", range(1, 5))
def test_a_put_that_fails_removes_nothing(step):
    disk = FakeDisk({".metadata": b"old"}, fail_at=step)
    disk.renames = False
    with pytest.raises(OSError, match="No space left"):
        publish(Folder(disk, "folder"), ".metadata", [b"new"], SAVE, sync=True)
    assert "remove" not in {what for what, *_ in disk.done}


def test_a_ranks_own_commit_removes_leftovers_of_its_dead_saves():
    disk = FakeDisk({"__1.metadata": b"", "__1.metadata-ab.tmp": b"", "__0.metadata-ab.tmp": b""})
    sweep(Folder(disk, "folder"), lambda name: [], rank=1)
    assert sorted(disk.files) == ["__0.metadata-ab.tmp", "__1.metadata"]


def test_nothing_is_removed_where_the_needed_files_are_unknown():
    def named(name: str):
        raise CheckpointCorruptError("torn")

    disk = FakeDisk({".metadata": b"", "__0_0.distcp": b""})
    with pytest.raises(CheckpointCorruptError, match=r"'\.metadata'"):
        sweep(Folder(disk, "folder"), named, rank=None)
    assert set(disk.files) == {".metadata", "__0_0.distcp"}
