import mmap
import pickle
import struct
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_manifest_columns import two_tensors
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.format import metadata_file
from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.unpickle import UnknownGlobalError
from pytest_dcp.errors import CheckpointCorruptError
from support.catalogs import Sample, same, samples

TRAILER_BYTES = 48
VERSION_AT = 8


def encoded(catalog: Catalog) -> bytes:
    return b"".join(metadata_file.encode(catalog))


def verified(data: bytes | bytearray) -> Catalog:
    metadata_file.verify_pickle(data)
    return metadata_file.decode(data)


def pickle_length(data: bytes) -> int:
    return int.from_bytes(data[-16:-8], "little")


@given(samples())
def test_decodes_to_the_encoded_value(sample: Sample) -> None:
    data = encoded(sample.catalog)

    assert same(metadata_file.decode(data), sample.catalog)
    metadata_file.verify_pickle(data)


@given(samples())
def test_pickle_and_manifest_say_the_same(sample: Sample) -> None:
    data = encoded(sample.catalog)
    torchs, ours = pickle.loads(data), metadata_file.decode(data).metadata()

    assert torchs == sample.stock
    assert torchs.state_dict_metadata == dict(ours.state_dict_metadata)
    assert torchs.storage_data == dict(ours.storage_data)
    assert torchs.planner_data == ours.planner_data
    assert (torchs.storage_meta, torchs.version) == (ours.storage_meta, ours.version)


@given(samples())
def test_reads_a_pickle_of_torch(sample: Sample) -> None:
    found = metadata_file.decode(pickle.dumps(sample.stock)).metadata()

    assert dict(found.state_dict_metadata) == sample.stock.state_dict_metadata
    assert dict(found.storage_data) == sample.stock.storage_data
    assert found.planner_data == sample.stock.planner_data
    metadata_file.verify_pickle(pickle.dumps(sample.stock))


def test_a_decoded_catalog_encodes_to_the_same_file() -> None:
    data = encoded(two_tensors())

    assert encoded(metadata_file.decode(data)) == data


def test_torchs_own_reader_opens_the_file(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(encoded(two_tensors()))
    found = FileSystemReader(tmp_path).read_metadata()

    assert found.state_dict_metadata == dict(two_tensors().metadata().state_dict_metadata)
    assert found.storage_data == dict(two_tensors().metadata().storage_data)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_torch_loads_in_torch_with_our_metadata_beside_its_data(
    tmp_path: Path,
) -> None:
    state = {"a": {"w": torch.arange(6.0).reshape(2, 3)}, "step": 7, "list": [torch.ones(2), 1]}
    state_dict_saver.save(state, checkpoint_id=tmp_path)
    path = tmp_path / ".metadata"
    path.write_bytes(encoded(metadata_file.decode(path.read_bytes())))
    target = {"a": {"w": torch.zeros(2, 3)}, "step": 0, "list": [torch.zeros(2), 0]}
    state_dict_loader.load(target, checkpoint_id=tmp_path)

    assert torch.equal(target["a"]["w"], state["a"]["w"])  # type: ignore[index]
    assert torch.equal(target["list"][0], torch.ones(2))  # type: ignore[index]
    assert target["step"] == 7


def test_reads_a_mapped_file(tmp_path: Path) -> None:
    path = tmp_path / ".metadata"
    path.write_bytes(encoded(two_tensors()))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    assert same(metadata_file.decode(mapped), two_tensors())
    assert metadata_file.decode(mapped).index.offset.flags.aligned


def test_a_file_cut_off_anywhere_is_refused() -> None:
    data = encoded(two_tensors())
    for length in range(len(data)):
        with pytest.raises(CheckpointCorruptError):
            metadata_file.decode(data[:length])


def test_a_pickle_of_ours_alone_lacks_its_manifest() -> None:
    data = encoded(two_tensors())

    with pytest.raises(CheckpointCorruptError, match="since a manifest follows"):
        metadata_file.decode(data[: pickle_length(data)])


def test_a_pickle_of_torch_with_something_behind_it_is_refused() -> None:
    data = pickle.dumps(Metadata({}, None, {}))

    with pytest.raises(CheckpointCorruptError, match="ends with a pickle's STOP"):
        metadata_file.decode(data + b"\0")


@pytest.mark.parametrize("bit", [1, 128])
def test_a_bit_changed_behind_the_pickle_is_seen_by_decode(bit: int) -> None:
    data = encoded(two_tensors())
    for at in range(pickle_length(data), len(data)):
        changed = bytearray(data)
        changed[at] ^= bit
        with pytest.raises(CheckpointCorruptError):
            metadata_file.decode(changed)


def test_a_bit_changed_in_the_pickle_is_seen_by_verify_pickle_alone() -> None:
    data = encoded(two_tensors())
    for at in range(pickle_length(data)):
        changed = bytearray(data)
        changed[at] ^= 4
        assert same(metadata_file.decode(changed), two_tensors())
        with pytest.raises(CheckpointCorruptError, match="of the pickle"):
            metadata_file.verify_pickle(changed)


def test_planner_data_is_not_read_from_a_damaged_pickle() -> None:
    catalog = Catalog(two_tensors().index, two_tensors().places, planner_data={"x": [1.5]})
    changed = bytearray(encoded(catalog))
    changed[changed.index(struct.pack(">d", 1.5))] ^= 1

    with pytest.raises(CheckpointCorruptError, match="of the pickle"):
        metadata_file.decode(changed)


def test_another_format_version_is_named() -> None:
    data = bytearray(encoded(two_tensors()))
    body = len(data) - TRAILER_BYTES
    struct.pack_into("<I", data, body + VERSION_AT, 2)
    struct.pack_into("<I", data, len(data) - 4, zlib.crc32(data[body:-4]))

    with pytest.raises(CheckpointCorruptError, match="format version 1, got 2") as caught:
        metadata_file.decode(data)
    assert caught.value.offset == body


@given(st.integers(2, 6), st.sampled_from([0, 1, 40, 1 << 40, (1 << 64) - 1]))
def test_a_trailer_that_names_other_places_is_refused(field: int, number: int) -> None:
    data = bytearray(encoded(two_tensors()))
    body = len(data) - TRAILER_BYTES
    fields = list(struct.unpack_from("<8sIIQQQI", data, body))
    changed = fields[field] != number
    fields[field] = number if field in (3, 4, 5) else number % (1 << 32)
    struct.pack_into("<8sIIQQQI", data, body, *fields)
    struct.pack_into("<I", data, len(data) - 4, zlib.crc32(data[body:-4]))

    if changed:
        with pytest.raises(CheckpointCorruptError):
            verified(data)


def test_an_error_inside_the_manifest_names_its_place_in_the_file() -> None:
    data = bytearray(encoded(two_tensors()))
    start = int.from_bytes(data[-32:-24], "little")
    struct.pack_into("<Q", data, start + 8, 1 << 50)
    body = len(data) - TRAILER_BYTES
    struct.pack_into("<I", data, body + 12, zlib.crc32(data[start:body]))
    struct.pack_into("<I", data, len(data) - 4, zlib.crc32(data[body:-4]))

    with pytest.raises(CheckpointCorruptError, match="a header within") as caught:
        metadata_file.decode(data)
    assert caught.value.offset == start + 8


def metadata_at(path: str = "x", shape: tuple[int, ...] = (2,)) -> Metadata:
    """One tensor of (4,), as torch's metadata has it."""
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size(shape))
    entry = TensorStorageMetadata(TensorProperties(), torch.Size([4]), [chunk])
    places = {MetadataIndex("w", [0], 0): _StorageInfo(path, 0, 9)}
    return Metadata({"w": entry, "b": BytesStorageMetadata()}, None, places)


@pytest.mark.parametrize("path", ["/etc/passwd", "../other/x", "a/../../x", "a\0b"])
def test_a_file_of_torch_that_leaves_the_folder_is_refused(path: str) -> None:
    metadata_file.decode(pickle.dumps(metadata_at()))

    with pytest.raises(CheckpointCorruptError, match="inside the checkpoint's folder"):
        metadata_file.decode(pickle.dumps(metadata_at(path)))


@pytest.mark.parametrize("shape", [(5,), (2, 2), ()])
def test_a_file_of_torch_with_chunks_that_do_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointCorruptError):
        metadata_file.decode(pickle.dumps(metadata_at(shape=shape)))


def test_a_file_that_runs_code_is_refused() -> None:
    with pytest.raises(UnknownGlobalError):
        metadata_file.decode(b"cos\nsystem\n(S'true'\ntR.")


def test_zlib_stands_in_for_isal() -> None:
    assert vars(metadata_file)["crc32"](b"123456789") == zlib.crc32(b"123456789") == 0xCBF43926
