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

from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.match_keys import kind_of, match
from pytest_dcp.errors import CheckpointMismatchError
from support.tilings import fewer

KINDS = {
    torch.float32: "float",
    torch.bfloat16: "float",
    torch.float8_e4m3fn: "float",
    torch.complex64: "complex",
    torch.int8: "int",
    torch.int64: "int",
    torch.uint8: "int",
    torch.bool: "bool",
}
names = st.sampled_from(["a", "b", "c.d", "e", "f.g.h"])
tensors = st.tuples(
    st.sampled_from(list(KINDS)), st.lists(st.integers(0, 2), max_size=2).map(tuple)
)
entries = st.one_of(st.none(), tensors)
"""None: a value; else a tensor's dtype and shape."""


def index_of(stored: dict) -> Index:
    return Index.of(
        {
            fqn: BytesStorageMetadata()
            if entry is None
            else TensorStorageMetadata(
                TensorProperties(entry[0]),
                torch.Size(entry[1]),
                [ChunkStorageMetadata(torch.Size([0] * len(entry[1])), torch.Size(entry[1]))],
            )
            for fqn, entry in stored.items()
        }
    )


def state_of(asked: dict) -> dict:
    return {
        fqn: 7 if entry is None else torch.zeros(entry[1], dtype=entry[0])
        for fqn, entry in asked.items()
    }


@given(
    st.dictionaries(names, entries), st.dictionaries(names, entries), st.booleans(), st.booleans()
)
@fewer(1)
def test_keys_fit_as_a_naive_comparison_says(asked, stored, strict, renamed):
    stored_as = {fqn: f"old.{fqn}" for fqn in asked} if renamed else None
    held = {f"old.{fqn}": entry for fqn, entry in stored.items()} if renamed else stored
    missing = [fqn for fqn in asked if fqn not in stored]
    unexpected = [fqn for fqn in held if fqn.removeprefix("old.") not in asked]
    wrong, converted = [], {}
    for fqn in asked:
        if stored.get(fqn) is None:
            continue
        (dtype, shape), here = stored[fqn], asked[fqn]
        if here is None or here[1] != shape:
            wrong.append(fqn)
        elif here[0] != dtype:
            converted[fqn] = (dtype, here[0])
            if strict and KINDS[dtype] != KINDS[here[0]]:
                wrong.append(fqn)
    state = state_of(asked)
    if wrong or (missing and strict):
        with pytest.raises(CheckpointMismatchError) as caught:
            match(state, index_of(held), strict=strict, stored_as=stored_as)
        error = caught.value
        assert error.mismatched == tuple(wrong)
        assert error.missing == (tuple(missing) if strict else ())
        assert error.unexpected == tuple(unexpected)
        assert all(fqn in str(error) for fqn in [*wrong, *(missing if strict else [])])
    else:
        found = match(state, index_of(held), strict=strict, stored_as=stored_as)
        assert list(found.loaded) == [fqn for fqn in asked if fqn in stored]
        assert all(found.loaded[fqn] is state[fqn] for fqn in found.loaded)
        assert (found.missing, found.unexpected) == (tuple(missing), tuple(unexpected))
        assert found.converted == converted


@pytest.mark.parametrize(("dtype", "kind"), KINDS.items())
def test_dtypes_are_of_four_kinds(dtype, kind):
    assert kind_of(dtype) == kind


def test_the_nearest_name_that_exists_is_suggested():
    stored = index_of({"model.weights": (torch.float32, (1,)), "other": None})
    with pytest.raises(CheckpointMismatchError, match=r"model.weight \(nearest: 'model.weights'\)"):
        match({"model.weight": torch.zeros(1)}, stored, strict=True)


def test_names_below_an_empty_container_are_named():
    stored = index_of({"my.0.k1": None, "my.1.k1": None, "mine": None})
    with pytest.raises(CheckpointMismatchError) as caught:
        match({"my": []}, stored, strict=True)
    assert "my (the checkpoint has 2 name(s) below it, such as 'my.0.k1'" in str(caught.value)


def test_a_value_above_a_missing_name_is_named():
    stored = index_of({"my.0": None, "my.0.k2": None})
    with pytest.raises(CheckpointMismatchError) as caught:
        match({"my.0.k1.x": 1}, stored, strict=True)
    assert "my.0.k1.x (the checkpoint has 'my.0' itself, with nothing below it" in str(caught.value)


def test_a_long_list_of_problems_is_cut_and_counted():
    index = index_of({f"w{n:02}": (torch.float32, (1,)) for n in range(50)})
    state = {f"w{n:02}": torch.zeros(2) for n in range(50)}
    with pytest.raises(CheckpointMismatchError, match=r"\.\.\. and 30 more$") as caught:
        match(state, index, strict=True)
    assert len(caught.value.mismatched) == 50
    with pytest.raises(CheckpointMismatchError, match="and 30 more missing keys") as caught:
        match({f"x{n}": torch.zeros(2) for n in range(50)}, index, strict=True)
    assert len(caught.value.missing) == 50


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_to_load_into_is_named(layout):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    stored = index_of({"a": (torch.float32, (2, 3)), "w": (torch.float32, (2, 3))})
    state = {"a": torch.ones(2, 3), "w": nested}
    with pytest.raises(CheckpointMismatchError, match="'w' is a nested tensor here") as caught:
        match(state, stored, strict=False)
    assert caught.value.mismatched == ("w",)
