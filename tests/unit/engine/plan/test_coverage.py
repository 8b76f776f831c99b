from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)

from pytest_dcp._engine.plan.box_coverage import problems_of
from pytest_dcp._engine.plan.index import Index
from support.tilings import Box, elements, fewer, shapes, tilings


def index_of(tensors: dict[str, tuple[tuple, list[Box]]]) -> Index:
    return Index.of(
        {
            fqn: TensorStorageMetadata(
                TensorProperties(torch.float32),
                torch.Size(size),
                [ChunkStorageMetadata(torch.Size(o), torch.Size(n)) for o, n in boxes],
            )
            for fqn, (size, boxes) in tensors.items()
        }
        | {"value": BytesStorageMetadata()}
    )


def fault_of(size: tuple, boxes: list[Box]) -> str | None:
    """The fault in the boxes of one tensor, found element by element."""
    for offset, shape in boxes:
        ends = [o + n for o, n in zip(offset, shape, strict=True)]
        if any(n < 0 for n in (*offset, *shape)) or any(
            end > n for end, n in zip(ends, size, strict=True)
        ):
            return "out of bounds"
    if any(elements(a) & elements(b) for a, b in combinations(boxes, 2)):
        return "overlapping"
    held = set().union(*map(elements, boxes)) if boxes else set()
    return None if held == elements(((0,) * len(size), size)) else "invalid fill"


@st.composite
def mutated(draw) -> tuple[tuple, list[Box]]:
    """A tiling, perhaps with one box dropped, moved, stretched, or an extra one."""
    size = draw(shapes(max_dims=3, max_side=5))
    boxes = draw(tilings(size))
    if draw(st.booleans()):
        boxes = draw(st.permutations(boxes))
    how = draw(st.sampled_from(["keep", "drop", "move", "stretch", "add"]))
    at = draw(st.integers(0, len(boxes) - 1))
    offset, shape = boxes[at]
    delta = tuple(draw(st.integers(-2, 2)) for _ in size)
    if how == "drop":
        del boxes[at]
    elif how == "move":
        boxes[at] = tuple(a + d for a, d in zip(offset, delta, strict=True)), shape
    elif how == "stretch":
        boxes[at] = offset, tuple(a + d for a, d in zip(shape, delta, strict=True))
    elif how == "add" and size:
        boxes.append((tuple(max(0, a + d) for a, d in zip(offset, delta, strict=True)), shape))
    return size, boxes


@given(st.lists(mutated(), max_size=4))
@fewer(2)
def test_every_fault_of_a_mutated_tiling_is_named_and_nothing_else(tensors):
    named = {f"k{n}": one for n, one in enumerate(tensors)}
    faults = {fqn: fault_of(*one) for fqn, one in named.items()}
    expected = [(fqn, fault) for fqn, fault in faults.items() if fault]
    found = problems_of(index_of(named), complete=True)
    assert list(dict.fromkeys(line.split()[0] for line in found)) == [
        f"key:{f}" for f, _ in expected
    ]
    for fqn, fault in expected:
        lines = [line for line in found if line.startswith(f"key:{fqn} ")]
        assert all(fault in line for line in lines)
        assert len(lines) == 1 or fault == "out of bounds"


@given(st.lists(mutated(), max_size=3))
@fewer(4)
def test_a_gap_is_no_problem_where_each_rank_plans_alone(tensors):
    named = {f"k{n}": one for n, one in enumerate(tensors)}
    expected = {
        f"key:{fqn}" for fqn, one in named.items() if fault_of(*one) not in (None, "invalid fill")
    }
    assert {line.split()[0] for line in problems_of(index_of(named), complete=False)} == expected


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_boxes_in_any_order_are_compared(order):
    boxes = [((0, 0), (2, 4)), ((2, 0), (2, 2)), ((2, 1), (2, 2))]
    (line,) = problems_of(index_of({"w": ((4, 4), [boxes[n] for n in order])}), complete=True)
    assert "key:w has overlapping chunks" in line


def test_equal_layouts_of_many_tensors_are_each_reported():
    boxes = [((0, 0), (3, 2)), ((2, 0), (2, 4))]
    tensors = {f"layers.{n}": ((4, 4), boxes) for n in range(30)}
    found = problems_of(index_of(tensors), complete=True)
    assert [line.split()[0] for line in found] == [f"key:{fqn}" for fqn in tensors]


def test_a_tensor_without_any_box_is_a_gap_unless_it_is_empty():
    tensors = {"a": ((0, 3), []), "b": ((2,), []), "c": ((2,), [((0,), (2,))]), "d": ((), [])}
    found = problems_of(index_of(tensors), complete=True)
    assert [line.split()[0] for line in found] == ["key:b", "key:d"]
