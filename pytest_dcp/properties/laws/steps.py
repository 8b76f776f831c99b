"""The steps of laws, each run by the first ranks of a world: save, load, compare."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any, Protocol

from pytest_dcp.properties.differences import differences
from pytest_dcp.properties.laws.engine import Engine, expected_warnings
from pytest_dcp.properties.meshes import MeshSpec
from pytest_dcp.properties.placed import Placed, empty_state
from pytest_dcp.properties.subworlds import Stages, check_room, first_ranks, on_first_ranks


class Sized(Protocol):
    """An object that specifies how many ranks it needs, in which meshes."""

    @property
    def world_size(self) -> int: ...

    @property
    def meshes(self) -> tuple[MeshSpec, ...]: ...


Folder = str | PathLike[str]
Prepare = Callable[[Placed], dict[str, Any]]
"""Returns the state dict to be loaded into."""


def enter(*placed: Sized) -> None:
    """Create the meshes and groups needed. Collective over all ranks of the world."""
    __tracebackhide__ = True
    for one in placed:
        check_room(one.world_size)
        first_ranks(one.world_size)
        for mesh in one.meshes:
            mesh.build()


def save(dcp: Engine, placed: Placed, folder: Folder) -> None:
    """Save the state, which must be unchanged afterwards."""
    __tracebackhide__ = True

    def step() -> Stages:
        state = placed.state()
        yield
        save_state(dcp, placed, state, folder)
        return differences(state, placed.full())

    on_first_ranks(placed.world_size, "saving, which leaves the state as it is", step)


def save_state(dcp: Engine, placed: Sized, state: dict[str, Any], folder: Folder) -> None:
    """Save this rank's state dict. Collective over the ranks that hold it."""
    with expected_warnings():
        dcp.save(state, checkpoint_id=folder, process_group=first_ranks(placed.world_size))


def load_into(dcp: Engine, placed: Sized, folder: Folder, target: dict[str, Any]) -> dict[str, Any]:
    """Load into this rank's target and return it. Collective over the ranks that hold it."""
    with expected_warnings():
        dcp.load(target, checkpoint_id=folder, process_group=first_ranks(placed.world_size))
    return target


def blank(placed: Placed) -> dict[str, Any]:
    """A new state dict of this rank without any value of the state."""
    emptied_state: dict[str, Any] = empty_state(placed.state())
    return emptied_state


def load(dcp: Engine, placed: Placed, folder: Folder, title: str, target: Prepare = blank) -> None:
    """Load the state, which must equal the unsharded one to the bit."""
    __tracebackhide__ = True

    def step() -> Stages:
        with expected_warnings():
            state = target(placed)
        yield
        load_into(dcp, placed, folder, state)
        with expected_warnings():
            return differences(state, placed.full())

    on_first_ranks(placed.world_size, title, step)
