"""A state saved in one layout loads in any other: every value, to the bit, in place."""

from __future__ import annotations

from collections.abc import Collection

import torch

import pytest_dcp.checkpoint as checkpoint
from pytest_dcp.properties.bits import memory_of
from pytest_dcp.properties.differences import differences
from pytest_dcp.properties.laws.engine import Engine, expected_warnings
from pytest_dcp.properties.laws.steps import Folder, blank, enter, load, load_into, save
from pytest_dcp.properties.placed import Placed, local_of, tensors_of
from pytest_dcp.properties.subworlds import Stages, on_first_ranks, rank


def assert_round_trip(
    saved: Placed, loaded: Placed, folder: Folder, *, dcp: Engine = checkpoint
) -> None:
    """Save one, load the other: every rank then holds its part of the unsharded original, to the
    bit.

    Collective over a world with enough ranks for both. Raises LawError, the same on every rank,
    naming fqn, rank, index and bits of each difference.

    One process is a world of one rank, whose layouts are plain:

    >>> from pytest_dcp.properties import StateSpec, TensorSpec
    >>> state = StateSpec({"w": TensorSpec((4, 2)), "step": 3}).on()
    >>> assert_round_trip(state, state, "checkpoint")

    An engine that saves only tensors is found out:

    >>> class OnlyTensors:
    ...     load = staticmethod(checkpoint.load)
    ...     @staticmethod
    ...     def save(state_dict, **options):
    ...         tensors = {key: v for key, v in state_dict.items() if torch.is_tensor(v)}
    ...         return checkpoint.save(tensors, **options)
    >>> assert_round_trip(state, state, "other", dcp=OnlyTensors)
    Traceback (most recent call last):
        ...
    pytest_dcp.errors.LawError: ...Missing key in checkpoint state_dict: step...
    """
    __tracebackhide__ = True
    enter(saved, loaded)
    save(dcp, saved, folder)
    load(dcp, loaded, folder, "loading the saved state")


def assert_meta_load(
    saved: Placed, loaded: Placed, folder: Folder, *, dcp: Engine = checkpoint
) -> None:
    """A round trip into a state on the meta device: real tensors replace its tensors."""
    __tracebackhide__ = True
    enter(saved, loaded)
    save(dcp, saved, folder)
    load(
        dcp,
        loaded,
        folder,
        "loading into the meta device",
        lambda placed: placed.state("meta"),
    )


def assert_inplace(
    saved: Placed, loaded: Placed, folder: Folder, *, dcp: Engine = checkpoint
) -> None:
    """A round trip into the memory of the target: no tensor is replaced or moved.

    If a storage is larger than its tensor, the bytes outside of it remain unchanged.
    """
    __tracebackhide__ = True
    enter(saved, loaded)
    save(dcp, saved, folder)

    def step() -> Stages:
        target = blank(loaded)
        before = {fqn: (tensor, _memory(tensor)) for fqn, tensor in tensors_of(target)}
        yield
        load_into(dcp, loaded, folder, target)
        problems: list[object] = []
        for fqn, tensor in tensors_of(target):
            old, (pointer, gaps) = before[fqn]
            if tensor is not old or local_of(tensor).data_ptr() != pointer:
                problems.append(f"rank {rank()}: {fqn}: was moved to other memory")
            elif _memory(tensor) != (pointer, gaps):
                problems.append(f"rank {rank()}: {fqn}: bytes between its elements were written")
        return problems or list(differences(target, loaded.full()))

    on_first_ranks(loaded.world_size, "loading in place", step)


def assert_partial_load(
    saved: Placed,
    loaded: Placed,
    keys: Collection[str],
    folder: Folder,
    *,
    dcp: Engine = checkpoint,
) -> None:
    """A round trip of some top-level keys: the state dict to load has these and no others."""
    __tracebackhide__ = True
    enter(saved, loaded)
    save(dcp, saved, folder)
    load_part(dcp, loaded, keys, folder)


def load_part(dcp: Engine, loaded: Placed, keys: Collection[str], folder: Folder) -> None:
    """Load these keys, whose values must equal the unsharded state's. Collective over the world."""
    __tracebackhide__ = True

    def step() -> Stages:
        target = {key: value for key, value in blank(loaded).items() if key in keys}
        full = {key: value for key, value in loaded.full().items() if key in keys}
        yield
        with expected_warnings():
            return differences(load_into(dcp, loaded, folder, target), full)

    on_first_ranks(loaded.world_size, f"loading {sorted(keys)} alone", step)


def _memory(tensor: torch.Tensor) -> tuple[int, bytes]:
    """The tensor's address, and all bytes of its storage outside of its elements."""
    local = local_of(tensor)
    storage = torch.empty(0, dtype=torch.uint8, device=local.device)
    copy = storage.set_(local.untyped_storage()).clone()
    elements = copy.view(local.dtype).as_strided(
        local.shape, local.stride(), local.storage_offset()
    )
    memory_of(elements).fill_(0)
    return local.data_ptr(), copy.cpu().numpy().tobytes()
