"""Runs with incremental steps, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint import CheckpointManager
from support.runs import manager_of

SHARED = torch.arange(60_000.0).reshape(300, 200)


def incremental(root: Path, **keywords: Any) -> CheckpointManager:
    return manager_of(root, incremental=True, **keywords)


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def data_files(root: Path, step: int) -> dict[str, int]:
    """The data files of a step: the inode of each."""
    return {path.name: path.stat().st_ino for path in folder_of(root, step).glob("*.distcp")}


def bytes_on_disk(root: Path) -> int:
    """Of all files, each file once however many names it has."""
    found = [path.stat() for path in root.rglob("*") if path.is_file()]
    return sum({one.st_ino: one.st_size for one in found}.values())


def mostly_frozen(step: int) -> dict[str, Any]:
    """A frozen matrix and a small one that changes with each step."""
    return {"frozen": SHARED, "moving": torch.full((50,), float(step)), "step": step}


def blank_like(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else None
        for name, value in state.items()
    }


def load_step(folder: Path, like: dict[str, Any]) -> dict[str, Any]:
    state = blank_like(like)
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def assert_holds(folder: Path, expected: dict[str, Any]) -> None:
    """The folder is a whole checkpoint, with these very values."""
    actual = load_step(folder, expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(actual[name], value), f"{name} of {folder.name}"
        else:
            assert actual[name] == value, f"{name} of {folder.name}"


def save_all(manager: CheckpointManager, states: dict[int, dict[str, Any]]) -> None:
    for step, state in states.items():
        manager.save(step, state)


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
