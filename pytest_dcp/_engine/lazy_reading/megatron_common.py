"""The `common.pt` of a checkpoint of Megatron-Core: its plain values and tensors, read inertly.

`megatron.core.dist_checkpointing` writes a folder that is a checkpoint of DCP, and beside it
`common.pt`, a file of `torch.save` with everything that is not sharded: the iteration, the
arguments, the scheduler's state. It may hold objects of Megatron's own classes, of which only the
names are read; no code of it runs, and nothing is imported.
"""

from __future__ import annotations

from typing import Any

from pytest_dcp._engine.format.entry import records_of
from pytest_dcp._engine.format.memory_limit import MemoryLimit
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.unpickle.stored_tensors import read_inert_values
from pytest_dcp.errors import CheckpointCorruptError

COMMON = "common.pt"


def read_common(folder: Folder, memory: MemoryLimit) -> dict[str, Any]:
    """The state dict in the folder's `common.pt`; empty without the file.

    Raises CheckpointCorruptError, naming the file, if it is damaged, holds something else than a
    dict, or would take more memory than the limit.
    """
    try:
        with folder.open(COMMON) as file:
            memory.check(f"a {COMMON}", file.size, file.stored_bytes)
            content = memoryview(bytearray(file.size))
            file.read_into(0, content)
    except FileNotFoundError:
        return {}
    try:
        return _decode_dict(content)
    except CheckpointCorruptError as error:
        raise error.at(file=COMMON) from error


def _decode_dict(content: memoryview) -> dict[str, Any]:
    records = records_of(content)
    found = read_inert_values(records("data.pkl"), lambda key: records(f"data/{key}"))
    if not isinstance(found, dict):
        raise CheckpointCorruptError(f"expected a dict, got a {type(found).__name__}")
    return {str(key): value for key, value in found.items()}
