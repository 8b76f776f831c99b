from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from pytest_dcp._engine.plan.placement_boxes import LocalBox, local_boxes, shard_runs, whole_box
from support.tilings import fewer, shapes

meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def layouts(draw) -> tuple:
    """A tensor's shape, a mesh and placements in any order."""
    shape = draw(shapes(max_dims=3, max_side=13).filter(len))
    mesh = draw(meshes)
    dims = st.integers(0, len(shape) - 1)
    placement = st.one_of(
        st.just(Replicate()),
        dims.map(Shard),
        st.builds(
            lambda dim, parts: _StridedShard(dim, split_factor=parts), dims, st.integers(1, 4)
        ),
    )
    return shape, mesh, tuple(draw(placement) for _ in mesh)


def local_of(full: torch.Tensor, mesh: tuple, rank: tuple, placements: tuple) -> torch.Tensor:
    """The rank's local tensor, split one mesh dimension after the other by the placements."""
    for ranks, at, placement in zip(mesh, rank, placements, strict=True):
        if not isinstance(placement, Replicate):
            parts, _ = placement._split_tensor(full, ranks, with_padding=False, contiguous=True)
            full = parts[at]
    return full


def numbered(shape: tuple) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def filled_by_boxes(full: torch.Tensor, boxes: tuple[LocalBox, ...], shape: torch.Size):
    """A local tensor filled by way of the boxes; asserts that each element is written once."""
    local = torch.full(shape, -1)
    for box in boxes:
        there = tuple(slice(o, o + n) for o, n in zip(box.local_offset, box.shape, strict=True))
        here = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
        assert (local[there] == -1).all()
        assert local[there].shape == full[here].shape == box.shape
        local[there] = full[here]
    return local


@given(layouts())
@example(((7,), (2, 2), (_StridedShard(0, split_factor=2), Shard(0))))
@example(((10, 3), (2, 3), (_StridedShard(0, split_factor=3), Shard(0))))
@example(((8, 8), (2, 2), (Shard(1), Shard(0))))
@fewer(2)
def test_the_boxes_of_every_rank_equal_torchs_local_tensor(layout):
    shape, mesh, placements = layout
    full = numbered(shape)
    for rank in product(*map(range, mesh)):
        expected = local_of(full, mesh, rank, placements)
        boxes = local_boxes(shape, mesh, rank, placements)
        assert boxes
        assert torch.equal(filled_by_boxes(full, boxes, expected.shape), expected)


@given(layouts())
@fewer(4)
def test_the_ranks_hold_every_element_as_often_as_the_mesh_replicates_it(layout):
    shape, mesh, placements = layout
    held = np.zeros(shape, dtype=int)
    for rank in product(*map(range, mesh)):
        for box in local_boxes(shape, mesh, rank, placements):
            held[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] += 1
    copies = [n for n, p in zip(mesh, placements, strict=True) if isinstance(p, Replicate)]
    assert (held == np.prod(copies, dtype=int)).all()


@given(shapes(), meshes, st.data())
def test_a_rank_holds_one_box_of_plain_shards(shape, mesh, data):
    if not shape:
        return
    dims = st.integers(0, len(shape) - 1)
    placements = tuple(Shard(data.draw(dims)) for _ in mesh)
    rank = tuple(data.draw(st.integers(0, n - 1)) for n in mesh)
    (box,) = local_boxes(shape, mesh, rank, placements)
    assert box.whole


@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 4))
def test_a_rank_keeps_its_chunk_of_each_part_in_their_order(length, ranks, parts):
    pieces = [part.tolist() for part in torch.arange(length).chunk(parts)]
    for rank in range(ranks):
        expected = []
        for part in pieces:
            chunks = torch.tensor(part).chunk(ranks)
            expected += chunks[rank].tolist() if rank < len(chunks) else []
        found = shard_runs([(0, length)], ranks, rank, parts)
        assert [i for start, stop in found for i in range(start, stop)] == expected


def test_an_empty_shard_lies_at_the_end_of_the_tensor():
    (box,) = local_boxes((2, 5), (4,), (3,), (Shard(0),))
    assert box == LocalBox(offset=(2, 0), shape=(0, 5), local_offset=(0, 0))


@pytest.mark.parametrize("size", [(), (3,), (0, 2)])
def test_a_tensor_held_whole_is_one_box_from_the_origin(size):
    box = whole_box(size)
    assert (box.offset, box.shape, box.whole) == ((0,) * len(size), size, True)
    assert local_boxes(size, (2,), (1,), (Replicate(),)) == (box,)


@pytest.mark.parametrize("placement", [Partial(), Partial("max")])
def test_a_pending_reduction_is_refused_with_a_remedy(placement: Placement):
    with pytest.raises(ValueError, match="redistribute to Replicate"):
        local_boxes((4,), (2,), (0,), (placement,))


def test_a_box_in_the_middle_of_the_local_tensor_is_not_taken_for_the_whole():
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    boxes = local_boxes((10,), (2, 2), (0, 0), placements)
    assert [box.whole for box in boxes] == [True, False][: len(boxes)]
