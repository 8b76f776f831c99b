"""Attributes that planners and frameworks set on a Metadata, as bytes. Pure (no I/O).

Megatron-Core keeps the plans of all ranks there, for one. They are pickled in torch's own terms, so
that torch alone can read them, and read back by the bounded reader, as all of `.metadata` is.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from pytest_dcp._engine.plan.columns import ItemTable
from pytest_dcp._engine.plan.index import further_fields
from pytest_dcp._engine.unpickle import read_metadata
from pytest_dcp._torch_internals.checkpoint_classes import _StoragePrefix
from pytest_dcp.errors import PlanError

_PROTOCOL = 4


class PlainPickler(pickle.Pickler):
    """Writes the stand-ins for torch's objects as those objects."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, ItemTable):
            return list, (), None, iter(value)
        if isinstance(value, _StoragePrefix) and type(value) is not _StoragePrefix:
            return _StoragePrefix, (value.prefix,)
        return NotImplemented


def encode_further(further: Mapping[str, Any], beside: Mapping[Any, Any]) -> bytes:
    """The attributes, and places beside the index, as a pickle.

    Raises PlanError, naming it, for an attribute that cannot be pickled.
    """
    buffer = io.BytesIO()
    for name, value in further.items():
        try:
            PlainPickler(io.BytesIO(), _PROTOCOL).dump(value)
        except Exception as error:
            raise PlanError(
                f"the attribute {name!r} that was set on the Metadata cannot be pickled: {error}"
            ) from error
    metadata = Metadata({}, storage_data=dict(beside) or None)
    vars(metadata).update(further)
    PlainPickler(buffer, _PROTOCOL).dump(metadata)
    return buffer.getvalue()


def decode_further(data: bytes | memoryview) -> tuple[dict[str, Any], Mapping[Any, Any]]:
    """The argument of `encode_further`. Raises CheckpointCorruptError for other bytes."""
    metadata = read_metadata(data)
    return further_fields(metadata), metadata.storage_data or {}
