"""Wrapper subclasses as the local tensors of DTensors: saved as torch saves them, and cut by their
own class where the layouts differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch import distributed as dist
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.lazy_reading.comparison import compare_checkpoints
from pytest_dcp._engine.lazy_reading.verification import verify_checkpoint
from pytest_dcp._engine.plan.describe import write_items
from pytest_dcp.checkpoint.state_dict import get_optimizer_state_dict
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType
from pytest_dcp.errors import CheckpointCorruptError, CheckpointMismatchError, ReplicaMismatchError
from support.opaque_tensors import Blocks, blocks, inside

pytestmark = [
    pytest.mark.world_size(2, isolation="module"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ENGINES = pytest.mark.parametrize(
    ("save", "load"), [(dcp, dcp), (dcp, torch_dcp), (torch_dcp, dcp)], ids=["us", "to", "from"]
)


@pytest.fixture(autouse=True)
def trusted() -> Iterator[None]:
    """Torch's engine reads the classes that the program allows."""
    with torch.serialization.safe_globals([Blocks]):
        yield


def on(mesh: DeviceMesh, local: torch.Tensor, rows: int = 8, at: Any = None) -> DTensor:
    return DTensor.from_local(
        local, mesh, [at or Shard(0)], run_check=False, shape=(rows, 4), stride=(4, 1)
    )


def sharded(mesh: DeviceMesh, factor: int, rows: int = 8, **more: Any) -> DTensor:
    half = rows // 2
    return on(mesh, blocks(factor, first=half * dist.get_rank(), rows=half, **more), rows)


def held(value: Any) -> Any:
    return inside(value.to_local() if isinstance(value, DTensor) else value)


@ENGINES
def test_the_same_layout_goes_round(
    save: Any, load: Any, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    state = {"m": {"w": sharded(device_mesh, 3), "x": torch.ones(2)}}
    save.save(state, checkpoint_id=checkpoint_dir)
    target = sharded(device_mesh, 1)
    local = target.to_local()
    load.load({"m": {"w": target, "x": torch.zeros(2)}}, checkpoint_id=checkpoint_dir)
    assert inside(local) == held(sharded(device_mesh, 3))


@ENGINES
def test_a_part_that_is_plain_on_one_rank_goes_round(
    save: Any, load: Any, rank: int, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    """torchao leaves parts plain that are small or no multiple of a block."""

    def mixed(factor: int) -> DTensor:
        plain = torch.full((4, 4), float(factor))
        return on(device_mesh, plain if rank else blocks(factor, rows=4))

    save.save({"w": mixed(3)}, checkpoint_id=checkpoint_dir)
    target = mixed(1)
    load.load({"w": target}, checkpoint_id=checkpoint_dir)
    local, expected = target.to_local(), mixed(3).to_local()
    assert local.tolist() == expected.tolist() if rank else inside(local) == inside(expected)


@pytest.mark.parametrize("save", [dcp, torch_dcp], ids=["ours", "torchs"])
def test_an_opened_checkpoint_has_the_parts_of_each_shard(
    save: Any, rank: int, device_mesh: DeviceMesh, checkpoint_dir: Path, world: Any
) -> None:
    mixed = on(device_mesh, torch.ones(4, 4) if rank else blocks(2, rows=4))
    save.save({"w": sharded(device_mesh, 3), "m": mixed}, checkpoint_id=checkpoint_dir)
    if rank == 0:
        with dcp.open(checkpoint_dir) as opened:
            first, second = opened["w"].wrappers
            assert (first.offset, second.offset) == ((0, 0), (4, 0))
            for n, wrapper in enumerate((first, second)):
                parts = [part.tensor().tolist() for part in wrapper.walk_parts()]
                assert parts == inside(blocks(3, first=4 * n, rows=4))[:3]
            with pytest.raises(TypeError, match="2 shards, each a wrapper with parts of its own"):
                opened["w"].parts  # noqa: B018
            assert opened["m"].parts.keys() == {"codes", "scale", "table"}
            rows: Any = opened["m"]
            assert torch.equal(rows[4:], torch.ones(4, 4))
            assert verify_checkpoint(opened).problems == ()
            assert not compare_checkpoints(opened, opened)
    world.barrier()


@ENGINES
@pytest.mark.parametrize("whole", ["plain", "replicated"])
def test_parts_are_joined(
    save: Any, load: Any, whole: str, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    save.save({"w": sharded(device_mesh, 3)}, checkpoint_id=checkpoint_dir)
    local = blocks(1)
    target = local if whole == "plain" else on(device_mesh, local, at=Replicate())
    load.load({"w": target}, checkpoint_id=checkpoint_dir)
    assert inside(local) == inside(blocks(3))


@ENGINES
def test_a_replicated_one_is_cut(
    save: Any, load: Any, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    state = {"w": on(device_mesh, blocks(3), at=Replicate())}
    save.save(state, checkpoint_id=checkpoint_dir)
    target = sharded(device_mesh, 1)
    load.load({"w": target}, checkpoint_id=checkpoint_dir)
    assert held(target) == held(sharded(device_mesh, 3))


@pytest.mark.parametrize("engine", [dcp, torch_dcp])
def test_one_that_was_no_dtensor_is_cut(
    engine: Any, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    engine.save({"w": blocks(3)}, checkpoint_id=checkpoint_dir)
    target = sharded(device_mesh, 1)
    dcp.load({"w": target}, checkpoint_id=checkpoint_dir)
    assert held(target) == held(sharded(device_mesh, 3))


@pytest.mark.parametrize("engine", [dcp, torch_dcp])
@pytest.mark.parametrize("at", [Shard(0), Shard(1)])
def test_a_cut_within_a_block_is_refused_and_nothing_changes(
    engine: Any, at: Shard, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    """Three rows of four are a block and a half; columns do not end with blocks at all."""
    engine.save({"m": {"w": blocks(3, rows=6), "n": 7}}, checkpoint_id=checkpoint_dir)
    local = blocks(1, rows=3, block=4) if at.dim == 0 else Blocks(
        torch.zeros(6, 2, dtype=torch.uint8), torch.ones(3), torch.tensor([0.25, 4.0])
    )  # fmt: skip
    before = inside(local)
    state = {"m": {"w": on(device_mesh, local, 6, at), "n": 1}}
    said = (
        r"'m\.w' is a Blocks of size \(6, 4\), of which its class cannot cut the part .*not at a "
        r"block's end.*load it in the layout in which it was saved, or .* multiple of 8 elements"
    )
    with pytest.raises(CheckpointMismatchError, match=f"(?s){said}") as caught:
        dcp.load(state, checkpoint_id=checkpoint_dir)
    assert caught.value.mismatched == ("m.w",)
    assert inside(local) == before
    assert state["m"]["n"] == 1


@pytest.mark.parametrize("kind", list(AsyncCheckpointerType))
def test_it_is_copied_for_the_background(
    kind: AsyncCheckpointerType, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    value = sharded(device_mesh, 3)
    done: Any = dcp.async_save(
        {"w": value}, checkpoint_id=checkpoint_dir, async_checkpointer_type=kind
    )
    value.to_local().codes.zero_()  # type: ignore[attr-defined]
    done.result()
    target = sharded(device_mesh, 1)
    dcp.load({"w": target}, checkpoint_id=checkpoint_dir)
    assert held(target) == held(sharded(device_mesh, 3))


def test_replicas_that_differ_in_an_inner_tensor_are_named(
    rank: int, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    local = blocks(3)
    local.scale[2] += rank
    state = {"w": on(device_mesh, local, at=Replicate())}
    with pytest.raises(ReplicaMismatchError, match=r"(?s)'w'.*\['scale'\]\[2\].*5\.0.*6\.0"):
        dcp.save(state, checkpoint_id=checkpoint_dir)


def test_only_one_of_equal_replicas_is_written(
    device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    metadata = dcp.save(
        {"w": on(device_mesh, blocks(3), at=Replicate())}, checkpoint_id=checkpoint_dir
    )
    assert len(metadata.state_dict_metadata["w"].chunks) == 1


@pytest.mark.parametrize("stored", ["plain", "wrapper"])
def test_plain_elements_and_wrappers_never_replace_each_other(
    stored: str, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    plain = on(device_mesh, torch.full((4, 4), 5.0))
    wrapped = sharded(device_mesh, 1)
    saved, target = (plain, wrapped) if stored == "plain" else (wrapped, plain)
    dcp.save({"w": saved, "x": torch.ones(2)}, checkpoint_id=checkpoint_dir)
    before, other = str(held(wrapped)), torch.zeros(2)
    with pytest.raises(CheckpointMismatchError, match=r"'w' is .* in the checkpoint, and a ") as e:
        dcp.load({"w": target, "x": other}, checkpoint_id=checkpoint_dir)
    assert set(e.value.mismatched) == {"w"}
    assert other.tolist() == [0, 0]
    assert str(held(wrapped)) == before
    assert plain.to_local().tolist() == [[5.0] * 4] * 4


def test_a_wrapper_that_does_not_fit_on_one_rank_changes_nothing_on_the_other(
    rank: int, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    saved = on(device_mesh, torch.full((4, 4), 5.0) if rank else blocks(3, rows=4))
    dcp.save({"w": saved, "x": torch.ones(2)}, checkpoint_id=checkpoint_dir)
    target, other = on(device_mesh, torch.zeros(4, 4)), torch.zeros(2)
    with pytest.raises(CheckpointMismatchError, match=r"'w' is a support\.opaque_tensors"):
        dcp.load({"w": target, "x": other}, checkpoint_id=checkpoint_dir)
    assert other.tolist() == [0, 0]
    assert not target.to_local().any()


@pytest.mark.parametrize("layout", ["same", "cut"])
def test_other_attributes_are_refused(
    layout: str, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    dcp.save({"w": sharded(device_mesh, 3, signed=False)}, checkpoint_id=checkpoint_dir)
    target = sharded(device_mesh, 1) if layout == "same" else blocks(1)
    with pytest.raises(CheckpointMismatchError, match=r"'w\.signed' is False .* True here"):
        dcp.load({"w": target}, checkpoint_id=checkpoint_dir)
    assert held(target) == held(sharded(device_mesh, 1) if layout == "same" else blocks(1))


def test_a_table_that_its_class_copies_must_be_equal(
    device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    """It could not be loaded: the part's table is not the target's."""
    dcp.save({"w": sharded(device_mesh, 3)}, checkpoint_id=checkpoint_dir)
    target = blocks(1)
    target.table[0] = 9
    with pytest.raises(CheckpointMismatchError, match=r"'w\.table' is a tensor of other values"):
        dcp.load({"w": target}, checkpoint_id=checkpoint_dir)
    assert target.codes.tolist() == blocks(1).codes.tolist()


def test_another_block_size_is_refused_in_parts(
    device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    dcp.save({"w": sharded(device_mesh, 3)}, checkpoint_id=checkpoint_dir)
    with pytest.raises(CheckpointMismatchError, match=r"'w\.block_size' is 8 .* 16 here"):
        dcp.load({"w": blocks(1, block=16)}, checkpoint_id=checkpoint_dir)


@pytest.mark.parametrize("layout", ["same", "cut"])
def test_a_damaged_entry_is_named(
    layout: str, rank: int, device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    dcp.save({"w": sharded(device_mesh, 3), "n": 1}, checkpoint_id=checkpoint_dir)
    if rank == 0:
        codes = bytes(blocks(3, first=4, rows=4).codes.flatten().tolist())
        (path,) = (p for p in checkpoint_dir.glob("*.distcp") if codes in p.read_bytes())
        path.write_bytes(path.read_bytes().replace(codes, bytes(len(codes))))
    dist.barrier()
    target = sharded(device_mesh, 1) if layout == "same" else blocks(1)
    with pytest.raises(dcp.CheckpointException, match=r"(?s)CheckpointCorruptError.*w"):
        dcp.load({"w": target, "n": 0}, checkpoint_id=checkpoint_dir)


def test_a_tensor_larger_than_its_storage_takes_no_memory(
    device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    """A class copies the table when it cuts."""
    made = blocks(3)
    made.table = torch.zeros(1).expand(1 << 40)
    torch_dcp.save({"w": made}, checkpoint_id=checkpoint_dir)
    with pytest.raises(CheckpointCorruptError, match="expected a storage with all elements"):
        dcp.load({"w": sharded(device_mesh, 1)}, checkpoint_id=checkpoint_dir)


def test_a_local_wrapper_that_is_not_the_whole_box_is_refused(
    device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    state = {"w": on(device_mesh, blocks(3, rows=2))}
    with pytest.raises(
        dcp.CheckpointException, match=r"'w' is a Blocks of size \(2, 4\) here.*box"
    ):
        dcp.save(state, checkpoint_id=checkpoint_dir)


def test_files_of_safetensors_refuse_it_by_name(
    device_mesh: DeviceMesh, checkpoint_dir: Path
) -> None:
    writer = dcp.FileSystemWriter(
        checkpoint_dir, serialization_format=SerializationFormat.SAFETENSORS
    )
    with pytest.raises(dcp.CheckpointException, match=r"'w' is a DTensor of a wrapper"):
        dcp.save({"w": sharded(device_mesh, 3)}, storage_writer=writer)


def test_its_size_is_that_of_its_inner_tensors(device_mesh: DeviceMesh) -> None:
    """The writer reserves that many bytes for the file, no more."""
    items = write_items({"w": sharded(device_mesh, 3), "x": torch.ones(2)})
    assert items.size_bytes().tolist() == [16 + 8 + 8, 8]


class Quantised(torch.optim.Optimizer):
    """Keeps a wrapper for each parameter, from its first step on."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    local = blocks(5, rows=parameter.to_local().shape[0])
                    self.state[parameter]["average"] = DTensor.from_local(
                        local, parameter.device_mesh, parameter.placements, run_check=False
                    )
                    local.codes.add_(1)  # The first values are asked for, not these.


def test_an_optimizer_that_has_not_stepped_shows_its_states(device_mesh: DeviceMesh) -> None:
    model = torch.nn.Linear(4, 8, bias=False)
    fully_shard(model, mesh=device_mesh)
    found = get_optimizer_state_dict(model, Quantised(model.parameters()))
    assert held(found["state"]["weight"]["average"]) == inside(blocks(5, rows=4))
