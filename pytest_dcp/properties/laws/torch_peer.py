"""torch's own engine as the peer: each engine loads the other's checkpoints."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest_dcp.checkpoint as checkpoint
from pytest_dcp.properties.laws.engine import Engine
from pytest_dcp.properties.laws.steps import Folder, enter, load, save
from pytest_dcp.properties.placed import Placed

TORCH: Any = importlib.import_module("torch.distributed.checkpoint")
"""Typed as Any: torch re-exports its names without declaring so to a type checker."""


def assert_same_as_torch(
    saved: Placed, loaded: Placed, folder: Folder, *, dcp: Engine = checkpoint
) -> None:
    """Each engine loads the other's checkpoint, to the bit."""
    __tracebackhide__ = True
    enter(saved, loaded)
    ours, torchs = Path(folder) / "ours", Path(folder) / "torchs"
    save(dcp, saved, ours)
    load(TORCH, loaded, ours, "loading this engine's checkpoint with torch's engine")
    save(TORCH, saved, torchs)
    load(dcp, loaded, torchs, "loading the checkpoint of torch's engine")
