"""The write items of a rank's state dict: a value's item does not depend on values before it."""

import warnings
from itertools import permutations

import pytest
import torch

from pytest_dcp._engine.plan.columns import BYTES, TENSOR
from pytest_dcp._engine.plan.describe import wanted_boxes, write_items
from pytest_dcp.errors import PlanError


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they will go
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)


def masked() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


UNSAVABLE = {
    "nested": (nested, "nested tensor"),
    "masked": (masked, "masked tensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta device"),
}


@pytest.mark.parametrize("kind", UNSAVABLE)
def test_a_value_that_cannot_be_saved_is_named_at_any_position(kind):
    make, reason = UNSAVABLE[kind]
    others = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.uint8), "v": 3, "bad": make()}
    for order in permutations(others):
        with pytest.raises(PlanError, match=f"1 value.*\n'bad'.*{reason}"):
            write_items({fqn: others[fqn] for fqn in order})


def test_all_that_cannot_be_saved_is_named():
    state = {f"{kind}.{n}": UNSAVABLE[kind][0]() for n in range(2) for kind in UNSAVABLE}
    with pytest.raises(PlanError) as caught:
        write_items(state | {"good": torch.ones(1)})
    assert all(repr(fqn) in str(caught.value) for fqn in state)
    assert "good" not in str(caught.value)


def test_a_quantised_tensor_is_a_value_wherever_it_stands():
    others = {"a": torch.ones(2), "q": quantized(), "b": torch.ones(2, dtype=torch.uint8)}
    for order in permutations(others):
        found = write_items({fqn: others[fqn] for fqn in order})
        kinds = dict(zip(found.fqns, found.kind.tolist(), strict=True))
        assert kinds == {"a": TENSOR, "q": BYTES, "b": TENSOR}


def test_a_plain_tensor_is_its_own_memory_despite_its_attributes():
    talkative = torch.ones(2)
    talkative.__create_write_items__ = lambda fqn, value: 1 / 0
    found = write_items({"first": talkative, "second": torch.ones(2), "third": talkative})
    assert found.fqns == ("first", "second", "third")


def test_rows_have_names_kinds_properties_and_boxes_of_their_values():
    half = torch.nn.Parameter(torch.zeros(4, 2, dtype=torch.bfloat16))
    state = {"w": half, "s": torch.tensor(1.0), "v": "text", "e": torch.empty(0, 3), "w2": half}
    found = write_items(state)
    assert found.fqns == tuple(state)
    assert found.kind.tolist() == [TENSOR, TENSOR, BYTES, TENSOR, TENSOR]
    assert found.ndim.tolist() == [2, 0, -1, 2, 2]
    assert found.size.tolist() == [[4, 2], [1, 1], [1, 1], [0, 3], [4, 2]]
    assert found.shape.tolist() == found.size.tolist()
    assert not found.offset.any()
    said = [None if n < 0 else found.properties[n] for n in found.property_of]
    assert [p and (p.dtype, p.requires_grad) for p in said] == [
        *[(torch.bfloat16, True), (torch.float32, False), None, (torch.float32, False)],
        (torch.bfloat16, True),
    ]


def test_of_nothing_nothing_is_written_or_wanted():
    assert len(write_items({})) == 0
    assert len(wanted_boxes({})) == 0


def test_wanted_are_boxes_of_tensors_and_values_without_dimensions():
    state = {"w": torch.zeros(4, 2), "v": {"a": 1}, "s": torch.tensor(1.0)}
    found = wanted_boxes(state)
    assert found.fqns == ("w", "v", "s")
    assert found.ndim.tolist() == [2, -1, 0]
    assert found.shape.tolist() == [[4, 2], [1, 1], [1, 1]]
    assert found.nth.tolist() == [0, 0, 0]
