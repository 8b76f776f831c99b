"""Bugs to plant into the engine: each replaces one function of it by one that is a little wrong.

None writes outside of a target's memory: that a rank dies is seen without any law.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

Law = Literal["assert_round_trip", "assert_meta_load", "assert_inplace", "assert_idempotent_save"]


@dataclass(frozen=True, slots=True)
class Mutant:
    """One bug."""

    where: str
    """The module below pytest_dcp._engine in whose namespace the function is looked up, or
    `checkpoint`."""
    name: str
    """The function, or Class.method."""
    wrong: Callable[[Callable[..., Any]], Callable[..., Any]]
    """From the right one to the wrong one."""
    law: Law = "assert_round_trip"

    def plant(self) -> None:
        """Put the bug into this process's engine, for good."""
        room = "pytest_dcp" if self.where == "checkpoint" else "pytest_dcp._engine"
        owner: Any = importlib.import_module(f"{room}.{self.where}")
        *path, name = self.name.split(".")
        owner = functools.reduce(getattr, path, owner)
        setattr(owner, name, self.wrong(getattr(owner, name)))


def after(change: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function whose result is changed."""
    return lambda right: lambda *args, **kwargs: change(right(*args, **kwargs))


def before(change: Callable[..., tuple[Any, ...]]) -> Any:
    """A function whose positional arguments are changed."""
    return lambda right: lambda *args, **kwargs: right(*change(*args), **kwargs)


def items(**changes: Callable[[Any], Any]) -> Any:
    """Read items of which some columns are changed."""
    return after(lambda found: replace(found, **{n: f(found) for n, f in changes.items()}))


def from_the_end(
    shape: Any, mesh: tuple[int, ...], at: tuple[int, ...], placements: Any
) -> tuple[Any, ...]:
    return shape, mesh, tuple(side - 1 - n for side, n in zip(mesh, at, strict=True)), placements


def inner_first(
    shape: Any, mesh: tuple[int, ...], at: tuple[int, ...], placements: Any
) -> tuple[Any, ...]:
    return shape, mesh[::-1], at[::-1], placements[::-1]


def floor_chunk(low: int, high: int, chunks: int, which: int) -> tuple[int, int]:
    """Chunks rounded down, the last one longer."""
    step = (high - low) // chunks
    return low + which * step, high if which == chunks - 1 else low + (which + 1) * step


def without_sign_of_zero(tensor: torch.Tensor) -> torch.Tensor:
    floating = tensor.dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16)
    return torch.where(tensor == 0, torch.zeros_like(tensor), tensor) if floating else tensor


def column_major(shape: Any) -> Any:
    strides = np.ones_like(shape)
    strides[:, 1:] = np.maximum(shape[:, :-1], 1)
    return strides.cumprod(axis=1)


def narrower(value: Any) -> Any:
    """A value whose floats have been through float32."""
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32).item()
    return [narrower(one) for one in value] if isinstance(value, list) else value


def only_values(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: right(*args[:-1], narrower(args[-1]))


def without_empty(right: Callable[..., Any]) -> Callable[..., Any]:
    """Boxes without an element have no row."""
    return lambda rows, fqn, kind, number, size, box: (
        None if 0 in box[1] else right(rows, fqn, kind, number, size, box)
    )


def first_dtype(right: Callable[..., Any]) -> Callable[..., Any]:
    """Every tensor has the dtype of the first."""
    return lambda rows, value, memory: 0 if rows.property_numbers else right(rows, value, memory)


def moved(right: Callable[..., Any]) -> Callable[..., Any]:
    """Tensors are loaded into copies, which take their places in the state dict."""

    def load(state_dict: dict[str, Any], **kwargs: Any) -> Any:
        result = right(state_dict, **kwargs)
        for key, value in state_dict.items():
            if isinstance(value, torch.Tensor):
                state_dict[key] = value.clone()
        return result

    return load


MUTANTS: dict[str, Mutant] = {
    "chunks are rounded down": Mutant("plan.placement_boxes", "_chunk", lambda right: floor_chunk),
    "ranks are counted from the end": Mutant("plan.shards", "local_boxes", before(from_the_end)),
    "placements apply from the last to the first": Mutant(
        "plan.shards", "local_boxes", before(inner_first)
    ),
    "a strided shard is a plain one": Mutant(
        "plan.placement_boxes",
        "shard_runs",
        before(lambda runs, ranks, rank, parts=1: (runs, ranks, rank)),
    ),
    "empty shards are left out": Mutant("plan.describe", "_Rows.add", without_empty),
    "shards at other offsets are taken for replicas": Mutant(
        "plan.save", "_linear_offsets", after(np.zeros_like)
    ),
    "the last chunk of all is dropped": Mutant(
        "plan.save", "_choose_keepers", after(lambda k: k[:-1])
    ),
    "offsets in the index have their dimensions reversed": Mutant(
        "plan.save",
        "_index",
        after(lambda rows: (replace(rows[0], offset=rows[0].offset[:, ::-1].copy()), rows[1])),
    ),
    "parts go to the start of the target": Mutant(
        "planners.local_load_plan",
        "read_items",
        items(to_offset=lambda i: np.zeros_like(i.to_offset)),
    ),
    "parts come from the start of the chunk": Mutant(
        "planners.local_load_plan",
        "read_items",
        items(from_offset=lambda i: np.zeros_like(i.from_offset)),
    ),
    "the neighbour's entry is read": Mutant(
        "planners.local_load_plan", "read_items", items(entry=lambda i: np.roll(i.entry, 1))
    ),
    "the first row of each overlap is left out": Mutant(
        "plan.load", "intersect", after(lambda o: (o[0], np.maximum(o[1] - 1, 0), o[2]))
    ),
    "stored chunks are read column by column": Mutant(
        "io.copy_plan", "strides_of", lambda right: column_major
    ),
    "any memory is written as if it were contiguous": Mutant(
        "io.write_files", "is_flat", lambda right: lambda tensor: True
    ),
    "negative zero loses its sign": Mutant(
        "planners.save_planner", "require_memory", after(without_sign_of_zero)
    ),
    "all tensors have the dtype of the first": Mutant(
        "plan.describe", "_Rows.property_of", first_dtype
    ),
    "floats among the values are rounded": Mutant("planners.save_planner", "_encode", only_values),
    "a meta tensor stays one": Mutant(
        "planners.load_planner", "set_element", lambda right: lambda *args: None, "assert_meta_load"
    ),
    "tensors are not loaded in place": Mutant("checkpoint", "load", moved, "assert_inplace"),
    "old data files are left": Mutant(
        "storages.folder_writer",
        "sweep",
        lambda right: lambda *args, **kwargs: None,
        "assert_idempotent_save",
    ),
}
