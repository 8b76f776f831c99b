"""Writing one item to a stream, and distributing items to files, for storages that do this
themselves.

Storages written for torch have functions of these names from torch's `filesystem` module.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.format.entry import tensor_frame
from pytest_dcp._engine.io.stream_disk import StreamOut
from pytest_dcp._engine.io.tensor_memory import pieces
from pytest_dcp._engine.io.write_files import PIECE_BYTES, balance_by_bytes
from pytest_dcp._engine.plan.columns import WriteItems
from pytest_dcp._torch_internals.checkpoint_classes import _StorageInfo


def write_item(
    transforms: Any,
    stream: io.IOBase,
    data: io.BytesIO | torch.Tensor,
    write_item: WriteItem,
    storage_key: str,
    serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
) -> WriteResult:
    """Append the item's entry to the stream; returns where it went.

    transforms: with `transform_save_stream`, as a storage's `transforms`. storage_key: the file's
    name in the metadata. In the safetensors format tensors are not written here: the caller writes
    them together.
    """
    start = stream.tell()
    through, descriptors = transforms.transform_save_stream(write_item, stream)
    whole = serialization_format == SerializationFormat.TORCH_SAVE
    if isinstance(data, io.BytesIO):
        if write_item.type != WriteItemType.BYTE_IO:
            raise TypeError(f"{write_item.index.fqn!r} is planned as a tensor, and is a BytesIO")
        StreamOut(through).write([data.getbuffer()])
    elif write_item.type == WriteItemType.BYTE_IO:
        raise TypeError(f"{write_item.index.fqn!r} is planned as a BytesIO, and is a tensor")
    elif whole:
        _write_tensor(StreamOut(through), data.detach())
    through.close()
    grown = whole or isinstance(data, io.BytesIO)
    length = stream.tell() - start if grown else data.numel() * data.itemsize  # type: ignore[union-attr]  # a tensor
    place = _StorageInfo(storage_key, start, length, descriptors or None)
    return WriteResult(write_item.index, length, place)


def _write_tensor(out: StreamOut, tensor: torch.Tensor) -> None:
    frame = tensor_frame(tensor.dtype, tuple(tensor.shape))
    out.write([frame.head])
    crc = 0
    for piece in pieces(tensor, PIECE_BYTES):
        crc = crc32(piece, crc)
        out.write([piece])
    out.write([frame.tail(crc)])


def split_by_size_and_type(bins: int, items: list[WriteItem]) -> list[list[WriteItem]]:
    """The items in `bins` lists of nearly equal bytes."""
    if bins == 1:
        return [items]
    groups = balance_by_bytes(WriteItems.of(items).size_bytes(), bins)
    split = [[items[row] for row in group] for group in groups]
    return split + [[] for _ in range(bins - len(split))]
