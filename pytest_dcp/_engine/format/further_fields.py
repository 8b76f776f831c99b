"""Attributes that planners and frameworks set on a Metadata, as bytes. Pure (no I/O).

Megatron-Core, for example, keeps the plans of all ranks there. They are pickled as torch's own
objects, so that torch can read them without this package, and read back by the bounded reader, like
all of `.metadata`.
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
    """Pickles the engine's stand-ins for torch's objects as torch's objects."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, ItemTable):
            return list, (), None, iter(value)
        if isinstance(value, _StoragePrefix) and type(value) is not _StoragePrefix:
            return _StoragePrefix, (value.prefix,)
        return NotImplemented


def encode_further(further: Mapping[str, Any], beside: Mapping[Any, Any]) -> bytes:
    """The attributes, and the places of items not in the index, as a pickle.

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
    """Decode the bytes of `encode_further`. Raises CheckpointCorruptError for other bytes."""
    metadata = read_metadata(data)
    return further_fields(metadata), metadata.storage_data or {}
