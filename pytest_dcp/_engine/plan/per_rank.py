"""Values that differ between ranks, under one key of the state dict.

`PerRank(value)` looks like a mapping with one key, which names the rank: `rank_1_of_4`. So any
planner that walks mappings, including torch's, saves and loads it; the checkpoint's flat names are
`rng.rank_0_of_4`, `rng.rank_1_of_4` and so on, and show how many ranks saved. Pure (no I/O).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp.errors import CheckpointMismatchError, PlanError

Resize = Callable[[int, int, int], int | None]
"""(rank, world size, world size of the save) to the rank whose saved value to take, or None."""

RANK_KEY = re.compile(r"rank_(\d+)_of_(\d+)")


class PerRank(MutableMapping[str, Any]):
    """One value per rank under one key: random states, counters of a data loader, metrics.

    >>> import torch
    >>> import pytest_dcp.checkpoint as dcp
    >>> metadata = dcp.save({"rng": PerRank(torch.get_rng_state())}, checkpoint_id="step-1")
    >>> drawn = torch.rand(2)
    >>> state = {"rng": PerRank(torch.get_rng_state())}
    >>> report = dcp.load(state, checkpoint_id="step-1")
    >>> torch.set_rng_state(state["rng"].value)
    >>> torch.equal(drawn, torch.rand(2))
    True
    >>> sorted(metadata.state_dict_metadata)  # as rank 0 of 1 saved it
    ['rng.rank_0_of_1']

    Each rank gets back the value that it saved. The value may be anything that a state dict may
    hold except distributed tensors, which differ between ranks already.
    """

    def __init__(self, value: Any, *, when_resized: Resize | None = None) -> None:
        """value: this rank's; `load` fills its tensors in place and replaces the rest.

        when_resized: which saved rank's value to load where another number of ranks saved, from
            (rank, world size, world size of the save); None leaves the value as it is. Without
            this function such a load is a CheckpointMismatchError.
        """
        self.value = value
        self.when_resized = when_resized

    def __getitem__(self, key: str) -> Any:
        if key != rank_key(*_ranks()):
            raise KeyError(key)
        return self.value

    def __setitem__(self, key: str, value: Any) -> None:
        if key != rank_key(*_ranks()):
            raise KeyError(key)
        self.value = value

    def __delitem__(self, key: str) -> None:
        raise TypeError("a PerRank always has the value of its rank")

    def __iter__(self) -> Iterator[str]:
        yield rank_key(*_ranks())

    def __len__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


def rank_key(rank: int, size: int) -> str:
    """The part of a flat name that identifies one of `size` ranks."""
    return f"rank_{rank}_of_{size}"


_within: ContextVar[tuple[int, int] | None] = ContextVar("ranks", default=None)


@contextmanager
def ranks_known(rank: int, size: int) -> Iterator[None]:
    """Make PerRank values inside belong to this rank, among the ranks of an operation's group."""
    token = _within.set((rank, size))
    try:
        yield
    finally:
        _within.reset(token)


def _ranks() -> tuple[int, int]:
    """Rank and world size of the current operation, or of the default group."""
    current = _within.get()
    if current is not None:
        return current
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def check_per_rank(name: str, value: Any) -> None:
    """Raise PlanError if a PerRank value holds a tensor that is distributed over ranks."""
    if isinstance(value, DTensor | ShardedTensor):
        raise PlanError(
            f"{name!r} is a {type(value).__name__} inside PerRank: it is distributed over ranks by "
            "itself; save it without PerRank"
        )
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    for part in inner:
        check_per_rank(name, part)


def resized_names(
    per_rank_names: Mapping[str, tuple[str, PerRank]], stored: Iterable[str], *, strict: bool
) -> dict[str, str | None]:
    """Replacements for names of PerRank values that the checkpoint lacks.

    per_rank_names: by flat name, its name in the checkpoint and its PerRank. stored: the names in
    the checkpoint. Names of a save by the same number of ranks are left out; None: the rank's value
    stays as it is.

    Raises CheckpointMismatchError, naming every key, if `strict` and another number of ranks saved
    and there is no `when_resized`; ValueError if that function does not give a saved rank.
    """
    sizes = _sizes_by_prefix(stored)
    rank, size = _ranks()
    own = rank_key(rank, size)
    found: dict[str, str | None] = {}
    refused: dict[str, str] = {}
    for fqn, (name, per_rank) in per_rank_names.items():
        prefix, key, rest = name.rpartition(own)
        saved = sizes.get(prefix)
        if not key or saved is None or saved == size:
            continue
        if per_rank.when_resized is not None:
            source = _source(prefix, per_rank.when_resized, rank, size, saved)
            found[fqn] = None if source is None else prefix + rank_key(source, saved) + rest
        else:
            refused[fqn] = (
                f"{prefix.removesuffix('.')!r} holds one value of each of {saved} ranks, and "
                f"{size} rank(s) load it: give its PerRank when_resized=, a function that chooses"
            )
    if refused and strict:
        lines = list(dict.fromkeys(refused.values()))
        raise CheckpointMismatchError("\n".join(lines[:20]), mismatched=tuple(refused))
    return found


def _source(prefix: str, resize: Resize, rank: int, size: int, saved: int) -> int | None:
    source = resize(rank, size, saved)
    if source is not None and (type(source) is not int or not 0 <= source < saved):
        raise ValueError(
            f"when_resized of {prefix.removesuffix('.')!r} must give a rank from 0 to {saved - 1} "
            f"or None, it gave {source!r}"
        )
    return source


def _sizes_by_prefix(stored: Iterable[str]) -> dict[str, int]:
    """The world size of the save, by the prefix of the rank in the flat names."""
    sizes: dict[str, int] = {}
    for name in stored:
        if "rank_" in name:
            for match in RANK_KEY.finditer(name):
                sizes.setdefault(name[: match.start()], int(match[2]))
    return sizes


def is_of_other_ranks(name: str, prefixes: Iterable[str]) -> bool:
    """Whether the flat name is that of a PerRank value below one of these prefixes."""
    return any(name.startswith(prefix) and RANK_KEY.match(name, len(prefix)) for prefix in prefixes)
