"""One stored wrapper subclass -> the function that fills its part of the planner's target with it.

A wrapper that is stored as the target holds it is compared by its pickle alone, and its inner
tensors are copied. Any other is read to be compared, and again to be copied: its class cuts both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.planner import ReadItem

from pytest_dcp._engine.format.opaque_values import check_wrapper, fill_wrapper
from pytest_dcp._engine.format.wrapper_parts import WrapperBox, copy_part
from pytest_dcp._engine.io.stored_items import check_size
from pytest_dcp._engine.planners.load_capabilities import lookup_of
from pytest_dcp._engine.unpickle.opaque_tensors import OpaqueWrapper
from pytest_dcp.errors import CheckpointCorruptError, CheckpointError

Entry = bytes | memoryview
Fill = Callable[[Entry], torch.Tensor]
"""Fills the target from the entry; returns the tensor that the planner gave."""


def judge_wrapper(
    planner: Any, item: ReadItem, stored: OpaqueWrapper, read: Callable[[], Entry]
) -> Fill:
    """The function that fills the target of a read item with a stored wrapper that fits.

    read: reads the wrapper's entry. Changes nothing. Raises CheckpointMismatchError, naming the
    key, if the wrapper does not fit or cannot be cut; CheckpointCorruptError for a damaged entry.
    """
    fqn = item.dest_index.fqn
    stored_box = WrapperBox(tuple(item.storage_offsets), tuple(item.lengths))
    into = WrapperBox(tuple(item.dest_offsets), tuple(item.lengths))
    lookup = lookup_of(planner)
    target: torch.Tensor | None = None if lookup is None else lookup(item.dest_index)
    if stored_box.is_whole(stored.shape) and (target is None or into.is_whole(target.shape)):
        return _whole(planner, item, stored)
    if target is None:
        raise CheckpointError(
            f"{fqn!r} is stored as a wrapper of other tensors, of which this planner takes a part "
            f"of {tuple(item.lengths)}: it needs a `lookup_tensor` that gives the whole target"
        )

    def prepare(entry: Entry) -> Callable[[], None]:
        try:
            return copy_part(fqn, target, into, stored, entry, stored_box)
        except CheckpointCorruptError as error:
            raise error.at(entry=item.storage_index.fqn) from error

    prepare(read())

    def fill(entry: Entry) -> torch.Tensor:
        prepare(entry)()
        return target

    return fill


def _whole(planner: Any, item: ReadItem, stored: OpaqueWrapper) -> Fill:
    target: torch.Tensor = planner.resolve_tensor(item)
    check_size(item, target)
    copies = check_wrapper(item.dest_index.fqn, target, stored)

    def fill(entry: Entry) -> torch.Tensor:
        try:
            fill_wrapper(copies, entry)
        except CheckpointCorruptError as error:
            raise error.at(entry=item.storage_index.fqn) from error
        return target

    return fill
