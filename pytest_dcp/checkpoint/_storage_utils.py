"""The storage for a checkpoint id: torch's private name, on our storages."""

import os
from typing import TYPE_CHECKING

from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from pytest_dcp._engine.torch_names import names_of_torch
from pytest_dcp._engine.verbs.storage_for_id import reader_for, reset_to, writer_for


def _storage_setup(
    storage: StorageReader | StorageWriter | None,
    checkpoint_id: str | os.PathLike[str] | None,
    reader: bool = False,
) -> StorageReader | StorageWriter:
    """The storage, set to the id; a new one of ours if it is None."""
    if reader:
        assert storage is None or isinstance(storage, StorageReader)
        return reader_for(storage, checkpoint_id)
    assert storage is None or isinstance(storage, StorageWriter)
    if (reset := reset_to(storage, checkpoint_id)) is not None:
        reset()
    return writer_for(storage, checkpoint_id)


if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
