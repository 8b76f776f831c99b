"""Small files beside the data of a run: notes, and the ledger of shared files."""

from __future__ import annotations

from contextlib import suppress

from pytest_dcp._engine.io.folder import Folder
from pytest_dcp.errors import CheckpointCorruptError

MOST_NOTES_BYTES = 1 << 20


def write_small(folder: Folder, name: str, content: bytes) -> None:
    """Replace a small file in one step, durably."""
    temporary = f"{name}.tmp" if folder.disk.renames else name
    with folder.create(temporary) as out:
        out.write([content])
        out.sync()
    if temporary != name:
        folder.replace(temporary, name)
        folder.sync()


def read_small(folder: Folder, name: str, most_bytes: int = MOST_NOTES_BYTES) -> bytes:
    """The bytes of a small file; none if it is missing, or no file of ours: too large, a folder."""
    with suppress(FileNotFoundError, CheckpointCorruptError), folder.open(name) as file:
        if file.size <= most_bytes:
            content = bytearray(file.size)
            count = file.read_into(0, memoryview(content))
            return bytes(content[:count])
    return b""
