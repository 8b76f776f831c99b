from itertools import combinations

import numpy as np
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_dcp._engine.plan.boxes import (
    intersect,
    out_of_bounds,
    overlapping_pairs,
    pad_rows,
    spans,
    strides_of,
    volumes,
    widen_table,
)
from support.tilings import Box, boxes_in, elements, fewer, shapes, tilings

tensors = shapes()
several = tensors.flatmap(lambda shape: st.lists(boxes_in(shape), max_size=7))


def columns(boxes: list[Box], rank: int) -> tuple[np.ndarray, np.ndarray]:
    return pad_rows([b[0] for b in boxes], rank, 0), pad_rows([b[1] for b in boxes], rank, 1)


@fewer(3)
@given(st.lists(shapes(), max_size=5), st.integers(0, 2), st.integers(-1, 9))
def test_padded_rows_are_the_rows_filled_up_on_the_right(rows, more, fill):
    rank = max(map(len, rows), default=0) + more
    table = pad_rows(rows, rank, fill)
    assert table.shape == (len(rows), rank)
    assert table.dtype == np.int64
    assert table.tolist() == [[*row, *[fill] * (rank - len(row))] for row in rows]


@fewer(3)
@given(st.lists(shapes(), min_size=1, max_size=5), st.integers(0, 3))
def test_widening_a_table_is_padding_the_rows_to_more_columns(rows, more):
    rank = max(map(len, rows))
    wide = widen_table(pad_rows(rows, rank, 7), rank + more, 7)
    assert np.array_equal(wide, pad_rows(rows, rank + more, 7))


@fewer(3)
@given(tensors)
def test_volumes_and_strides_are_those_of_torch(shape):
    full = torch.empty(shape)
    table = np.array([shape], dtype=np.int64).reshape(1, -1)
    assert volumes(table).tolist() == [full.numel()]
    assert tuple(strides_of(table)[0]) == full.stride()


@fewer(3)
@given(st.data(), tensors)
def test_an_intersection_is_the_elements_that_both_boxes_have(data, shape):
    one, other = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    low, sides, shared = intersect(*columns([one], 4), *columns([other], 4))
    both = elements(one) & elements(other)
    assert bool(shared[0]) == bool(both)
    if both:
        rank = len(shape)
        assert elements((tuple(low[0, :rank]), tuple(sides[0, :rank]))) == both


@fewer(3)
@given(st.lists(st.integers(0, 5), max_size=6))
def test_spans_count_from_zero_in_each_group(counts):
    expected = [at for count in counts for at in range(count)]
    assert spans(np.array(counts, dtype=np.int64)).tolist() == expected


@fewer(3)
@given(st.data(), shapes(max_dims=2))
def test_a_box_is_out_of_bounds_when_an_element_or_its_corner_lies_outside(data, size):
    offset = tuple(data.draw(st.integers(-2, n + 2)) for n in size)
    sides = tuple(data.draw(st.integers(-1, n + 2)) for n in size)
    corners = [*offset, *(o + n for o, n in zip(offset, sides, strict=True))]
    inside = all(n >= 0 for n in sides) and all(
        0 <= at <= n for at, n in zip(corners, [*size, *size], strict=True)
    )
    table = columns([(offset, sides)], 3)
    assert out_of_bounds(*table, pad_rows([size], 3, 1)).tolist() == [not inside]


@fewer(3)
@given(several)
@example([((2,), (2,)), ((0,), (3,))])
def test_overlapping_pairs_are_all_pairs_of_boxes_that_share_an_element(boxes):
    rank = max((len(box[0]) for box in boxes), default=0) or 1
    expected = {
        (a, b)
        for a, b in combinations(range(len(boxes)), 2)
        if elements(boxes[a]) & elements(boxes[b])
    }
    found = overlapping_pairs(*columns(boxes, rank), limit=99)
    assert len(found) == len(set(found))
    assert set(found) == expected


@fewer(3)
@given(several, st.integers(1, 3))
def test_no_more_overlapping_pairs_are_found_than_asked_for(boxes, limit):
    table = columns(boxes, 3)
    everything = overlapping_pairs(*table, limit=99)
    assert len(overlapping_pairs(*table, limit=limit)) == min(limit, len(everything))


@fewer(3)
@given(tensors.flatmap(tilings))
def test_a_tiling_has_no_overlapping_pairs(boxes):
    assert overlapping_pairs(*columns(boxes, 3)) == []


def test_two_boxes_of_no_dimensions_overlap():
    assert overlapping_pairs(*columns([((), ()), ((), ())], 0)) == [(0, 1)]
