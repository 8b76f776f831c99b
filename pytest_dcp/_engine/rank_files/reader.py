"""Reads one rank's file of `torch.save`: all of it, or into an existing state dict.

The file is mapped and decoded by the engine's own reader, which checks the records' checksums,
bounds memory and runs no code of the file. Two files are then read by `torch.load`: those with
classes that our reader does not know, if `weights_only=False` allows them, and any file if
`map_location` asks where each storage was.
"""

from __future__ import annotations

import io
import logging
import mmap
import os
from pathlib import Path
from typing import Any

import torch

from pytest_dcp._engine.format.python_values import decode_value
from pytest_dcp._engine.rank_files.writer import file_name
from pytest_dcp._engine.staging.deep_copy import DeepCopy
from pytest_dcp._torch_internals.rank_files import CheckpointReaderOfTorch, RankInfo
from pytest_dcp._torch_internals.tensors import identity_of_storage
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

logger = logging.getLogger("pytest_dcp.checkpoint")

MANY = 10
"""Missing keys that a warning lists."""


class CheckpointReader(CheckpointReaderOfTorch):
    """Reads state dicts of one rank.

    torch's class of this name is a base for the sake of `isinstance`; all methods are ours.
    """

    def __init__(self, rank_info: RankInfo) -> None:
        self._rank_info = rank_info

    def read(  # type: ignore[override]  # torch annotates **kwargs as dicts
        self,
        path: str,
        state_dict: dict[str, Any] | None = None,
        *,
        map_location: Any = None,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], list[str]]:
        """The rank's state dict in the folder `path`, and the keys that the file lacks.

        state_dict: filled in place: only its keys are read, its tensors keep their memory, and a
            key with the value None gets the file's value. None: the file's whole state dict.
        map_location: the device of new tensors, or another value for `torch.load`; None: the CPU.
        weights_only: False allows values of any class, and loading them can run code.
        kwargs: further options of `torch.load`; they have no effect.

        Raises FileNotFoundError; CheckpointCorruptError for a damaged file; UntrustedPickleError
        for a class that `weights_only` does not allow; RuntimeError, naming the key, for a value of
        another shape, dtype or class than the state dict's.
        """
        file = Path(path) / file_name(self._rank_info)
        if not file.exists():
            raise FileNotFoundError(f"Checkpoint file not found at {file}")
        share = state_dict is not None
        stored = _read_file(file, map_location, share=share, trust=not weights_only)
        if state_dict is None:
            return stored, []
        return self._partial_read(file, state_dict, stored=stored)

    def _partial_read(  # type: ignore[override]  # torch's reads the file itself
        self, file_path: Path, state_dict: dict[str, Any], *, stored: Any
    ) -> tuple[dict[str, Any], list[str]]:
        """Fill the state dict from the stored one."""
        missing: list[str] = []
        with torch.no_grad():
            filled = _fill(state_dict, stored, "", missing)
        if missing:
            more = f" (and {len(missing) - MANY} more)" if len(missing) > MANY else ""
            logger.warning("%s lacks the keys %s%s", file_path, missing[:MANY], more)
        return filled, missing


def _read_file(file: Path, map_location: Any, *, share: bool, trust: bool) -> Any:
    """The stored value.

    share: whether its tensors may lie in the file's mapping.
    """
    with open(file, "rb") as opened:
        if os.fstat(opened.fileno()).st_size == 0:
            raise CheckpointCorruptError(
                "expected a file of torch.save, got an empty one", file=os.fspath(file)
            )
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    by_storage = callable(map_location) or isinstance(map_location, dict)
    try:
        stored = decode_value(memoryview(mapped), share=share or by_storage)
    except UntrustedPickleError:
        if not trust:
            raise
        return torch.load(
            io.BytesIO(mapped), map_location=map_location or "cpu", weights_only=False
        )
    except CheckpointCorruptError as error:
        raise error.at(file=os.fspath(file)) from error
    if by_storage:
        return torch.load(io.BytesIO(mapped), map_location=map_location, weights_only=True)
    return stored if _is_cpu(map_location) else _move(stored, map_location)


def _is_cpu(map_location: Any) -> bool:
    return map_location is None or torch.device(map_location) == torch.device("cpu")


def _move(value: Any, device: Any) -> Any:
    """A copy of the value with its storages on the device; tied tensors stay tied."""
    copying = DeepCopy(device=device)
    moved = copying.copy(value)
    copies = {identity_of_storage(one): _move_storage(one, device) for one in copying.storages()}
    copying.settle(lambda storage: copies[identity_of_storage(storage)])
    return moved


def _move_storage(storage: torch.UntypedStorage, device: Any) -> torch.UntypedStorage:
    raw = torch.empty(0, dtype=torch.uint8).set_(storage)
    return raw.to(device, copy=True).untyped_storage()


def _fill(target: Any, stored: Any, key: str, missing: list[str]) -> Any:
    """The target with the stored values: its tensors filled, everything else replaced."""
    typed_target: Any = target  # mypy knows it as `object` after the check of its class.
    kind = torch.Tensor if isinstance(stored, torch.Tensor) else type(stored)
    if target is not None and not isinstance(target, kind):
        raise RuntimeError(
            f"Target value {key} is a {type(target).__name__}, but the checkpoint has a "
            f"{type(stored).__name__}"
        )
    if isinstance(stored, torch.Tensor):
        return _fill_tensor(typed_target, stored, key)
    if isinstance(stored, dict):
        target = dict.fromkeys(stored) if target is None else target
        for name in list(target):
            below = f"{key}.{name}" if key else f"{name}"
            if name in stored:
                target[name] = _fill(target[name], stored[name], below, missing)
            else:
                missing.append(below)
        return target
    if isinstance(stored, list):
        targets = [*(typed_target or ()), *[None] * len(stored)]
        return [_fill(targets[n], one, f"{key}[{n}]", missing) for n, one in enumerate(stored)]
    return stored


def _fill_tensor(target: torch.Tensor | None, stored: torch.Tensor, key: str) -> torch.Tensor:
    if target is None:
        return stored.clone()
    if target.size() != stored.size() or target.dtype != stored.dtype:
        raise RuntimeError(
            f"Target tensor size={target.size()} dtype={target.dtype} does not match source tensor "
            f"size={stored.size()} dtype={stored.dtype} for key {key}"
        )
    return target.copy_(stored)
