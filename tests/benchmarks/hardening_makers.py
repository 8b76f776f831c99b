"""Makes the folders that `hardening_bombs` opens: hostile ones, and large honest ones.

Each maker gets a new folder and a scale: 1 is used for the reported figures, less for a quick look.
The reader's memory limit follows from the bytes that the maker leaves on the disk.
"""

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine_plans import CHUNKS, big_catalog
from isal.isal_zlib import crc32
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint._extension import ZStandard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format import manifest_columns, metadata_file, metadata_trailer
from pytest_dcp._engine.format.entry import value_entry
from pytest_dcp._engine.huggingface.file_names import INDEX_NAME

MIB = 1 << 20
NAMES = 1_000_000
"""Tensors of a hostile index, each in a file of its own."""
COLLIDING_KEYS = 45_000
MODULUS = (1 << 61) - 1
"""Python's hash of an int is its remainder by this: its multiples all have the hash 0."""
CHUNK_BYTES = 1 << 16

Maker = Callable[[Path, float], object]


def make_sparse_metadata(folder: Path, scale: float) -> None:
    """A pickle of torch's with a hole of 1.9 GiB before its STOP."""
    path = folder / ".metadata"
    path.write_bytes(pickle.dumps({})[:-1])
    os.truncate(path, int(1900 * MIB * scale))
    with path.open("ab") as file:
        file.write(b".")


def make_sparse_manifest(folder: Path, scale: float) -> None:
    """A manifest with a hole of 3 GiB, and a trailer whose checksums are true."""
    start, content = _honest_parts(folder)
    hole_bytes = int(48 * scale) * 64 * MIB
    crc = crc32(content)
    for _ in range(hole_bytes // (64 * MIB)):
        crc = crc32(bytes(64 * MIB), crc)
    path = folder / ".metadata"
    os.truncate(path, start + len(content) + hole_bytes)
    with path.open("ab") as file:
        file.write(_trailer(path, start, len(content) + hole_bytes, crc))


def make_manifest_header(folder: Path, scale: float) -> None:
    """A manifest whose header is 15 MB of empty lists."""
    start, _ = _honest_parts(folder)
    text = b'{"a":[' + b"[]," * int(5 * MIB * scale) + b"0]}"
    body = manifest_columns.MAGIC + struct.pack("<Q", len(text)) + text
    path = folder / ".metadata"
    with path.open("ab") as file:
        os.truncate(path, start)
        file.write(body + _trailer(path, start, len(body), crc32(body)))


def _honest_parts(folder: Path) -> tuple[int, bytes]:
    """Where the manifest of a small honest checkpoint begins, which is left here, and its bytes."""
    dcp.save({"w": torch.ones(4)}, checkpoint_id=folder, no_dist=True)
    path = folder / ".metadata"
    data = path.read_bytes()
    (folder / "old trailer").write_bytes(data[-metadata_trailer.TRAILER_BYTES :])
    trailer = metadata_file._trailer(memoryview(data))
    assert trailer is not None
    start = trailer.manifest_start
    os.truncate(path, start + trailer.manifest_length)
    return start, data[start : start + trailer.manifest_length]


def _trailer(path: Path, start: int, length: int, crc: int) -> bytes:
    """A valid trailer for another manifest, which replaces the honest one."""
    old = metadata_trailer.read_trailer(memoryview((path.parent / "old trailer").read_bytes()), 0)
    return metadata_trailer.Trailer(crc, start, length, old.pickle_length, old.pickle_crc).pack()


def make_compressed_value(folder: Path, _scale: float, mib: int) -> None:
    """Zeros that zstd has made small."""
    writer = dcp.FileSystemWriter(folder, _extensions=[ZStandard()])
    dcp.save({"v": bytes(mib * MIB)}, storage_writer=writer, no_dist=True)


def make_header_of_lists(folder: Path, scale: float) -> None:
    """A safetensors header of 90 MB of empty lists."""
    _write_header(folder, b'{"a":[' + b"[]," * int(30 * MIB * scale) + b"0]}")


def make_header_of_strings(folder: Path, scale: float) -> None:
    """A safetensors header with 90 MB of `__metadata__`."""
    items = b"".join(b'"%d":"",' % n for n in range(int(7.5 * MIB * scale)))
    _write_header(folder, b'{"__metadata__":{' + items + b'"":""}}')


def _write_header(folder: Path, text: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


def make_index_of_names(folder: Path, scale: float) -> None:
    """An index of 10^6 tensors, each in a file of its own; none of them is there."""
    weights = {f"{n}": f"{n}.safetensors" for n in range(int(NAMES * scale))}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weights}))


class _Crafted(dcp.DefaultSavePlanner):
    """Saves a pickle made by hand as the entry of each value."""

    def __init__(self, crafted: bytes) -> None:
        super().__init__()
        self.crafted = crafted

    def resolve_data(self, write_item: Any) -> Any:
        return io.BytesIO(value_entry(self.crafted))


def _save_crafted(folder: Path, crafted: bytes) -> None:
    dcp.save({"v": 1}, checkpoint_id=folder, planner=_Crafted(crafted), no_dist=True)


def _long(number: int) -> bytes:
    data = pickle.encode_long(number)
    return b"\x8a" + bytes([len(data)]) + data  # LONG1


def make_colliding_counter(folder: Path, scale: float) -> None:
    """A Counter whose keys all have the hash 0: to build it takes time by its square."""
    count = int(COLLIDING_KEYS * scale)
    items = b"".join(_long(n * MODULUS) + b"K\x01" for n in range(count))
    _save_crafted(folder, b"\x80\x02ccollections\nCounter\n}(" + items + b"u\x85R.")


def make_bytearray(folder: Path, scale: float) -> None:
    """61 bytes that ask for a bytearray of 2 GiB."""
    call = b"c__builtin__\nbytearray\n" + _long(int(scale * (1 << 31))) + b"\x85R."
    _save_crafted(folder, b"\x80\x02" + call)


def make_chunks(folder: Path, scale: float, chunks: int) -> None:
    """The `.metadata` of a large save of ours; the data are not there."""
    catalog = big_catalog(max(int(chunks * scale) // CHUNKS, 1), CHUNK_BYTES, folder)
    (folder / ".metadata").write_bytes(b"".join(metadata_file.encode(catalog)))


def make_chunks_of_torch(folder: Path, scale: float, chunks: int) -> None:
    """The `.metadata` that torch would write of such a save."""
    make_chunks(folder, scale, chunks)
    stock = filesystem.FileSystemReader(folder).read_metadata()
    (folder / ".metadata").write_bytes(pickle.dumps(stock))
