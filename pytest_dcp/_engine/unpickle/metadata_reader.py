"""Reads the pickle of a `.metadata` file: torch's Metadata, its fields checked."""

from __future__ import annotations

import contextlib
import logging

from torch.distributed.checkpoint.metadata import Metadata

from pytest_dcp._engine.unpickle.interpreter import run
from pytest_dcp._engine.unpickle.machine import Vocabulary
from pytest_dcp._engine.unpickle.metadata_classes import METADATA, STEPWISE, check_metadata
from pytest_dcp.errors import CheckpointCorruptError

logger = logging.getLogger("pytest_dcp.checkpoint")

SHOWN = 20
"""How many classes the log names."""


def read_metadata(data: bytes | memoryview, *, to_the_end: bool = False) -> Metadata:
    """The Metadata in a `.metadata` file of torch 2.0 to 2.13.

    to_the_end: whether the pickle must be the whole file; otherwise further bytes are not read.

    Raises:
        CheckpointCorruptError: the pickle or a field is malformed; names the field.
    """
    # Outside of a handler, which would keep the first attempt's objects alive.
    with contextlib.suppress(CheckpointCorruptError):
        return _read_metadata(data, METADATA, to_the_end)
    # Opcode by opcode it may be readable after all; if not, the error names the byte.
    return _read_metadata(data, STEPWISE, to_the_end)


def _read_metadata(data: bytes | memoryview, vocabulary: Vocabulary, to_the_end: bool) -> Metadata:
    unread: set[str] = set()
    metadata = check_metadata(run(data, vocabulary, unread, to_the_end=to_the_end))
    if unread:
        logger.warning(
            "the checkpoint's metadata holds objects of classes that are not known here; they are "
            "kept aside, unread: %s",
            ", ".join(sorted(unread)[:SHOWN]),
        )
    return metadata
