"""The values that the strategies draw and shrink to."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from pytest_dcp import properties as props
from pytest_dcp.properties.bits import bits_of, flip, tensor_of

QUICK = settings(max_examples=50, deadline=None)
FOUND = settings(max_examples=2_000, deadline=None, phases=[Phase.generate, Phase.shrink])

STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "dtypes": props.dtypes(),
    "shapes": props.shapes(),
    "tensor_specs": props.tensor_specs(),
    "meshes": props.meshes(4),
    "placements": props.placements(props.MeshSpec((2, 2))),
    "layouts": props.layouts(),
    "arrangements": props.arrangements(),
    "state_dicts": props.state_dicts(),
    "modules": props.modules(),
    "parallel_plans": props.parallel_plans(props.ModuleSpec()),
    "fsdp_plans": props.fsdp_plans(props.ModuleSpec()),
    "any_plans": props.any_plans(props.ModuleSpec("tied")),
    "optimizers": props.optimizers(),
}
SIMPLEST = {
    "dtypes": torch.float32,
    "shapes": (),
    "tensor_specs": props.TensorSpec(),
    "meshes": props.MeshSpec((4,)),
    "placements": (Replicate(), Replicate()),
    "layouts": props.Layout(),
    "arrangements": (props.Layout(),),
    "state_dicts": props.StateSpec({"w": props.TensorSpec()}),
    "modules": props.ModuleSpec("mlp", 1, 0),
    "parallel_plans": props.ParallelPlan(),
    "fsdp_plans": props.ParallelPlan(props.MeshSpec((1,), ("shard",))),
    "any_plans": props.ParallelPlan(),
    "optimizers": props.OptimizerSpec(),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_shrinks_to_the_simplest(name: str) -> None:
    assert find(STRATEGIES[name], lambda _: True, settings=FOUND) == SIMPLEST[name]


@pytest.mark.parametrize("name", STRATEGIES)
@QUICK
@given(data=st.data())
def test_a_description_survives_pickling(name: str, data: st.DataObject) -> None:
    drawn = data.draw(STRATEGIES[name])
    assert repr(pickle.loads(pickle.dumps(drawn))) == repr(drawn)


SPECIAL_TENSORS = {
    "0-d": lambda t: t.dim() == 0,
    "empty": lambda t: not t.numel(),
    "odd strides": lambda t: not t.is_contiguous(),
    "inside a larger storage": lambda t: t.storage_offset() > 0,
    "negative zero": lambda t: bool(((t == 0) & t.signbit()).any()),
    "a NaN with a payload": lambda t: _has_payload(t),
    "subnormal": lambda t: bool(((t != 0) & (t.abs() < 2**-126)).any()),
    "infinite": lambda t: bool(t.isinf().any()),
}


def _has_payload(tensor: torch.Tensor) -> bool:
    bits = tensor.contiguous().view(torch.int32)
    return bool((tensor.isnan() & (bits & 0x3FFFFF != 0)).any())


@pytest.mark.parametrize("kind", SPECIAL_TENSORS)
def test_draws_tensors_of_every_special_kind(kind: str) -> None:
    drawn = props.tensors(dtype=st.just(torch.float32))
    assert SPECIAL_TENSORS[kind](find(drawn, SPECIAL_TENSORS[kind], settings=FOUND))


@QUICK
@given(spec=props.tensor_specs())
def test_a_tensor_is_built_alike_wherever_it_lies(spec: props.TensorSpec) -> None:
    built = spec.build()
    assert (tuple(built.shape), built.dtype) == (spec.shape, spec.dtype)
    assert (bits_of(built).reshape(-1) == spec.bits().reshape(-1)).all()


@QUICK
@given(spec=props.tensor_specs())
def test_flipping_changes_every_element(spec: props.TensorSpec) -> None:
    built = spec.build()
    flip(built)
    shape = (*spec.shape, spec.dtype.itemsize)
    assert (bits_of(built).reshape(shape) != spec.bits()).any(axis=-1).all()


@pytest.mark.parametrize("dtype", props.DTYPES, ids=str)
def test_counts_as_far_as_the_dtype_can(dtype: torch.dtype) -> None:
    bits = props.TensorSpec((3,), dtype).bits()
    assert bits.shape == (3, dtype.itemsize)
    if dtype not in (torch.bool, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu):
        assert tensor_of(bits, dtype).tolist() == [1, 2, 3]


def test_meshes_have_all_shapes_of_their_ranks() -> None:
    shapes = {(4,), (1, 4), (2, 2), (4, 1)}
    for shape in shapes:
        assert find(props.meshes(4), lambda mesh, s=shape: mesh.shape == s, settings=FOUND)
    assert {props.MeshSpec((2, 2)).coordinate(rank) for rank in range(5)} == {
        *((a, b) for a in range(2) for b in range(2)),
        None,
    }


def test_strided_shards_are_drawn_where_two_dimensions_shard_one() -> None:
    strided = props.placements(props.MeshSpec((2, 3)))
    found = find(strided, lambda p: isinstance(p[0], _StridedShard), settings=FOUND)
    assert found == (_StridedShard(0, split_factor=3), Shard(0))


def test_a_layout_fits_any_tensor() -> None:
    layout = props.Layout(props.MeshSpec((2, 2)), (Shard(2), Shard(1)))
    assert layout.fit(3) == (Shard(2), Shard(1))
    assert layout.fit(2) == (Shard(0), Shard(1))
    assert layout.fit(0) == (Replicate(), Replicate())


def test_a_state_has_layouts_of_one_world_size() -> None:
    two, three = (props.Layout(props.MeshSpec((n,))) for n in (2, 3))
    with pytest.raises(ValueError, match=r"one world size, got sizes \[2, 3\]"):
        props.StateSpec({}).on(two, three)


def test_tied_tensors_are_one_object() -> None:
    spec = find(props.state_dicts(), lambda s: "tied" in s.tree, settings=FOUND)
    built = spec.build()
    assert built["tied"] is built["w"]
    assert len(spec.tensors()) == 1


@pytest.mark.parametrize("kind", ["mlp", "frozen", "buffers", "tied", "transformer", "convolution"])
def test_a_module_is_built_alike_and_trains(kind: Any) -> None:
    spec = props.ModuleSpec(kind, width=3)
    one, other = spec.build(), spec.build()
    props.assert_state_dict_equal(one.state_dict(), other.state_dict())
    props.OptimizerSpec().build(one)
    one(spec.batch(0)).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in one.parameters())
    assert all(p.is_meta for p in spec.build("meta").parameters())


def test_every_kind_of_module_has_its_own_trait() -> None:
    spec = {kind: props.ModuleSpec(kind).build() for kind in ("frozen", "buffers", "tied")}
    assert [p.requires_grad for p in spec["frozen"].parameters()] == [False, False, True]
    buffers = spec["buffers"]
    assert set(dict(buffers.named_buffers())) - set(buffers.state_dict()) == {"scale"}
    assert spec["tied"].head.weight is spec["tied"].words.weight


@QUICK
@given(plan=props.parallel_plans(props.ModuleSpec("tied")))
def test_tied_layers_are_divided_along_the_same_side(plan: props.ParallelPlan) -> None:
    styles = dict(plan.styles)
    assert set(styles) in (set(), {"words", "head"})
    assert len(set(styles.values())) == len(styles)


@QUICK
@given(plan=props.fsdp_plans(props.ModuleSpec("transformer"), world_size=8))
def test_fsdp_plans_stay_in_their_world(plan: props.ParallelPlan) -> None:
    assert plan.mesh.size <= 8
    assert set(plan.mesh.dim_names) <= {"replicate", "shard", "tp"}
    assert "tp" in plan.mesh.dim_names or not plan.styles


@QUICK
@given(spec=props.optimizers())
def test_optimizers_have_each_trained_parameter_once(spec: props.OptimizerSpec) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(True)
    module[0].weight.requires_grad_(False)
    built = spec.build(module)
    trained = [id(p) for group in built.param_groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert len(built.param_groups) == min(len(spec.rates), 3)
