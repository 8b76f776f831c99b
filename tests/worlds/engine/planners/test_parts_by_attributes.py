"""Plain tensors that say by attributes which boxes of a larger tensor they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch import distributed as dist
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._torch_internals.dtensors import local_tensor
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType
from pytest_dcp.errors import PlanError

pytestmark = [
    pytest.mark.world_size(2, isolation="module"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FULL = torch.arange(48.0).reshape(8, 6)
PADDING = -1.0


def part(rank: int, boxes: Any, *, shape: tuple[int, ...] = (6, 7), fill: bool = True) -> Any:
    """A padded local tensor with these boxes ((global offset, local offset, size), ...) of FULL."""
    local: Any = torch.full(shape, PADDING)
    for offset, inside, size in boxes if fill else ():
        cut(local, inside, size).copy_(cut(FULL, offset, size))
    local.global_shape = tuple(FULL.shape)
    local.global_offsets, local.local_offsets, local.local_sizes = map(
        tuple, zip(*boxes, strict=True)
    )
    return local


def cut(tensor: Any, offset: Any, size: Any) -> Any:
    return tensor[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))]


def two_bands(rank: int) -> Any:
    """Rows 0-1 and 4-5 on rank 0, 2-3 and 6-7 on rank 1; at odd places of the local tensor."""
    return [
        ((2 * rank, 0), (0, 0), (2, 6)),
        ((2 * rank + 4, 0), (3, 1), (2, 6)),
    ]


def columns(rank: int) -> Any:
    return [((0, 2 * rank), (0, 0), (8, 2 + 2 * rank))]


def assert_filled(local: Any, boxes: Any) -> None:
    expected = part(0, boxes, shape=tuple(local.shape))
    assert torch.equal(local, expected)


@pytest.mark.parametrize("wrap", [lambda t: t, torch.nn.Parameter])
def test_parts_are_saved_as_one_tensor(rank: int, checkpoint_dir: Path, wrap: Any) -> None:
    local = part(rank, two_bands(rank))
    saved = wrap(local)
    if saved is not local:
        for name in ("global_shape", "global_offsets", "local_offsets", "local_sizes"):
            setattr(saved, name, getattr(local, name))
    dcp.save({"w": saved, "other": torch.ones(3)}, checkpoint_id=checkpoint_dir)
    whole = {"w": torch.zeros(8, 6), "other": torch.zeros(3)}
    dcp.load(whole, checkpoint_id=checkpoint_dir)
    assert torch.equal(whole["w"], FULL)
    theirs = {"w": torch.zeros(8, 6)}
    torch_dcp.load(theirs, checkpoint_id=checkpoint_dir)
    assert torch.equal(theirs["w"], FULL)


@pytest.mark.parametrize("boxes", [two_bands, columns])
@pytest.mark.parametrize("meta", [False, True])
def test_parts_are_loaded_where_they_say(
    rank: int, checkpoint_dir: Path, boxes: Any, meta: bool
) -> None:
    dcp.save({"w": FULL.clone()}, checkpoint_id=checkpoint_dir)
    local = part(rank, boxes(rank), shape=(8, 7), fill=False)
    state = {"w": local}
    if meta:
        state["w"] = part(rank, boxes(rank), shape=(8, 7), fill=False).to("meta")
        for name in ("global_shape", "global_offsets", "local_offsets", "local_sizes"):
            setattr(state["w"], name, getattr(local, name))
    dcp.load(state, checkpoint_id=checkpoint_dir)
    if meta:
        for offset, inside, size in boxes(rank):
            assert torch.equal(cut(state["w"], inside, size), cut(FULL, offset, size))
    else:
        assert state["w"] is local
        assert_filled(local, boxes(rank))


def test_parts_are_loaded_from_other_parts(rank: int, checkpoint_dir: Path) -> None:
    dcp.save({"w": part(rank, two_bands(rank))}, checkpoint_id=checkpoint_dir)
    local = part(rank, columns(1 - rank), shape=(8, 7), fill=False)
    dcp.load({"w": local}, checkpoint_id=checkpoint_dir)
    assert_filled(local, columns(1 - rank))


@pytest.mark.parametrize("kind", list(AsyncCheckpointerType))
def test_a_copy_in_the_background_keeps_the_parts(
    rank: int, checkpoint_dir: Path, kind: AsyncCheckpointerType
) -> None:
    local = part(rank, two_bands(rank))
    done: Any = dcp.async_save(
        {"w": local}, checkpoint_id=checkpoint_dir, async_checkpointer_type=kind
    )
    local.zero_()
    done.result()
    whole = {"w": torch.zeros(8, 6)}
    dcp.load(whole, checkpoint_id=checkpoint_dir)
    assert torch.equal(whole["w"], FULL)


def test_the_size_of_the_whole_tensor_must_fit(rank: int, checkpoint_dir: Path) -> None:
    """Also where the local tensor happens to have the stored size."""
    dcp.save({"w": torch.ones(6, 7)}, checkpoint_id=checkpoint_dir)
    with pytest.raises(dcp.CheckpointException, match=r"Size mismatch.*\[6, 7\].*\[8, 6\]"):
        dcp.load({"w": part(rank, two_bands(rank))}, checkpoint_id=checkpoint_dir)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("local_sizes", ((2, 6),), "must have the same length"),
        ("global_offsets", ((0, 0), (7, 0)), "outside of the global shape"),
        ("local_offsets", ((0, 0), (5, 0)), "outside of the local shape"),
        ("local_offsets", ((0, 0), (3,)), "outside of the local shape"),
        ("global_offsets", ((0, 0), (-1, 0)), "outside of the global shape"),
    ],
)
def test_parts_that_cannot_be_are_refused_by_name(
    rank: int, checkpoint_dir: Path, name: str, value: Any, said: str
) -> None:
    local = part(rank, two_bands(0))
    setattr(local, name, value)
    with pytest.raises(dcp.CheckpointException, match=rf"(?s)'model\.w'.*{said}"):
        dcp.save({"model": {"w": local}}, checkpoint_id=checkpoint_dir)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("global_shape", "x", "its global_shape must be a sequence of integers, got 'x'"),
        ("global_shape", None, "its global_shape must be a sequence of integers, got None"),
        ("global_shape", (8, 6.0), r"its global_shape must be .*, got \(8, 6.0\)"),
        ("global_offsets", None, "its global_offsets must be a sequence of integers a part"),
        ("local_offsets", "ab", "its local_offsets must be a sequence of integers a part"),
        ("local_sizes", (2, 6), r"its local_sizes\[0\] must be a sequence of integers, got 2"),
        ("local_sizes", (("2", 6),) * 2, r"its local_sizes\[0\] must be a sequence of integers"),
    ],
)
def test_attributes_of_other_types_are_refused_by_name(
    rank: int, checkpoint_dir: Path, name: str, value: Any, said: str
) -> None:
    local = part(rank, two_bands(rank))
    setattr(local, name, value)
    with pytest.raises(dcp.CheckpointException, match=rf"'model\.w': {said}") as caught:
        dcp.save({"model": {"w": local, "b": torch.ones(2)}}, checkpoint_id=checkpoint_dir)
    assert isinstance(caught.value, PlanError)
    dcp.save({"model": {"w": FULL.clone()}}, checkpoint_id=checkpoint_dir)
    with pytest.raises(dcp.CheckpointException, match=rf"'model\.w': {said}"):
        dcp.load({"model": {"w": local}}, checkpoint_id=checkpoint_dir)


class Speaks(torch.Tensor):
    """Says itself how it is saved, and wrongly."""

    gives: Any = None

    def __create_write_items__(self, fqn: str, value: Any) -> Any:
        return self.gives

    def __create_chunk_list__(self) -> Any:
        return self.gives


@pytest.mark.parametrize("gives", [None, ["x"], "x"])
def test_hooks_that_give_something_else_are_named(checkpoint_dir: Path, gives: Any) -> None:
    tensor = torch.ones(3).as_subclass(Speaks)
    tensor.gives = gives
    said = r"'m\.w': its __create_write_items__ must give a list of WriteItem, it gave"
    with pytest.raises(dcp.CheckpointException, match=said):
        dcp.save({"m": {"w": tensor}}, checkpoint_id=checkpoint_dir)
    size = torch.Size([3])
    data = TensorWriteData(
        ChunkStorageMetadata(torch.Size([0]), size), TensorProperties(torch.float32), size
    )
    index = MetadataIndex("m.w", [0])
    tensor.gives = [WriteItem(index, WriteItemType.SHARD, tensor_data=data)]
    said = r"'m\.w' is a Speaks, which has no __get_tensor_shard__"
    with pytest.raises(dcp.CheckpointException, match=said):
        dcp.save({"m": {"w": tensor}}, checkpoint_id=checkpoint_dir)


def test_the_protocol_is_a_type() -> None:
    assert isinstance(part(0, two_bands(0)), dcp.CheckpointableTensor)
    assert not isinstance(torch.ones(2), dcp.CheckpointableTensor)


def uneven(mesh: DeviceMesh, split: int, *, fill: bool = True) -> DTensor:
    """Rows of FULL up to `split` on rank 0, the others on rank 1, which only the object says.

    As Megatron-FSDP makes them.
    """
    first = split if dist.get_rank() else 0
    local: Any = (FULL[split:] if dist.get_rank() else FULL[:split]).clone()
    if not fill:
        local.fill_(PADDING)
    chunk = ChunkStorageMetadata(torch.Size([first, 0]), local.shape)

    def create_write_items(fqn: str, value: Any) -> list[WriteItem]:
        if not local.numel():
            return []
        data = TensorWriteData(chunk, TensorProperties(local.dtype), FULL.size())
        index = MetadataIndex(fqn, chunk.offsets)
        return [WriteItem(index, WriteItemType.SHARD, tensor_data=data)]

    made = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=FULL.shape, stride=FULL.stride()
    )
    said: Any = local_tensor(made)  # an alias of `local`
    said.__create_write_items__ = create_write_items
    said.__create_chunk_list__ = lambda: [chunk]
    return made


@pytest.mark.parametrize("split", [0, 3, 4, 7])
@pytest.mark.parametrize(
    ("save", "load"), [(dcp, dcp), (dcp, torch_dcp), (torch_dcp, dcp)], ids=["us", "to", "from"]
)
def test_the_local_tensor_of_a_dtensor_says_where_it_lies(
    save: Any, load: Any, split: int, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    save.save({"w": uneven(device_mesh, split)}, checkpoint_id=checkpoint_dir)
    target = uneven(device_mesh, 5, fill=False)
    load.load({"w": target}, checkpoint_id=checkpoint_dir)
    assert torch.equal(target.to_local(), uneven(device_mesh, 5).to_local())
    whole = {"w": torch.zeros(8, 6)}
    load.load(whole, checkpoint_id=checkpoint_dir)
    assert torch.equal(whole["w"], FULL)


@pytest.mark.parametrize("kind", list(AsyncCheckpointerType))
def test_a_copy_in_the_background_keeps_where_it_lies(
    kind: AsyncCheckpointerType, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    value = uneven(device_mesh, 3)
    done: Any = dcp.async_save(
        {"w": value}, checkpoint_id=checkpoint_dir, async_checkpointer_type=kind
    )
    value.to_local().zero_()
    done.result()
    whole = {"w": torch.zeros(8, 6)}
    dcp.load(whole, checkpoint_id=checkpoint_dir)
    assert torch.equal(whole["w"], FULL)
