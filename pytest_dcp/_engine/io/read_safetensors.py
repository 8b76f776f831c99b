"""The header of an open safetensors file."""

from __future__ import annotations

from pytest_dcp._engine.format.memory_limit import DEFAULT_LIMIT, MemoryLimit
from pytest_dcp._engine.format.safetensors_header import (
    LENGTH_BYTES,
    Header,
    decode,
    header_length,
)
from pytest_dcp._engine.io.disk import In
from pytest_dcp.errors import CheckpointCorruptError


def read_header(file: In, name: str, limit: MemoryLimit = DEFAULT_LIMIT) -> Header:
    """The header of an open file. Raises CheckpointCorruptError naming the file."""

    def content(offset: int, nbytes: int) -> memoryview:
        view = memoryview(bytearray(nbytes))
        return view[: file.read_into(offset, view)]

    try:
        length = header_length(content(0, LENGTH_BYTES), file.size)
        return decode(content(LENGTH_BYTES, length), file.size, limit)
    except CheckpointCorruptError as error:
        raise error.at(file=name) from error
