"""The index of a Hugging Face folder, which maps every tensor to its file <-> JSON.

A folder of shards has none. An index that the engine wrote also holds the id of the save.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pytest_dcp._engine.format.catalog_checks import checked_path
from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit
from pytest_dcp._engine.format.safetensors_header import parse_json
from pytest_dcp._engine.huggingface.file_names import INDEX_NAME, SAVE_KEY
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp.errors import CheckpointCorruptError

MAX_INDEX_BYTES = 100_000_000
"""The same limit as for a header, which holds as much for each tensor."""


def encode_index(weight_map: Mapping[str, str], total_bytes: int, save_id: str | None) -> bytes:
    """The bytes of the index; without a save's id if the files have none."""
    metadata = {"total_size": total_bytes} | ({SAVE_KEY: save_id} if save_id else {})
    index = {"metadata": metadata, "weight_map": weight_map}
    return json.dumps(index, indent=2).encode()


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """The contents of an index."""

    weight_map: Mapping[str, str]
    save_id: str | None
    """None in an index that the engine did not write."""


def read_index(folder: Folder, limit: MemoryLimit = DEFAULT_LIMIT) -> WeightIndex | None:
    """The folder's index, or None if there is none."""
    if not folder.exists(INDEX_NAME):
        return None
    with folder.open(INDEX_NAME) as file:
        if file.size > MAX_INDEX_BYTES:
            raise CheckpointCorruptError(
                f"expected an index of at most {MAX_INDEX_BYTES} bytes, got {file.size}",
                file=INDEX_NAME,
            )
        view = memoryview(bytearray(file.size))
        view = view[: file.read_into(0, view)]
    try:
        return decode_index(view, limit)
    except CheckpointCorruptError as error:
        raise error.at(file=INDEX_NAME) from error


def decode_index(text: bytes | memoryview, limit: MemoryLimit = DEFAULT_LIMIT) -> WeightIndex:
    """The contents of an index's bytes. Raises CheckpointCorruptError."""
    index = parse_json(text, "the index", limit)
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise CheckpointCorruptError("expected a weight_map and metadata, got others")
    for fqn, name in weight_map.items():
        if type(name) is not str:
            raise CheckpointCorruptError(f"expected a file's name, got {name!r:.200}", entry=fqn)
    for name in set(weight_map.values()):
        checked_path(name)
    save_id = metadata.get(SAVE_KEY)
    return WeightIndex(weight_map, save_id if type(save_id) is str else None)
