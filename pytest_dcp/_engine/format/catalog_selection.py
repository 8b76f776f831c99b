"""A catalog of some keys of another catalog. Pure (no I/O).

Code that reads a few tensors of a large checkpoint works on a small catalog, so its cost does not
depend on the number of chunks in the checkpoint.

Of the two chunks of `w` and the one of `b`, only the one of `b`:

>>> import torch
>>> from torch.distributed.checkpoint.metadata import TensorProperties
>>> from pytest_dcp._engine.plan.boxes import pad_rows
>>> index = Index(
...     fqns=("w", "b"), property_of=np.array([0, 0]), properties=(TensorProperties(torch.int8),),
...     ndim=np.array([1, 1]), size=pad_rows([(4,), (2,)], 1, 1), first=np.array([0, 2, 3]),
...     offset=pad_rows([(0,), (2,), (0,)], 1, 0), shape=pad_rows([(2,), (2,), (2,)], 1, 1))
>>> part = select_keys(Catalog(index, EntryPlaces.nowhere(3)), np.array([1]))
>>> part.index.fqns, part.index.first.tolist(), part.index.offset.tolist()
(('b',), [0, 1], [[0]])
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pytest_dcp._engine.format.catalog import Catalog, EntryPlaces
from pytest_dcp._engine.plan.boxes import Ints, row_bounds, spans
from pytest_dcp._engine.plan.index import Index


def select_keys(catalog: Catalog, keys: Ints) -> Catalog:
    """The catalog of these keys alone, in their order. keys: rows of the index, each at most
    once."""
    index = catalog.index
    counts = index.first[keys + 1] - index.first[keys]
    rows = np.repeat(index.first[keys], counts) + spans(counts)
    part = Index(
        fqns=index.names_at(keys),
        property_of=index.property_of[keys],
        properties=index.properties,
        ndim=index.ndim[keys],
        size=index.size[keys],
        first=row_bounds(counts),
        offset=index.offset[rows],
        shape=index.shape[rows],
    )
    return Catalog(part, _select_rows(catalog.places, rows))


def _select_rows(places: EntryPlaces, rows: Ints) -> EntryPlaces:
    counts = places.first_sum[rows + 1] - places.first_sum[rows]
    sums = np.repeat(places.first_sum[rows], counts) + spans(counts)
    transforms = {}
    if places.transforms:
        positions = {row: n for n, row in enumerate(rows.tolist())}
        both = positions.keys() & places.transforms.keys()
        transforms = {positions[row]: places.transforms[row] for row in both}
    return replace(
        places,
        file=places.file[rows],
        start=places.start[rows],
        length=places.length[rows],
        data_start=places.data_start[rows],
        data_nbytes=places.data_nbytes[rows],
        first_sum=row_bounds(counts),
        sums=places.sums[sums],
        transforms=transforms,
    )
