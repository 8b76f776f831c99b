"""Keys that are equal by their checksums: none too many, and all that can be known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.format.catalog import Catalog
from pytest_dcp._engine.format.catalog_comparison import find_equal_keys
from pytest_dcp._engine.format.catalog_selection import select_keys
from support.catalogs import Sample, samples


def certain(catalog: Catalog) -> set[str]:
    """The names whose chunks all have checksums, or nothing to check."""
    index, places = catalog.index, catalog.places
    names = set()
    for key, name in enumerate(index.fqns):
        rows = range(int(index.first[key]), int(index.first[key + 1]))
        if all(
            places.first_sum[row + 1] > places.first_sum[row]
            or (index.ndim[key] >= 0 and not index.shape[row].prod())
            for row in rows
        ):
            names.add(name)
    return names


@given(samples(), st.randoms(use_true_random=False))
def test_a_catalog_equals_itself_in_any_order_of_keys(sample: Sample, random: Any) -> None:
    catalog = sample.catalog
    assert set(find_equal_keys(catalog, catalog)) == certain(catalog)
    order = list(range(len(catalog.index)))
    random.shuffle(order)
    other = select_keys(catalog, np.array(order, dtype=np.int64))
    assert set(find_equal_keys(catalog, other)) == certain(catalog)


@given(samples(), st.data())
def test_another_checksum_or_box_is_another_key(sample: Sample, data: st.DataObject) -> None:
    catalog = sample.catalog
    index, places = catalog.index, catalog.places
    if not len(places.sums):
        return
    at = data.draw(st.integers(0, len(places.sums) - 1))
    sums = places.sums.copy()
    sums[at] ^= 1
    row = int(np.searchsorted(places.first_sum, at, side="right")) - 1
    name = index.fqns[int(index.key_of[row])]
    changed = replace(catalog, places=replace(places, sums=sums))
    assert set(find_equal_keys(catalog, changed)) == certain(catalog) - {name}
    offset = index.offset.copy()
    offset[row, :1] += 1
    moved = replace(catalog, index=replace(index, offset=offset))
    assert not offset.shape[1] or name not in find_equal_keys(catalog, moved)


@given(samples())
def test_another_dtype_or_size_is_another_key(sample: Sample) -> None:
    catalog = sample.catalog
    index = catalog.index
    properties = tuple(replace(one, dtype=torch.complex128) for one in index.properties)
    other = replace(catalog, index=replace(index, properties=properties))
    values = {name for key, name in enumerate(index.fqns) if index.ndim[key] < 0}
    assert set(find_equal_keys(catalog, other)) <= values
    larger = replace(catalog, index=replace(index, size=index.size + 1))
    assert index.size.shape[1] == 0 or not find_equal_keys(catalog, larger)
