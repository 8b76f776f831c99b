"""Tensors of subclasses that torch has pickled whole: their memory, or the tensors within them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter as TorchWriter
from torch.distributed.checkpoint import save as torch_save
from torch.testing._internal.two_tensor import TwoTensor

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format.entry_locator import locate_wrapper
from pytest_dcp._engine.format.opaque_values import check_wrapper
from pytest_dcp._engine.format.opaque_values import fill_wrapper as fill_parts
from pytest_dcp._engine.io.transformed_entries import tensor_in
from pytest_dcp._engine.unpickle import UnknownGlobalError
from pytest_dcp.errors import CheckpointMismatchError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Marked(torch.Tensor):
    """A subclass with memory of its own."""


def two(first: float, size: int = 4) -> Any:
    return TwoTensor(torch.arange(float(size)) + first, torch.arange(float(size)) - first)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {
        "w": two(5),
        "deep": TwoTensor(two(1), two(2)),
        "m": torch.arange(3.0).as_subclass(Marked),
        "b": torch.ones(2),
    }
    torch_save(state, storage_writer=TorchWriter(tmp_path), no_dist=True)
    return tmp_path


def test_a_wrapper_is_filled_with_the_tensors_within_the_stored_one(saved: Path) -> None:
    target: dict[str, Any] = {
        "w": two(0),
        "deep": TwoTensor(two(0), two(0)),
        "m": torch.zeros(3).as_subclass(Marked),
        "b": torch.zeros(2),
    }
    inner = target["w"].a
    dcp.load(target, checkpoint_id=saved)
    assert target["w"].a is inner
    assert torch.equal(inner, two(5).a)
    assert torch.equal(target["w"].b, two(5).b)
    assert torch.equal(target["deep"].a.b, two(1).b)
    assert torch.equal(target["deep"].b.a, two(2).a)
    assert type(target["m"]) is Marked
    assert target["m"].tolist() == [0, 1, 2]
    assert target["b"].tolist() == [1, 1]


def test_a_subclass_with_memory_is_read_into_a_plain_tensor(saved: Path) -> None:
    target = {"m": torch.zeros(3), "b": torch.zeros(2)}
    dcp.load(target, checkpoint_id=saved)
    assert target["m"].tolist() == [0, 1, 2]


def test_a_plain_tensor_cannot_take_a_wrapper(saved: Path) -> None:
    target = {"w": torch.zeros(4), "b": torch.zeros(2)}
    with pytest.raises(BaseException, match="a wrapper of a, b") as caught:
        dcp.load(target, checkpoint_id=saved)
    assert "TwoTensor" in str(caught.value)
    assert "'w'" in str(caught.value)
    assert isinstance(caught.value, CheckpointMismatchError)


def test_a_tensor_beside_a_wrapper_is_loaded_without_it(saved: Path) -> None:
    target = {"b": torch.zeros(2)}
    dcp.load(target, checkpoint_id=saved)
    assert target["b"].tolist() == [1, 1]


class FirstThree(dcp.DefaultLoadPlanner):
    """Takes a part of `w`, as a planner may that lets sizes differ."""

    def create_local_plan(self) -> Any:
        assert self.metadata is not None
        entry: Any = self.metadata.state_dict_metadata["w"]
        entry.size = torch.Size([3])
        return super().create_local_plan()


class Uncuttable(TwoTensor):
    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return Uncuttable(inner["a"], inner["b"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.ops.aten.slice.Tensor:
            raise NotImplementedError("no slice")
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_a_part_of_a_wrapper_is_cut_by_its_class(saved: Path) -> None:
    target = two(0, 3)
    dcp.load({"w": target}, checkpoint_id=saved, planner=FirstThree())
    assert (target.a.tolist(), target.b.tolist()) == ([5, 6, 7], [-5, -4, -3])


def test_a_part_of_a_wrapper_is_refused_by_name(saved: Path) -> None:
    target = Uncuttable(torch.zeros(3), torch.zeros(3))
    with pytest.raises(CheckpointMismatchError, match=r"'w' is a Uncuttable of .*cannot cut"):
        dcp.load({"w": target}, checkpoint_id=saved, planner=FirstThree())
    assert not target.a.any()


class Scaled(torch.Tensor):
    """A wrapper of a tensor and its scales, with plain attributes."""

    def __new__(cls, a: torch.Tensor, s: torch.Tensor, **_: Any) -> Scaled:
        made: Scaled = torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)  # type: ignore[attr-defined]
        return made

    def __init__(self, a: torch.Tensor, s: torch.Tensor, **attributes: Any) -> None:
        self.a, self.s = a, s
        vars(self).update(attributes)

    def __tensor_flatten__(self) -> Any:
        inner = ["a", "s"]
        return inner, {name: one for name, one in vars(self).items() if name not in inner}

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> Scaled:
        return Scaled(inner["a"], inner["s"], **context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names, attributes = args[0].__tensor_flatten__()
        a, scales = (func(getattr(args[0], n), *args[1:], **(kwargs or {})) for n in names)
        return Scaled(a, scales, **attributes) if isinstance(a, torch.Tensor) else a


TAGS = {"tag": "x", "block": (1, 32), "kind": torch.int8, "more": {"k": 1}}


def scaled(first: float, scales: int = 2, **attributes: Any) -> Any:
    return Scaled(torch.arange(4.0) + first, torch.ones(scales) * first, **attributes)


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    state = {"k": {"w": scaled(5, **TAGS)}}
    torch_save(state, storage_writer=TorchWriter(tmp_path), no_dist=True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [("tag", "zz", "'x'"), ("block", (1, 64), r"\(1, 32\)"), ("kind", torch.uint8, "torch.int8")],
)
def test_a_plain_attribute_of_a_wrapper_must_equal_the_stored_one(
    name: str, here: Any, there: str, tagged: Path
) -> None:
    target = scaled(0, **{**TAGS, name: here})
    with pytest.raises(BaseException, match=rf"'k\.w\.{name}' is {there} in the check") as caught:
        dcp.load({"k": {"w": target}}, checkpoint_id=tagged)
    assert isinstance(caught.value, CheckpointMismatchError)
    assert torch.equal(target.a, scaled(0).a)


def test_an_attribute_of_a_wrapper_within_a_wrapper_is_named_before_anything_is_copied() -> None:
    stored = TwoTensor(two(5), two(5))
    target = TwoTensor(two(0), two(0))
    stored.b.tag, target.b.tag = "x", "zz"
    with pytest.raises(CheckpointMismatchError, match=r"'w\.b\.tag' is 'x' in the check"):
        fill_wrapper("w", target, entry_of(stored))
    assert torch.equal(target.a.a, two(0).a)
    target.b.tag = "x"
    fill_wrapper("w", target, entry_of(stored))
    assert torch.equal(target.b.b, two(5).b)


def test_attributes_of_one_side_only_and_values_that_are_not_plain_do_not_count(
    tagged: Path,
) -> None:
    target = scaled(0, tag="x", more={"k": 2}, own=3)
    dcp.load({"k": {"w": target}}, checkpoint_id=tagged)
    assert torch.equal(target.a, scaled(5).a)
    assert target.own == 3


def test_an_inner_tensor_of_another_size_is_named_and_nothing_is_copied(tagged: Path) -> None:
    target = scaled(0, scales=3, **TAGS)
    reason = r"'k\.w\.s' is a tensor of size \(2,\) in the checkpoint, and a Tensor of size \(3,\)"
    with pytest.raises(BaseException, match=reason) as caught:
        dcp.load({"k": {"w": target}}, checkpoint_id=tagged)
    assert isinstance(caught.value, CheckpointMismatchError)
    assert torch.equal(target.a, scaled(0).a)


def fill_wrapper(fqn: str, target: torch.Tensor, entry: bytes) -> None:
    stored = locate_wrapper(lambda at, nbytes: entry[at : at + nbytes], len(entry))
    assert stored is not None
    fill_parts(check_wrapper(fqn, target, stored), entry)


def entry_of(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_memory_of_a_subclass_is_found_in_its_entry() -> None:
    assert tensor_in(entry_of(torch.arange(3.0).as_subclass(Marked))).tolist() == [0, 1, 2]
    with pytest.raises(UnknownGlobalError, match="a wrapper of a, b"):
        tensor_in(entry_of(two(1)))


def test_no_code_of_a_subclass_runs(capsys: pytest.CaptureFixture[str]) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return print, ("boom",)

    value: Any = torch.arange(3.0).as_subclass(Marked)
    value.extra = Bomb()
    with pytest.raises(UnknownGlobalError):
        tensor_in(entry_of(value))
    assert capsys.readouterr().out == ""
