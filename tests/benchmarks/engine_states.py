"""The states that the engine's benchmark saves and loads: shapes, layouts, content, comparison.

A state is a list of two-dimensional float32 tensors. Every element's bits follow from its tensor
and its place in the full tensor, so that any rank can fill or check its own part of any layout
without having the whole.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

UNSHARDED = "unsharded"
"""Plain tensors, which one rank saves alone."""
SHARD_0 = "Shard(0)"
SHARD_1 = "Shard(1)"
REPLICATE = "Replicate"
MIXED = "mixed"
"""Every second tensor Shard(0), the others Replicate."""

MULTIPLIER = 2_654_435_761 - (1 << 32)
"""Knuth's, as int32: neighbours differ in most bits."""
ITEM_BYTES = 4
MEDIUM_COLUMNS = 4_096  # a weight's usual width; Shard(1) on 4 ranks has runs of 4 KiB

State = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """One tensor of a state; both sides are divisible by the number of ranks."""

    fqn: str
    rows: int
    columns: int

    @property
    def size_bytes(self) -> int:
        """Of the full tensor."""
        return self.rows * self.columns * ITEM_BYTES


def shapes(name: str, *, quick: bool) -> list[Shape]:
    """The tensors of a state. Pure (no I/O).

    `quick` ones are a sixteenth as large, or as many: too small for the targets to mean anything.
    """
    part = 16 if quick else 1
    if name == "medium":  # shards of 4, 8 and 16 MiB on 4 ranks
        sides = [(rows // part, MEDIUM_COLUMNS) for rows in (1_024, 2_048, 4_096) * 2]
    elif name == "large":  # shards of 64 and 128 MiB on 4 ranks
        sides = [(rows // part, MEDIUM_COLUMNS) for rows in (16_384, 16_384, 32_768)]
    elif name == "tiny":  # 8 KiB each
        sides = [(32, 64)] * (10_000 // part)
    elif name == "assorted":  # 0.4 to 16 KiB each
        chosen = random.Random(0)  # the same sizes in every run
        sides = [(8, 4 * chosen.randint(3, 128)) for _ in range(2_000 // part)]
    else:
        raise ValueError(f"there is no state {name!r}")
    return [Shape(f"layers.{n}.weight", *side) for n, side in enumerate(sides)]


def size_bytes(shapes: Sequence[Shape]) -> int:
    """Of the whole state."""
    return sum(shape.size_bytes for shape in shapes)


def _placement(layout: str, number: int) -> Placement:
    if layout == SHARD_0 or (layout == MIXED and number % 2 == 0):
        return Shard(0)
    return Shard(1) if layout == SHARD_1 else Replicate()


def empty(shapes: Sequence[Shape], layout: str, mesh: DeviceMesh | None) -> State:
    """This rank's part of the state, its pages touched. `mesh` is None where it is `unsharded`."""
    return {shape.fqn: _empty(shape, layout, number, mesh) for number, shape in enumerate(shapes)}


def _empty(shape: Shape, layout: str, number: int, mesh: DeviceMesh | None) -> torch.Tensor:
    size = torch.Size((shape.rows, shape.columns))
    if mesh is None:
        return torch.empty(size).zero_()
    placement = _placement(layout, number)
    local = list(size)
    if isinstance(placement, Shard):
        local[placement.dim] //= mesh.size()
    return DTensor.from_local(
        # torch.zeros may return untouched pages.
        torch.empty(local).zero_(),
        mesh,
        [placement],
        run_check=False,
        shape=size,
        stride=(shape.columns, 1),
    )


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def corner_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Where this rank's part of the tensor begins: its first row and column."""
    if not isinstance(tensor, DTensor):
        return 0, 0
    (placement,) = tensor.placements
    first = [0, 0]
    if isinstance(placement, Shard):
        first[placement.dim] = (
            tensor.device_mesh.get_rank() * tensor.to_local().shape[placement.dim]
        )
    return first[0], first[1]


def locals_of(state: State) -> Iterator[torch.Tensor]:
    """This rank's memory of each tensor, in order."""
    return map(local_of, state.values())


def local_bytes(state: State) -> int:
    """Of this rank's part."""
    return sum(local.nbytes for local in locals_of(state))


def clear(state: State) -> None:
    """Zeros everywhere."""
    for local in locals_of(state):
        local.zero_()


def fill(state: State) -> None:
    """The content that the state is defined to have."""
    for number, tensor in enumerate(state.values()):
        _write(number, tensor, local_of(tensor))


def check(state: State, who: str) -> None:
    """Nothing, once every bit is as defined.

    Raises RuntimeError naming the first tensor that is not.
    """
    for number, (fqn, tensor) in enumerate(state.items()):
        local = local_of(tensor)
        expected = torch.empty_like(local)
        _write(number, tensor, expected)
        if not torch.equal(local.view(torch.int32), expected.view(torch.int32)):
            raise RuntimeError(f"{who}: {fqn!r} does not have the content that was saved")


def _write(number: int, tensor: torch.Tensor, out: torch.Tensor) -> None:
    first_row, first_column = corner_of(tensor)
    width = tensor.shape[1]
    rows = torch.arange(first_row, first_row + out.shape[0], dtype=torch.int64) * width + number
    columns = torch.arange(first_column, first_column + out.shape[1], dtype=torch.int64)
    torch.add(
        (rows * MULTIPLIER).to(torch.int32)[:, None],
        (columns * MULTIPLIER).to(torch.int32)[None, :],
        out=out.view(torch.int32),
    )
