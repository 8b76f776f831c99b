"""A catalog of some keys says the same of them as the whole catalog."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.format.catalog_selection import select_keys
from support.catalogs import Sample, describe_fields, samples


@given(samples(), st.randoms(use_true_random=False))
def test_selected_keys_keep_their_chunks_and_places(sample: Sample, random: object) -> None:
    whole = sample.catalog
    names = list(whole.index.fqns)
    random.shuffle(names)  # type: ignore[attr-defined]  # a Random
    names = names[: len(names) // 2 + 1]
    keys = np.array([whole.index.row_of[name] for name in names], dtype=np.int64)
    part = select_keys(whole, keys)
    assert list(part.index.fqns) == names
    stock = sample.stock
    metadata = part.metadata()
    for name in names:
        mine = metadata.state_dict_metadata[name]
        assert describe_fields(mine) == describe_fields(whole.index.value(whole.index.row_of[name]))
    expected = {k: v for k, v in (stock.storage_data or {}).items() if k.fqn in names}
    assert dict(metadata.storage_data) == expected
    for name in names:
        key, row = whole.index.row_of[name], part.index.row_of[name]
        for at in range(int(part.index.first[row + 1] - part.index.first[row])):
            one, other = int(whole.index.first[key]) + at, int(part.index.first[row]) + at
            sums = [
                c.places.sums[c.places.first_sum[r] : c.places.first_sum[r + 1]].tolist()
                for c, r in ((whole, one), (part, other))
            ]
            assert sums[0] == sums[1]
            assert whole.places.data_start[one] == part.places.data_start[other]
