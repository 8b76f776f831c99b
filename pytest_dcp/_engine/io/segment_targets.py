"""Bytes of an entry's data, as they arrive -> the parts of targets that they fill.

A segment is a range of an entry's bytes. The entry is row-major, so the range is a run of its
elements, which `run_boxes` cuts into boxes; each is copied to the part of the target that it
overlaps. Segments may come in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import torch

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.io.copy_plan import Copies
from pytest_dcp._engine.io.tensor_memory import memory_at, strided_tensor
from pytest_dcp._engine.plan.boxes import Ints, strides_of
from pytest_dcp._engine.plan.columns import ReadItems

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape."""


def run_boxes(shape: Sequence[int], low: int, high: int) -> Iterator[Box]:
    """Boxes that together hold elements `low` to `high` (exclusive) of a row-major tensor.

    >>> list(run_boxes((4, 3), 2, 10))
    [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    >>> list(run_boxes((4, 3), 4, 5)), list(run_boxes((), 0, 1))
    ([((1, 1), (1, 1))], [((), ())])
    """
    if low >= high:
        return
    if not shape:
        yield (), ()
        return
    inner = prod(shape[1:])
    first, last = -(-low // inner), high // inner
    if first > last:  # inside one row
        yield from _in_row(shape, last, low - last * inner, high - last * inner)
        return
    yield from _in_row(shape, first - 1, low - (first - 1) * inner, inner)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, high - last * inner)


def _in_row(shape: Sequence[int], row: int, low: int, high: int) -> Iterator[Box]:
    """The boxes of elements of one row; none if the row is not cut."""
    if prod(shape[1:]) > high - low > 0:
        for offset, part in run_boxes(shape[1:], low, high):
            yield (row, *offset), (1, *part)


class SegmentTargets:
    """Copies that are filled from segments of their entries."""

    def __init__(self, items: ReadItems, copies: Copies, rows: Ints, catalog: Catalog) -> None:
        """rows: of `copies`, the ones to fill."""
        self._items, self._copies, self._catalog = items, copies, catalog
        order = rows[np.argsort(copies.entry[rows], kind="stable")]
        self._rows = order.tolist()
        self._entries = copies.entry[order]
        self._low = copies.from_start[order].tolist()
        self._nbytes = copies.nbytes[order].tolist()
        self._address = copies.address[order].tolist()
        self._flat = copies.flat[order].tolist()

    def fill(self, entry: int, low: int, data: memoryview) -> int:
        """Copy the parts of these bytes that any target wants; returns how many bytes those are.

        low: where the bytes begin in the entry's data.
        """
        first, last = np.searchsorted(self._entries, (entry, entry + 1)).tolist()
        high, filled_bytes = low + len(data), 0
        for n in range(first, last):
            if not self._flat[n]:
                filled_bytes += self._fill_box(self._rows[n], entry, low, data)
                continue
            start = max(low, self._low[n])
            nbytes = min(high, self._low[n] + self._nbytes[n]) - start
            if nbytes > 0:
                to = memory_at(self._address[n] + start - self._low[n], nbytes)
                to[:] = data[start - low : start - low + nbytes]
                filled_bytes += nbytes
        return filled_bytes

    def _fill_box(self, row: int, entry: int, low: int, data: memoryview) -> int:
        """Copy the part of a box that is not one run: strided, of another dtype or device.

        Returns its bytes, as stored.
        """
        index, item = self._catalog.index, int(self._copies.row[row])
        ndim = int(self._items.ndim[item])
        dtype = index.properties[index.property_of[index.key_of[entry]]].dtype
        stored = index.shape[entry, :ndim]
        stride = strides_of(stored[None, :])[0]
        wanted_low = self._items.from_offset[item, :ndim]
        wanted_high = wanted_low + self._copies.shape[row, :ndim]
        start, stop = low // dtype.itemsize, (low + len(data)) // dtype.itemsize
        target, count = self._copies.target[row].detach(), 0
        for offset, shape in run_boxes(stored.tolist(), start, stop):
            corner = np.maximum(offset, wanted_low)
            part = np.minimum(np.add(offset, shape), wanted_high) - corner
            if (part <= 0).any():
                continue
            at = (int((corner * stride).sum()) - start) * dtype.itemsize
            source = strided_tensor(data[at:], dtype, part, stride)
            to = self._items.to_offset[item, :ndim] + corner - wanted_low
            _part_of(target, to, part).copy_(source)
            count += int(part.prod())
        return int(count * dtype.itemsize)


def _part_of(target: torch.Tensor, offset: Ints, shape: Ints) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(offset.tolist(), shape.tolist(), strict=True)):
        target = target.narrow(dim, start, length)
    return target
