"""Checkpoints made to harm their loader, and plans and targets that ask for the impossible.

No code of a checkpoint runs, memory stays bounded, nothing outside of a target is written, and the
fault is raised as CheckpointCorruptError with the file or the entry. Loads that could end the
process run in a fork of it.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format.entry import value_entry
from pytest_dcp._engine.verbs.load import load_without_template
from pytest_dcp.checkpoint.filesystem import FileSystemReader
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError
from support.forks import forked

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]

ROOM_BYTES = 1 << 30
"""Bytes that a load of a few bytes may add to the address space."""
FORK_S = 30


run_forked = partial(forked, limit_s=FORK_S)
"""Run a body in a fork; an AssertionError has its traceback, or the signal that ended it."""


def cause_of(load: Callable[[], object]) -> BaseException | None:
    """The error of one rank's load, or None."""
    try:
        load()
    except dcp.CheckpointException as error:
        ((cause, _),) = error.failures.values()
        return cause
    return None


def check_refused(load: Callable[[], object]) -> CheckpointCorruptError:
    """The error of a load that says that the checkpoint is bad, and where."""
    cause = cause_of(load)
    assert isinstance(cause, CheckpointCorruptError), repr(cause)
    assert cause.file is not None or cause.entry is not None, cause
    return cause


def torchs(folder: Path, edit: Callable[[Metadata], None]) -> Path:
    """torch's checkpoint of "w", eight floats, and of the value "v", its metadata edited."""
    torch_save({"w": torch.arange(1.0, 9.0), "v": [1, "two"]}, checkpoint_id=folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def target() -> dict[str, Any]:
    return {"w": torch.zeros(8), "v": None}


def places(metadata: Metadata) -> Any:
    return metadata.storage_data.values()


def test_the_edited_checkpoint_loads_where_nothing_is_edited(tmp_path: Path) -> None:
    state = target()
    dcp.load(state, checkpoint_id=torchs(tmp_path, lambda metadata: None))
    assert state["w"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert state["v"] == [1, "two"]


# ---- code


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_of_the_metadata_runs(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert check_refused(lambda: dcp.load(target(), checkpoint_id=tmp_path)).file == ".metadata"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("load", ["with a template", "without one"])
def test_no_code_of_a_value_runs(tmp_path: Path, load: str) -> None:
    torch_save({"v": Bomb(tmp_path / "ran")}, checkpoint_id=tmp_path)
    cause = check_refused(
        (lambda: dcp.load({"v": None}, checkpoint_id=tmp_path))
        if load == "with a template"
        else (lambda: load_without_template(checkpoint_id=tmp_path))
    )
    assert cause.entry == "v"
    assert not (tmp_path / "ran").exists()


# ---- paths


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../outside", "a/../../outside", "", ".", "a//b", "nul\0", "link", "fifo",
     "folder"],
)  # fmt: skip
def test_names_that_are_no_file_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    (tmp_path / "outside").write_bytes(bytes(4096))

    def edit(metadata: Metadata) -> None:
        for place in places(metadata):
            place.relative_path = name

    torchs(folder, edit)
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")

    def body(_: object) -> None:
        check_refused(lambda: dcp.load(target(), checkpoint_id=folder))

    run_forked(body, room_bytes=8 << 30)


@pytest.mark.parametrize("name", ["half \ud800", "n" * 300, "__0_0.distcp/x", "loop", "socket"])
def test_names_that_the_system_refuses_are_refused_as_damage(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(metadata: Metadata) -> None:
        for place in places(metadata):
            place.relative_path = name

    torchs(tmp_path, edit)
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        check_refused(lambda: dcp.load(target(), checkpoint_id=tmp_path))


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_metadata_that_is_no_plain_file_is_refused(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoint"
    torchs(folder, lambda metadata: None)
    (folder / ".metadata").rename(tmp_path / "outside")
    if kind == "fifo":
        os.mkfifo(folder / ".metadata")
    elif kind == "folder":
        (folder / ".metadata").mkdir()
    else:
        (folder / ".metadata").symlink_to(tmp_path / "outside")

    def body(_: object) -> None:
        assert check_refused(lambda: dcp.load(target(), checkpoint_id=folder)).file == ".metadata"

    run_forked(body, room_bytes=8 << 30)


# ---- numbers


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1 << 60), (1 << 60, 10), (10_000, 500), (0, 0), (3, 900), (-1, 10), (1 << 63, 1)],
)
def test_entries_that_are_not_where_they_should_be_are_refused(
    tmp_path: Path, offset: int, length: int
) -> None:
    def edit(metadata: Metadata) -> None:
        for place in places(metadata):
            place.offset, place.length = offset, length

    torchs(tmp_path, edit)

    def body(_: object) -> None:
        check_refused(lambda: dcp.load(target(), checkpoint_id=tmp_path))

    run_forked(body, room_bytes=ROOM_BYTES)


def resized(*sizes: int) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        kept: Any = metadata.state_dict_metadata["w"]
        kept.size = torch.Size(sizes)
        kept.chunks = [ChunkStorageMetadata(torch.Size([0] * len(sizes)), torch.Size(sizes))]
        for key in list(metadata.storage_data):
            if key.fqn == "w":
                place = metadata.storage_data.pop(key)
                index = MetadataIndex("w", torch.Size([0] * len(sizes)), 0)
                metadata.storage_data[index] = place

    return edit


@pytest.mark.parametrize("sizes", [(1 << 40,), (1 << 59,), (1 << 30, 1 << 29)])
def test_absurd_sizes_take_no_memory(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    torchs(tmp_path, resized(*sizes))

    def body(_: object) -> None:
        check_refused(lambda: load_without_template(checkpoint_id=tmp_path))

    run_forked(body, room_bytes=ROOM_BYTES)


def test_sizes_that_no_tensor_can_have_are_refused(tmp_path: Path) -> None:
    for sizes in ((1 << 62,), (1 << 40, 1 << 40), (1 << 62, 0)):
        torchs(tmp_path, resized(*sizes))
        check_refused(lambda: load_without_template(checkpoint_id=tmp_path))


def chunked(*spans: tuple[int, int]) -> Callable[[Metadata], None]:
    """The key "w" in chunks of these starts and lengths, all with the data of its one entry."""

    def edit(metadata: Metadata) -> None:
        kept: Any = metadata.state_dict_metadata["w"]
        (place,) = (place for key, place in metadata.storage_data.items() if key.fqn == "w")
        (old,) = (key for key in metadata.storage_data if key.fqn == "w")
        del metadata.storage_data[old]
        kept.size = torch.Size([16])
        kept.chunks = [ChunkStorageMetadata(torch.Size([a]), torch.Size([n])) for a, n in spans]
        for number, (start, _) in enumerate(spans):
            metadata.storage_data[MetadataIndex("w", torch.Size([start]), number)] = place

    return edit


@pytest.mark.parametrize(
    "spans",
    [
        pytest.param([(0, 8)], id="gap"),
        pytest.param([(0, 8), (4, 8), (8, 8)], id="overlap"),
        pytest.param(
            [(0, 8), (0, 8)],
            id="a chunk twice and another never",
        ),
        pytest.param(
            [(0, 8), (4, 8)],
            id="an overlap as large as the gap",
        ),
    ],
)
def test_chunks_that_do_not_tile_their_tensor_are_refused(
    tmp_path: Path, spans: list[tuple[int, int]]
) -> None:
    torchs(tmp_path, chunked(*spans))
    check_refused(lambda: dcp.load({"w": torch.zeros(16)}, checkpoint_id=tmp_path))


# ---- planner data


@pytest.mark.parametrize(
    "path", [("v", 1 << 31), ("v", -7), (), 5, "xyz", ("w", 0), ("w", ["x"]), ("w", "x")]
)
def test_dangling_paths_are_refused(tmp_path: Path, path: Any) -> None:
    def edit(metadata: Metadata) -> None:
        metadata.planner_data = {"w": ("w",), "v": path}

    torchs(tmp_path, edit)

    def body(_: object) -> None:
        check_refused(lambda: load_without_template(checkpoint_id=tmp_path))

    run_forked(body, room_bytes=ROOM_BYTES)


def test_deeply_nested_values_are_refused(tmp_path: Path) -> None:
    depth = 100_000
    nested = b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."

    def edit(metadata: Metadata) -> None:
        for key, place in metadata.storage_data.items():
            if key.fqn == "v":
                place.relative_path, place.offset = "deep", 0
                place.length = len(value_entry(nested))

    torchs(tmp_path, edit)
    (tmp_path / "deep").write_bytes(value_entry(nested))

    def body(_: object) -> None:
        check_refused(lambda: dcp.load({"v": None}, checkpoint_id=tmp_path))

    run_forked(body, room_bytes=ROOM_BYTES)


def value_of(folder: Path, entry: bytes) -> None:
    """A checkpoint whose value "v" is this entry."""

    def edit(metadata: Metadata) -> None:
        for key, place in metadata.storage_data.items():
            if key.fqn == "v":
                place.relative_path, place.offset, place.length = "value", 0, len(entry)

    torchs(folder, edit)
    (folder / "value").write_bytes(entry)


def pickled_bytearray(nbytes: int) -> bytes:
    return b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + nbytes.to_bytes(8, "little") + b"\x85R."


def test_a_value_that_asks_for_memory_is_refused(tmp_path: Path) -> None:
    """An entry of some 500 bytes that torch's own safe unpickler turns into gigabytes."""
    value_of(tmp_path, value_entry(pickled_bytearray(2 * ROOM_BYTES)))

    def body(_: object) -> None:
        check_refused(lambda: dcp.load({"v": None}, checkpoint_id=tmp_path))

    run_forked(body, room_bytes=ROOM_BYTES)


def test_a_value_without_its_storage_is_refused(tmp_path: Path) -> None:
    names = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    storage = names + b"X\x03\x00\x00\x00cpuK\x02tQ"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + (b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR")
    )
    value_of(tmp_path, value_entry(b"\x80\x02" + tensor + b"."))
    check_refused(lambda: dcp.load({"v": None}, checkpoint_id=tmp_path))


@pytest.mark.parametrize("descriptor", ["nope", "", "stream.zstd", "stream.zstd/1"])
def test_entries_with_impossible_transforms_are_refused(tmp_path: Path, descriptor: str) -> None:
    def edit(metadata: Metadata) -> None:
        for place in places(metadata):
            place.transform_descriptors = [descriptor]

    torchs(tmp_path, edit)
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(target(), checkpoint_id=tmp_path)
    # An unknown transform may be another program's, so it is no damage; bytes that cannot be
    # decoded are.
    known = descriptor == "stream.zstd/1"
    causes = [type(cause) for cause, _ in caught.value.failures.values()]
    assert causes == [CheckpointCorruptError if known else CheckpointError]


@pytest.mark.parametrize(
    ("fqn", "chunks", "room_bytes"), [("w", 16, 512 << 20), ("v", 96, 4 << 30)]
)
def test_an_entry_that_grows_without_end_is_refused(
    tmp_path: Path, fqn: str, chunks: int, room_bytes: int
) -> None:
    """Zeros in chunks of 64 MiB, compressed: a value may grow to 1 GiB, a tensor to its size."""
    zstandard = pytest.importorskip("zstandard")
    from torch.distributed.checkpoint._extension import ZStandard

    packer, zeros = zstandard.ZstdCompressor(level=1).compressobj(), bytes(64 << 20)
    bomb = b"".join([*(packer.compress(zeros) for _ in range(chunks)), packer.flush()])

    def edit(metadata: Metadata) -> None:
        for key, place in metadata.storage_data.items():
            if key.fqn == fqn:
                place.relative_path, place.offset, place.length = "bomb", 0, len(bomb)
                place.transform_descriptors = [ZStandard().get_descriptor()]

    torchs(tmp_path, edit)
    (tmp_path / "bomb").write_bytes(bomb)

    def body(_: object) -> None:
        check_refused(lambda: dcp.load({fqn: target()[fqn]}, checkpoint_id=tmp_path))

    run_forked(body, room_bytes=room_bytes)


def test_a_sparse_metadata_file_takes_no_memory(tmp_path: Path) -> None:
    torchs(tmp_path, lambda metadata: None)
    os.truncate(tmp_path / ".metadata", 1 << 41)

    def body(_: object) -> None:
        check_refused(lambda: dcp.load(target(), checkpoint_id=tmp_path))

    run_forked(body, room_bytes=ROOM_BYTES)


# ---- plans and targets


class Replanned(dcp.DefaultLoadPlanner):
    """Changes the numbers of the only item before it is carried out."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes = changes

    def finish_plan(self, new_plan: Any) -> Any:
        (item,) = new_plan.items
        changed = {name: torch.Size(value) for name, value in self.changes.items()}
        return dataclasses.replace(new_plan, items=[dataclasses.replace(item, **changed)])


LAST = (1 << 63) - 1
WRONG = [
    {"dest_offsets": (1,)},
    {"dest_offsets": (-1,)},
    {"lengths": (9,)},
    {"lengths": (-8,)},
    {"storage_offsets": (1,)},
    {"storage_offsets": (-3,)},
    {"dest_offsets": (LAST - 1,), "lengths": (1,)},
    {"lengths": (LAST,)},
    {"dest_offsets": (1 << 62,), "lengths": (1 << 62,)},
]
WRAPPING = [
    {"dest_offsets": (LAST,)},
    {"dest_offsets": (LAST - 2,)},
    {"storage_offsets": (LAST - 1,)},
    {"dest_offsets": (LAST,), "storage_offsets": (LAST,)},
]


def check_contained(tmp_path: Path, changes: dict[str, Any]) -> None:
    dcp.save({"w": torch.arange(1.0, 9.0)}, checkpoint_id=tmp_path)

    def body(_: object) -> None:
        around = torch.zeros(1024)
        state = {"w": around[512:520]}
        planner = Replanned(**changes)
        cause = cause_of(lambda: dcp.load(state, checkpoint_id=tmp_path, planner=planner))
        assert not around.any(), f"written at {around.nonzero().flatten().tolist()}"
        assert cause is not None, "no error"

    run_forked(body, room_bytes=8 << 30)


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_a_plan_that_leaves_its_target_writes_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    check_contained(tmp_path, changes)


@pytest.mark.parametrize("changes", WRAPPING, ids=str)
def test_a_plan_whose_numbers_wrap_around_writes_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    check_contained(tmp_path, changes)


def shrunk(nbytes: int) -> torch.Tensor:
    """A tensor whose memory was taken away, as FSDP does, while its shape stayed."""
    tensor = torch.zeros(8_000)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(8_000)


WITHOUT_MEMORY = {"none left": lambda: shrunk(0), "some left": lambda: shrunk(64), "fake": fake}


@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
@pytest.mark.parametrize("verb", ["save", "load"])
def test_tensors_without_their_memory_are_named(tmp_path: Path, kind: str, verb: str) -> None:
    dcp.save({"w": torch.ones(8_000)}, checkpoint_id=tmp_path)

    def body(_: object) -> None:
        state = {"w": WITHOUT_MEMORY[kind]()}
        with pytest.raises(dcp.CheckpointException, match="'w'"):
            getattr(dcp, verb)(state, checkpoint_id=tmp_path)

    run_forked(body, room_bytes=8 << 30)


@pytest.mark.parametrize(
    "width",
    [
        8,
        pytest.param(
            2048,
        ),
    ],
)
def test_a_target_whose_elements_share_memory_is_refused(tmp_path: Path, width: int) -> None:
    dcp.save({"w": torch.arange(4.0 * width).reshape(4, width)}, checkpoint_id=tmp_path)
    state = {"w": torch.zeros(1, width).expand(4, width)}
    assert cause_of(lambda: dcp.load(state, checkpoint_id=tmp_path)) is not None


VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "columns": lambda: torch.zeros(6, 10)[:, 2:6],
    "every second row": lambda: torch.zeros(12, 4)[::2],
    "transposed": lambda: torch.zeros(4, 6).t(),
    "permuted": lambda: torch.zeros(4, 1, 6).permute(2, 1, 0).squeeze(1),
    "conjugated": lambda: torch.zeros(6, 4, dtype=torch.complex64).conj(),
    "negated": lambda: torch.zeros(6, 4, dtype=torch.complex64).conj().imag,
    "a parameter": lambda: torch.nn.Parameter(torch.zeros(6, 4)),
    "of another dtype": lambda: torch.zeros(6, 4, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("verify", ["auto", "full", "off"])
def test_views_of_every_kind_are_filled_and_nothing_else(
    tmp_path: Path, view: str, verify: Any
) -> None:
    shown = VIEWS[view]()
    full = torch.arange(24.0).reshape(6, 4).to(shown.dtype)
    full = full + 1j * full if full.is_complex() else full
    dcp.save({"w": full}, checkpoint_id=tmp_path)
    dcp.load({"w": shown}, storage_reader=FileSystemReader(tmp_path, verify=verify))
    assert torch.equal(shown.detach().resolve_conj().resolve_neg(), full)
    memory = torch.view_as_real(shown.resolve_conj()) if shown.is_complex() else shown
    if shown._base is not None and not shown.is_complex() and view != "negated":
        assert shown._base.count_nonzero() == memory.count_nonzero()
