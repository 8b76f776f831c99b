"""Runs of few small steps, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pytest_dcp.checkpoint import CheckpointManager


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((8,), float(step)), "step": step}


def blank() -> dict[str, Any]:
    return {"w": torch.zeros(8), "step": -1}


def manager_of(root: Path | str, **keywords: Any) -> CheckpointManager:
    return CheckpointManager(root, no_dist=True, **keywords)


def save_steps(root: Path | str, *steps: int, **keywords: Any) -> CheckpointManager:
    """Save these steps; their manager."""
    manager = manager_of(root, **keywords)
    for step in steps:
        manager.save(step, state_of(step))
    return manager


def whole_steps(manager: CheckpointManager) -> list[int]:
    return [step.number for step in manager.steps() if step.is_whole]
