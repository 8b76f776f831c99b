"""Reading a description takes memory in proportion to the bytes stored, or it is refused first."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from isal.isal_zlib import crc32
from torch.distributed.checkpoint._extension import ZStandard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format import metadata_file, metadata_trailer
from pytest_dcp._engine.format import safetensors_header as safetensors
from pytest_dcp._engine.format.memory_limit import (
    BYTES_PER_STORED_BYTE,
    FREE_BYTES,
    MemoryLimit,
    estimate_json_bytes,
)
from pytest_dcp._engine.huggingface.file_names import INDEX_NAME
from pytest_dcp._engine.huggingface.weight_index import decode_index
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.storages.folder_metadata import read_catalog
from pytest_dcp.checkpoint.hf_storage import HuggingFaceStorageReader
from pytest_dcp.errors import CheckpointCorruptError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MIB = 1 << 20


def peak_of(body: Callable[[], object]) -> tuple[int, BaseException | None]:
    """Bytes that the body took at most, and what it raised."""
    error: BaseException | None = None
    tracemalloc.start()
    try:
        body()
    except (Exception, dcp.CheckpointException) as raised:  # noqa: BLE001 - the caller judges it
        error = raised
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, error


def check_refused(body: Callable[[], object], at_most_bytes: int) -> str:
    """The text of the refusal, once it took no more memory than that."""
    peak, error = peak_of(body)
    if isinstance(error, dcp.CheckpointException):
        ((error, _),) = error.failures.values()
    assert isinstance(error, CheckpointCorruptError), repr(error)
    assert peak <= at_most_bytes, f"{peak / MIB:.0f} MiB"
    return str(error)


# ---- JSON: safetensors headers, their sharding, indices, the manifest's header

BOMBS = {
    "lists": (b'{"a":[', b"[],", b"0]}"),
    "lists of an int": (b'{"a":[', b"[1],", b"0]}"),
    "dicts": (b'{"a":[', b'{"":0},', b"0]}"),
    "strings": (b'{"__metadata__":{', b'"%d":"",', b'"":""}}'),
}


def bomb(name: str, nbytes: int) -> bytes:
    first, item, last = BOMBS[name]
    if b"%d" in item:
        count = nbytes // 11
        return first + b"".join(item % n for n in range(count)) + last
    return first + item * (nbytes // len(item)) + last


@pytest.mark.parametrize("name", BOMBS)
def test_the_memory_of_json_is_not_underestimated(name: str) -> None:
    text = bomb(name, MIB)
    peak, _ = peak_of(lambda: json.loads(text))
    assert peak <= 1.1 * estimate_json_bytes(text)


@pytest.mark.parametrize("name", ["lists", "lists of an int", "dicts"])
def test_a_header_that_would_fill_the_memory_is_refused_unread(name: str) -> None:
    text = bomb(name, 12 * MIB)
    said = check_refused(lambda: safetensors.decode(text, 1 << 40), 20 * MIB)
    assert "max_decoded_bytes" in said
    assert str(FREE_BYTES + BYTES_PER_STORED_BYTE * len(text)) in said


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_is_read_stays_within_the_limit(name: str) -> None:
    text = bomb(name, 2 * MIB)
    peak, error = peak_of(lambda: safetensors.decode(text, 1 << 40))
    assert isinstance(error, CheckpointCorruptError)
    assert peak <= MemoryLimit().of(len(text))


def test_an_index_that_would_fill_the_memory_is_refused_unread() -> None:
    text = bomb("lists", 12 * MIB)
    assert "the index" in check_refused(lambda: decode_index(text), 20 * MIB)


def header_of(count: int) -> bytes:
    """A header of scalars with short names: of all honest ones it takes most for its length."""
    tensors = safetensors.place_tensors((str(n), torch.float32, ()) for n in range(count))
    return safetensors.encode(tensors, {})[8:]


def test_large_honest_headers_are_read() -> None:
    text = header_of(50_000)
    header = safetensors.decode(text, 8 + len(text) + 200_000)
    assert len(header.tensors) == 50_000


def test_large_honest_indices_are_read() -> None:
    weights = {
        f"model.layers.{n}.weight": "model-00001-of-00001.safetensors" for n in range(100_000)
    }
    assert len(decode_index(json.dumps({"weight_map": weights}).encode()).weight_map) == 100_000


def test_the_limit_of_headers_can_be_set(tmp_path: Path) -> None:
    dcp.save(
        {"w": torch.ones(4)},
        storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path)),
        no_dist=True,
    )
    state = {"w": torch.zeros(4)}
    small = HuggingFaceStorageReader(str(tmp_path), max_decoded_bytes=100)
    said = check_refused(lambda: dcp.load(state, storage_reader=small, no_dist=True), MIB)
    assert "at most 100 bytes" in said
    assert (tmp_path / INDEX_NAME).exists()
    large = HuggingFaceStorageReader(str(tmp_path), max_decoded_bytes=1 << 40)
    dcp.load(state, storage_reader=large, no_dist=True)
    assert state["w"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("bytes_", [0, -1])
def test_a_limit_that_allows_nothing_is_refused(tmp_path: Path, bytes_: int) -> None:
    with pytest.raises(ValueError, match="max_decoded_bytes must be a positive number"):
        dcp.FileSystemReader(tmp_path, max_decoded_bytes=bytes_)


# ---- `.metadata`


def load(folder: Path, **keywords: Any) -> None:
    reader = dcp.FileSystemReader(folder, **keywords)
    dcp.load({"w": torch.zeros(4)}, storage_reader=reader, no_dist=True)


def test_a_sparse_pickle_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps({}))
    size = 1900 * MIB
    os.truncate(path, size - 1)
    with path.open("ab") as file:
        file.write(b".")
    said = check_refused(lambda: load(tmp_path), 4 * MIB)
    assert "a pickle that takes at most" in said


@pytest.mark.parametrize("behind", [b".", b"\0.", b"I1\n."])
def test_bytes_behind_the_pickle_are_refused(behind: bytes) -> None:
    sample = pickle.dumps(torch.distributed.checkpoint.metadata.Metadata({}))
    metadata_file.decode(sample)
    with pytest.raises(CheckpointCorruptError, match=f"got {len(behind)} bytes behind it"):
        metadata_file.decode(sample + behind)


def test_a_sparse_manifest_with_true_checksums_is_refused_unread(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(4)}, checkpoint_id=tmp_path, no_dist=True)
    path = tmp_path / ".metadata"
    honest = path.read_bytes()
    start, length = write_sparse_manifest(path, honest, hole_bytes=3072 * MIB)
    assert length > 3072 * MIB
    said = check_refused(lambda: load(tmp_path), 4 * MIB)
    assert "a pickle and a manifest that takes at most" in said
    assert start > 0


def write_sparse_manifest(path: Path, honest: bytes, hole_bytes: int) -> tuple[int, int]:
    """Lengthen the manifest by a hole, and make the trailer true again; the manifest's place."""
    body = metadata_trailer.BODY
    at = len(honest) - metadata_trailer.TRAILER_BYTES
    magic, version, crc, start, length, *rest = body.unpack_from(honest, at)
    zeros = bytes(64 * MIB)
    for _ in range(hole_bytes // len(zeros)):
        crc = crc32(zeros, crc)
    trailer = body.pack(magic, version, crc, start, length + hole_bytes, *rest)
    path.write_bytes(honest[:at])
    os.truncate(path, at + hole_bytes)
    with path.open("ab") as file:
        file.write(trailer + crc32(trailer).to_bytes(4, "little"))
    return start, length + hole_bytes


def test_stored_bytes_are_counted_without_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for at in (0, 8 * MIB, 64 * MIB):
            file.seek(at)
            file.write(bytes([1]) * MIB)
        file.truncate(200 * MIB)
    with LocalDisk().open(tmp_path, "sparse") as opened:
        assert opened.size == 200 * MIB
        assert opened.stored_bytes == 3 * MIB
    path.write_bytes(b"x" * 100)
    with LocalDisk().open(tmp_path, "sparse") as opened:
        assert opened.stored_bytes == opened.size == 100


def test_a_large_honest_metadata_is_read_within_the_limit(tmp_path: Path) -> None:
    state = {f"{n}": n for n in range(20_000)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    size = (tmp_path / ".metadata").stat().st_size
    peak, error = peak_of(lambda: read_catalog(Folder(LocalDisk(), tmp_path), ".metadata"))
    assert error is None
    assert peak <= 4 * size


# ---- compressed values


def compressed_value(folder: Path, nbytes: int) -> None:
    writer = dcp.FileSystemWriter(folder, _extensions=[ZStandard()])
    dcp.save({"v": bytes(nbytes)}, storage_writer=writer, no_dist=True)


def load_value(folder: Path, **keywords: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"v": None}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder, **keywords), no_dist=True)
    return state


def test_a_value_that_grows_without_measure_is_refused(tmp_path: Path) -> None:
    compressed_value(tmp_path, 512 * MIB)
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.distcp"))
    assert stored < MIB
    said = check_refused(lambda: load_value(tmp_path), 2 * FREE_BYTES)
    assert "raise max_decoded_bytes" in said


def test_a_value_that_grows_within_the_limit_is_read_and_the_limit_can_be_raised(
    tmp_path: Path,
) -> None:
    compressed_value(tmp_path / "small", 32 * MIB)
    assert len(load_value(tmp_path / "small")["v"]) == 32 * MIB
    compressed_value(tmp_path / "large", 128 * MIB)
    state = load_value(tmp_path / "large", max_decoded_bytes=256 * MIB)
    assert len(state["v"]) == 128 * MIB


@pytest.mark.parametrize("value", [bytes(16 * MIB), "x" * (16 * MIB)], ids=["bytes", "text"])
@pytest.mark.parametrize("compressed", [True, False], ids=["zstd", "plain"])
def test_a_value_takes_the_memory_of_its_entry_and_its_own(
    value: bytes | str, compressed: bool, tmp_path: Path
) -> None:
    """At the peak: the decoded entry, and the value that is made of it."""
    writer = dcp.FileSystemWriter(tmp_path, _extensions=[ZStandard()] if compressed else None)
    dcp.save({"v": value}, storage_writer=writer, no_dist=True)
    found: list[Any] = []
    peak, error = peak_of(lambda: found.append(load_value(tmp_path)["v"]))
    assert error is None
    assert found == [value]
    assert peak <= 2.5 * len(value), f"{peak / len(value):.1f} times the value"


def test_bytes_beyond_ascii_take_the_memory_of_their_entry_and_their_own(tmp_path: Path) -> None:
    value = bytes(range(256)) * (16 * MIB // 256)
    dcp.save({"v": value}, checkpoint_id=tmp_path, no_dist=True)
    entry_bytes = 1.5 * len(value)  # half of its characters take two bytes in UTF-8
    found: list[Any] = []
    peak, error = peak_of(lambda: found.append(load_value(tmp_path)["v"]))
    assert error is None
    assert found == [value]
    assert peak <= 1.1 * (entry_bytes + len(value)) + MIB


def test_values_that_grow_have_one_limit_for_all_of_them(tmp_path: Path) -> None:
    writer = dcp.FileSystemWriter(tmp_path, _extensions=[ZStandard()])
    names = [f"v{number}" for number in range(8)]
    dcp.save(dict.fromkeys(names, bytes(16 * MIB)), storage_writer=writer, no_dist=True)

    def load(**keywords: Any) -> dict[str, Any]:
        state: dict[str, Any] = dict.fromkeys(names)
        dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path, **keywords), no_dist=True)
        return state

    assert "raise max_decoded_bytes" in check_refused(load, 2 * FREE_BYTES)
    assert load(max_decoded_bytes=256 * MIB)["v7"] == bytes(16 * MIB)


def test_values_in_a_sparse_file_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    dcp.save({"v": bytes(128 * MIB)}, checkpoint_id=dense, no_dist=True)
    subprocess.run(["cp", "-r", "--sparse=always", dense, sparse], check=True)
    assert len(load_value(dense)["v"]) == 128 * MIB
    said = check_refused(lambda: load_value(sparse), FREE_BYTES)
    assert "expected values in __" in said
    assert "raise max_decoded_bytes" in said
    assert len(load_value(sparse, max_decoded_bytes=129 * MIB)["v"]) == 128 * MIB
