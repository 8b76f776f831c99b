"""Making read and write items, for planners that do it themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItem

from pytest_dcp._engine.plan.boxes import pad_rows
from pytest_dcp._engine.plan.describe import Wanted, wanted_boxes, write_items
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.load import Everything, read_items

__all__ = ["create_read_items_for_chunk_list"]


def create_read_items_for_chunk_list(
    fqn: str,
    checkpoint_md: TensorStorageMetadata,
    local_chunks: Sequence[ChunkStorageMetadata],
) -> list[ReadItem]:
    """The reads that fill these boxes of a tensor, where its stored chunks overlap them.

    Raises CheckpointCorruptError when stored chunks overlap each other.
    """
    rank = len(checkpoint_md.size)
    count = len(local_chunks)
    targets = Wanted(
        fqns=(fqn,) * count,
        ndim=np.full(count, rank, dtype=np.int16),
        offset=pad_rows([tuple(chunk.offsets) for chunk in local_chunks], rank, 0),
        shape=pad_rows([tuple(chunk.sizes) for chunk in local_chunks], rank, 1),
        nth=np.arange(count, dtype=np.int64),
    )
    return list(read_items(targets, Index.of({fqn: checkpoint_md}), partial=Everything()))


def _create_write_items(fqn: str, object: Any) -> list[WriteItem]:
    """This rank's write items for one value (torch's name; other libraries import it)."""
    return list(write_items({fqn: object}))


def _create_read_items(fqn: str, md: STORAGE_TYPES, obj: Any) -> list[ReadItem]:
    """This rank's read items for one value (torch's name; other libraries import it).

    If the stored tensor has another size, only the overlap is read.
    """
    if isinstance(md, BytesStorageMetadata):
        obj = None
    elif not isinstance(obj, torch.Tensor):
        raise ValueError(  # noqa: TRY004 - torch raises the same
            f"Invalid checkpoint metadata for {fqn}, expected BytesStorageMetadata but found "
            f"{type(md)}"
        )
    return list(read_items(wanted_boxes({fqn: obj}), Index.of({fqn: md}), partial=Everything()))
