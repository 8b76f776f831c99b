"""StateDictStager: deep copies on the CPU whose memory is used again, with ties as they were."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import json
import os
import pickle
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.two_tensor import TwoTensor

from pytest_dcp._engine.rank_files.tied_state import ship_tied, stage_tied, unpickle_tied
from pytest_dcp._engine.staging.buffer_pool import Pool, shared_memory_of
from pytest_dcp.checkpoint._state_dict_stager import StateDictStager

torchs: Any = importlib.import_module("torch.distributed.checkpoint._state_dict_stager")

Pair = namedtuple("Pair", "first second")


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside: Any) -> None:
        self.inside = inside


@dataclasses.dataclass
class Holder:
    weight: torch.Tensor
    also: Any = None


class CountsCopies:
    """Says itself how it is copied."""

    def __init__(self) -> None:
        self.copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> CountsCopies:
        made = CountsCopies()
        made.copies = self.copies + 1
        return made


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def ways() -> list[Any]:
    return [
        pytest.param(lambda state: StateDictStager().stage(state), id="StateDictStager"),
        pytest.param(lambda state: StateDictStager(share_memory=True).stage(state), id="shared"),
        pytest.param(lambda state: stage_tied(state, Pool(shared=False)), id="one stretch"),
        pytest.param(_sent, id="sent to a process"),
    ]


def _sent(state: Any) -> Any:
    """As the process that writes gets it."""
    shipment = ship_tied(state)
    if shipment.memory is None:
        return unpickle_tied(shipment.pickled, None, 0)
    return unpickle_tied(shipment.pickled, os.dup(shipment.memory.fd), shipment.memory.nbytes)


@pytest.mark.parametrize("copied_by", ways())
def test_tied_tensors_stay_tied_and_others_stay_apart(copied_by: Any) -> None:
    weight, rows = torch.arange(6.0), torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(torch.ones(2))
    state = {
        "a": weight, "same": weight, "view": weight[2:4], "b": weight.clone(),
        "rows": rows, "transposed": rows.t(), "p": parameter, "data": parameter.data,
    }  # fmt: skip
    copied = copied_by(state)
    assert all(torch.equal(copied[key], state[key]) for key in state)
    assert copied["same"] is copied["a"]
    assert storage(copied["view"]) == storage(copied["a"])
    assert copied["view"].storage_offset() == 2
    assert storage(copied["b"]) != storage(copied["a"])
    assert copied["transposed"].stride() == rows.t().stride()
    copied["rows"][0, 1] = -1
    assert copied["transposed"][1, 0] == -1
    copied["data"][0] = 7
    assert copied["p"][0] == 7
    assert parameter[0] == 1
    assert rows[0, 1] == 1
    # Only the tensor's own storage: a file of torch.save holds whole storages.
    assert copied["b"].untyped_storage().nbytes() == 6 * 4


@pytest.mark.parametrize("copied_by", ways())
def test_tensors_without_elements_or_dimensions_and_lazy_bits(copied_by: Any) -> None:
    complex_values = torch.arange(3.0) + 1j
    state = {
        "0-d": torch.tensor(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4, dtype=torch.int64),
        "empty view": torch.ones(3)[3:],
        "odd": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
        "conjugate": complex_values.conj(),
        "negative": complex_values.conj().imag,
        "expanded": torch.ones(1).expand(5),
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
    }
    copied = copied_by(state)
    for key, value in state.items():
        assert (copied[key].dtype, copied[key].shape) == (value.dtype, value.shape), key
        wide = torch.float32 if key == "float8" else value.dtype
        assert torch.equal(copied[key].to(wide).resolve_neg(), value.to(wide).resolve_neg()), key
    assert copied["expanded"].stride() == (0,)


def test_everything_else_is_copied_as_deepcopy_copies_it() -> None:
    shared = [1, 2]
    state: dict[Any, Any] = {
        "twice": [shared, shared],
        "tuple": (1, (2, 3)),
        "changed tuple": (1, [2]),
        "pair": Pair(1, [2]),
        "ordered": OrderedDict(b=1, a=[2]),
        "counter": Counter("aab"),
        "default": defaultdict(list, {"x": [1]}),
        "deque": deque([1, [2]], maxlen=3),
        "set": {1, 2},
        "bytes": b"x",
        "array": bytearray(b"xy"),
        "class": Pair,
        "function": json.dumps,
        "module": json,
        "method": [].append,
        "none": None,
        "ellipsis": ...,
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
        (1, "key"): range(3),
    }
    without = {key: value for key, value in state.items() if key not in ("module", "method")}
    copied = StateDictStager().stage(state)
    assert {key: copied[key] for key in without} == copy.deepcopy(without)
    assert copied["twice"][0] is copied["twice"][1] is not shared
    assert copied["tuple"] is state["tuple"]
    assert copied["changed tuple"] is not state["changed tuple"]
    assert copied["pair"].second is not state["pair"].second
    assert copied["default"].default_factory is list
    assert copied["deque"].maxlen == 3
    assert copied["class"] is Pair
    assert copied["module"] is json
    assert copied["none"] is None


def test_tensors_in_objects_are_staged() -> None:
    weight = torch.ones(2)
    state = {"w": weight, "slotted": Slotted([weight]), "holder": Holder(weight[1:])}
    copied = StateDictStager().stage(state)
    assert copied["slotted"].inside[0] is copied["w"]
    assert storage(copied["holder"].weight) == storage(copied["w"]) != storage(weight)


def test_cycles_are_kept() -> None:
    state: dict[str, Any] = {"w": torch.ones(1)}
    state["self"] = state
    items: list[Any] = [state]
    state["tuple"] = (items, 1)
    items.append(state["tuple"])
    copied = StateDictStager().stage(state)
    assert copied["self"] is copied is not state
    assert copied["tuple"][0][1] is copied["tuple"]


def test_an_object_that_copies_itself_does_and_an_error_of_its_is_raised() -> None:
    assert StateDictStager().stage({"c": CountsCopies()})["c"].copies == 1

    class Refuses:
        def __deepcopy__(self, memo: Any) -> Any:
            raise ValueError("not to be copied")

    with pytest.raises(ValueError, match="not to be copied"):
        StateDictStager().stage([Refuses()])


def test_wrapper_subclasses_and_attributes_of_tensors_are_kept() -> None:
    two = TwoTensor(torch.ones(2), torch.zeros(2))
    marked: Any = torch.ones(1)
    marked.note = ["kept"]
    copied = StateDictStager().stage({"two": two, "marked": marked})
    assert type(copied["two"]) is TwoTensor
    assert torch.equal(copied["two"].a, torch.ones(2))
    assert storage(copied["two"].a) != storage(two.a)
    assert copied["marked"].note == ["kept"]
    assert copied["marked"].note is not marked.note


def test_copies_need_no_gradient() -> None:
    leaf = torch.ones(2, requires_grad=True)
    copied = StateDictStager().stage({"leaf": leaf, "result": leaf * 2})
    assert not copied["leaf"].requires_grad
    assert torch.equal(copied["result"], torch.full((2,), 2.0))


def test_the_second_copy_of_a_storage_uses_its_memory_again() -> None:
    stager = StateDictStager()
    weight = torch.ones(3)
    first = stager.stage({"w": weight})["w"]
    weight.fill_(2)
    second = stager.stage({"w": weight})["w"]
    assert storage(first) == storage(second)
    assert torch.equal(first, torch.full((3,), 2.0))
    assert len(stager._cached_storage_mapping) == 1
    weight.untyped_storage().resize_(8)
    third = stager.stage({"w": weight[:2]})["w"]
    assert torch.equal(third, torch.full((2,), 2.0))
    del weight
    gc.collect()
    assert len(stager._cached_storage_mapping) == 0
    stager.close()


def test_a_stretch_of_memory_is_not_used_again_while_a_copy_is_referenced() -> None:
    pool = Pool(shared=True)
    kept = stage_tied({"w": torch.ones(3), "big": torch.zeros(5000)}, pool)["w"]
    gc.collect()
    again = stage_tied({"w": torch.full((3,), 2.0), "big": torch.zeros(5000)}, pool)
    assert torch.equal(kept, torch.ones(3))
    address = storage(again["w"])
    del again
    gc.collect()
    assert storage(stage_tied({"w": torch.ones(3), "big": torch.zeros(5000)}, pool)["w"]) == address


def test_shared_memory_is_torchs_and_can_be_sent_by_torch_multiprocessing() -> None:
    copied = StateDictStager(share_memory=True).stage({"w": torch.ones(3), "e": torch.empty(0)})
    assert copied["w"].is_shared()
    assert StateDictStager().stage(torch.ones(2)).is_shared() is False


def test_without_cuda_pinning_is_refused_with_a_warning() -> None:
    if torch.cuda.is_available():
        assert StateDictStager(pin_memory=True).stage(torch.ones(4)).is_pinned()
        return
    with pytest.warns(UserWarning, match="pin_memory"):
        stager = StateDictStager(pin_memory=True)
    assert stager.pin_memory is False


def test_a_memo_gives_copies_that_are_there_already() -> None:
    weight, there = torch.ones(2), torch.zeros(2)
    copied = StateDictStager().deepcopy_with_tensor_offload([weight], {id(weight): there})
    assert copied[0] is there


def test_a_state_that_is_staged_already_is_sent_without_another_copy() -> None:
    pool = Pool(shared=True)
    staged = stage_tied({"w": torch.ones(3), "v": torch.zeros(2)}, pool)
    shipment = ship_tied(staged)
    assert shipment.state is staged
    assert shipment.memory is not None
    assert shipment.memory is shared_memory_of(staged["w"])
    elsewhere = ship_tied({**staged, "more": torch.ones(1)})
    assert elsewhere.memory is not shipment.memory


def test_a_pickle_that_was_not_meant_for_it_is_refused() -> None:
    pickled = ship_tied({"w": torch.ones(3)}).pickled
    with pytest.raises(TypeError, match="`unpickle_tied` only"):
        pickle.loads(pickled)
    with pytest.raises(ValueError, match="none came with it"):
        unpickle_tied(pickled, None, 0)


@st.composite
def states(draw: st.DrawFn) -> Any:
    """Nested lists and dicts of views into a few storages."""
    bases = [torch.arange(float(n)) for n in draw(st.lists(st.integers(0, 5), min_size=1))]

    def view() -> st.SearchStrategy[Any]:
        base = st.sampled_from(bases)
        return base.flatmap(
            lambda one: st.tuples(st.integers(0, len(one)), st.integers(0, len(one))).map(
                lambda ends: one[min(ends) : max(ends)]
            )
        )

    leaves = st.one_of(view(), st.sampled_from(bases), st.integers(), st.none())
    return draw(
        st.recursive(leaves, lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text("ab"), s))
    )


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return (
        [one for part in inner for one in tensors(part)] if isinstance(value, dict | list) else []
    )


def ties(value: Any) -> list[list[bool]]:
    """Of the tensors with memory: which shares its storage with which."""
    storages = [one.untyped_storage() for one in tensors(value)]
    at = [one.data_ptr() for one in storages if one.nbytes()]
    return [[one == other for other in at] for one in at]


@settings(max_examples=40, deadline=None)
@given(state=states())
def test_any_state_is_copied_with_the_ties_of_deepcopy(state: Any) -> None:
    expected = copy.deepcopy(state)
    for copied in (StateDictStager().stage(state), _sent(state)):
        found, wanted = tensors(copied), tensors(expected)
        assert len(found) == len(wanted)
        assert all(map(torch.equal, found, wanted))
        assert ties(copied) == ties(expected)


@pytest.mark.parametrize("make", [torchs.StateDictStager, StateDictStager])
def test_torchs_stager_and_ours_agree_on_a_plain_state(make: Any) -> None:
    weight = torch.arange(4.0)
    state = {"w": weight, "v": weight[1:], "n": [1, {"x": torch.ones(())}]}
    copied = make().stage(state)
    assert torch.equal(copied["v"], weight[1:])
    assert storage(copied["v"]) == storage(copied["w"])
    assert copied["n"][1]["x"] == 1
