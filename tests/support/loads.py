"""A good checkpoint, and what loads of what was made of it end with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.verbs.load import load_without_template
from pytest_dcp.checkpoint.filesystem import FileSystemReader
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError

SAVERS = {"ours": dcp.save, "torch": torch_save}


def state() -> dict[str, Any]:
    return {
        "w": torch.arange(1.0, 25.0).reshape(4, 6),
        "half": torch.ones(9, dtype=torch.bfloat16),
        "v": [1, "two"],
    }


def blank() -> dict[str, Any]:
    return {"w": torch.zeros(4, 6), "half": torch.zeros(9, dtype=torch.bfloat16), "v": None}


def save(folder: Path, saver: str = "ours") -> Path:
    """A good checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SAVERS[saver](state(), checkpoint_id=folder)  # type: ignore[operator]  # both take these
    return folder


def load(folder: Path) -> None:
    """Into a template."""
    dcp.load(blank(), storage_reader=FileSystemReader(folder, thread_count=1))


def load_all(folder: Path) -> None:
    """Without a template."""
    load_without_template(checkpoint_id=folder)


def load_rank(folder: Path) -> None:
    """The metadata of rank 0 alone."""
    FileSystemReader(folder).read_metadata(rank=0)


def ending(load: Any, folder: Path) -> str:
    """How a load ends: "refused" as bad, of "another shape", "loaded", or another error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(folder)
    except CheckpointCorruptError:
        return "refused"
    except dcp.CheckpointException as error:
        ((cause, _),) = error.failures.values()
        if isinstance(cause, CheckpointMismatchError):
            return "another shape"
        if isinstance(cause, CheckpointCorruptError):
            is_located = cause.file is not None or cause.entry is not None
            return "refused" if is_located else f"neither file nor entry in: {cause}"
        return repr(cause)
    except Exception as error:  # noqa: BLE001 - none may leave a load
        return f"left the load: {error!r}"
    return "loaded"
