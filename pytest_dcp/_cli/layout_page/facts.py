"""An open checkpoint -> the facts that its page shows: the largest names with their shards.

A page of 100,000 names would take a browser minutes. So the largest tensors come first, up to a
number of names and of shards, and the page says how many are left out. Nothing but the index is
read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytest_dcp._engine.lazy_reading.contents import StoredShard
from pytest_dcp._engine.lazy_reading.lazy_values import LazyTensor, LazyValue
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint

MOST_NAMES = 2000
MOST_SHARDS = 60_000
"""In one page: about 4 MB of text, which Chromium draws within seconds."""
MOST_PREFIXES = 2000
RANK_OF_FILE = re.compile(r"(?:.*/)?__(\d+)_\d+[^/]*\.(?:distcp|safetensors)")
"""Data files of DCP begin with the rank that wrote them."""


@dataclass(frozen=True, slots=True)
class PageFacts:
    """Everything in a page, ready for JSON."""

    where: str
    format: str
    tensor_count: int
    """Of the names that were asked for."""
    value_count: int
    nbytes: int
    """Of the elements of these tensors."""
    files: tuple[str, ...]
    ranks: tuple[int | None, ...]
    """Of each file, the rank that wrote it; None if its name does not say."""
    missing_files: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    """Tensors by descending size, then values. A tensor's `shards` are (file, offset, shape, bytes)
    with `file` a number; None where they did not fit into the page."""
    omitted_names: int
    omitted_nbytes: int
    """Of the elements of the omitted tensors."""
    omitted: tuple[tuple[str, int, int], ...]
    """The omitted tensors together: a prefix of their names, how many, and their bytes."""
    undrawn: int
    """Tensors of the page without their shards."""


def collect_facts(checkpoint: OpenCheckpoint, names: Sequence[str], most: int) -> PageFacts:
    """The facts for the page of these names, at most `most` of them in detail."""
    found = [checkpoint[name] for name in names]
    tensors = [lazy for lazy in found if isinstance(lazy, LazyTensor)]
    values = [lazy for lazy in found if isinstance(lazy, LazyValue)]
    tensors.sort(key=lambda tensor: -tensor.nbytes)
    largest = tensors[:most]
    shown_values = values[: most - len(largest)]
    files = {file: number for number, file in enumerate(checkpoint.files)}
    drawn = _TensorRows(files)
    rows = [*map(drawn.describe, largest), *map(_describe_value, shown_values)]
    return PageFacts(
        where=checkpoint.where,
        format=checkpoint.format,
        tensor_count=len(tensors),
        value_count=len(values),
        nbytes=sum(tensor.nbytes for tensor in tensors),
        files=tuple(files),
        ranks=tuple(map(find_rank, files)),
        missing_files=checkpoint.missing_files,
        rows=tuple(rows),
        omitted_names=len(found) - len(rows),
        omitted_nbytes=sum(tensor.nbytes for tensor in tensors[most:]),
        omitted=sum_by_prefix([(tensor.name, tensor.nbytes) for tensor in tensors[most:]]),
        undrawn=drawn.undrawn,
    )


def find_rank(file: str) -> int | None:
    """The rank that wrote a data file, if its name says so.

    >>> find_rank("__12_0-0123456789ab.distcp"), find_rank("model-00001-of-00002.safetensors")
    (12, None)
    """
    match = RANK_OF_FILE.fullmatch(file)
    return int(match[1]) if match else None


def sum_by_prefix(
    sizes: Sequence[tuple[str, int]], most: int = MOST_PREFIXES
) -> tuple[tuple[str, int, int], ...]:
    """Names and bytes, summed up by as many leading parts of the names as give at most `most`.

    >>> sum_by_prefix([("a.0.w", 4), ("a.1.w", 2), ("b.w", 1)], most=2)
    (('a', 2, 6), ('b', 1, 1))
    """
    for depth in (3, 2, 1, 0):
        sums: dict[str, tuple[int, int]] = {}
        for name, nbytes in sizes:
            prefix = ".".join(name.split(".")[:-1][:depth])
            count, total = sums.get(prefix, (0, 0))
            sums[prefix] = count + 1, total + nbytes
        if len(sums) <= most:
            break
    return tuple((prefix, *found) for prefix, found in sums.items())


class _TensorRows:
    """Describes tensors, with their shards as long as the page has room for them."""

    def __init__(self, files: dict[str, int]) -> None:
        self._files = files
        self._room = MOST_SHARDS
        self.undrawn = 0

    def describe(self, tensor: LazyTensor) -> dict[str, Any]:
        """The row of one tensor."""
        shards = tensor.shards
        row = {
            "name": tensor.name,
            "kind": "tensor",
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "nbytes": tensor.nbytes,
            "count": len(shards),
            "shards": None,
        }
        if len(shards) <= self._room:
            self._room -= len(shards)
            row["shards"] = list(map(self._describe_shard, shards))
        else:
            self.undrawn += 1
        return row

    def _describe_shard(self, shard: StoredShard) -> tuple[int, tuple[int, ...], Any, int]:
        file = -1 if shard.file is None else self._files[shard.file]
        return file, shard.offset, shard.shape, shard.nbytes


def _describe_value(value: LazyValue) -> dict[str, Any]:
    return {"name": value.name, "kind": "value", "nbytes": value.nbytes}
