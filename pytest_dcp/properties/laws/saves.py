"""Repeated saves: the same state gives the same checkpoint, and no leftovers."""

from __future__ import annotations

from pathlib import Path

import pytest_dcp.checkpoint as checkpoint
from pytest_dcp.properties.laws.engine import Engine
from pytest_dcp.properties.laws.steps import (
    Folder,
    blank,
    enter,
    load,
    load_into,
    save,
    save_state,
)
from pytest_dcp.properties.placed import Placed
from pytest_dcp.properties.subworlds import Stages, on_first_ranks


def assert_idempotent_save(placed: Placed, folder: Folder, *, dcp: Engine = checkpoint) -> None:
    """Save twice, load, save the loaded state: the same checkpoint each time, without leftovers.

    The same means: it loads to the same state, and has the same number of files of the same sizes.
    """
    __tracebackhide__ = True
    enter(placed)
    one, two = Path(folder) / "one", Path(folder) / "two"
    save(dcp, placed, one)
    sizes = _sizes(one)
    save(dcp, placed, one)
    load(dcp, placed, one, "loading the state saved twice")

    def again() -> Stages:
        state = blank(placed)
        yield
        load_into(dcp, placed, one, state)
        yield
        save_state(dcp, placed, state, two)
        return [
            f"{path}: expected files of {sizes} bytes, got {_sizes(path)}"
            for path in (one, two)
            if _sizes(path) != sizes
        ]

    on_first_ranks(placed.world_size, "saving the loaded state", again)
    load(dcp, placed, two, "loading the loaded state, saved again")


def _sizes(folder: Path) -> list[int]:
    """The sizes of the files; none if the storage keeps no files."""
    return sorted(path.stat().st_size for path in folder.rglob("*") if path.is_file())
