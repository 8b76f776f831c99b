"""The subject of the laws: any engine that saves and loads like `torch.distributed.checkpoint`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

import pytest_dcp.checkpoint as checkpoint
from pytest_dcp.properties.subworlds import agree


class Engine(Protocol):
    """A module or an object with these two functions, which are called with only these
    arguments.
    """

    def save(
        self,
        state_dict: dict[str, Any],
        *,
        checkpoint_id: str | os.PathLike[str],
        process_group: dist.ProcessGroup | None,
    ) -> Any: ...

    def load(
        self,
        state_dict: dict[str, Any],
        *,
        checkpoint_id: str | os.PathLike[str],
        process_group: dist.ProcessGroup | None,
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class WithStorage:
    """An engine that always uses storages that it makes itself."""

    writer: Callable[[str | os.PathLike[str]], StorageWriter]
    reader: Callable[[str | os.PathLike[str]], StorageReader]
    engine: Any = checkpoint
    """A module with torch's `save` and `load`."""

    def save(
        self,
        state_dict: dict[str, Any],
        *,
        checkpoint_id: str | os.PathLike[str],
        process_group: dist.ProcessGroup | None = None,
    ) -> Any:
        """Save like the engine, with the storage's writer."""
        writer = agree("making the writer", process_group, lambda: self.writer(checkpoint_id))
        return self.engine.save(state_dict, storage_writer=writer, process_group=process_group)

    def load(
        self,
        state_dict: dict[str, Any],
        *,
        checkpoint_id: str | os.PathLike[str],
        process_group: dist.ProcessGroup | None = None,
    ) -> Any:
        """Load like the engine, with the storage's reader."""
        reader = agree("making the reader", process_group, lambda: self.reader(checkpoint_id))
        return self.engine.load(state_dict, storage_reader=reader, process_group=process_group)


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Ignore torch's warnings about situations that laws create on purpose.

    No process group, a checkpoint that is replaced, rare dtypes, meta tensors, layers whose output
    is a view.
    """
    with warnings.catch_warnings():
        for text in (
            "torch.distributed is disabled, unavailable or uninitialized",
            "Detected an existing checkpoint",
            "TypedStorage is deprecated",
            "ComplexHalf support is experimental",
            "`_get_pg_default_device` will be deprecated",
            "Multiple backends are registered with this ProcessGroup",
            "FSDP2-wrapped module .* returned a view tensor",
        ):
            warnings.filterwarnings("ignore", message=text)
        yield
