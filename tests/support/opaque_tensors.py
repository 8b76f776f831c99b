"""Tensors that are more than their elements, for tests: a scaled weight, one within another."""

from __future__ import annotations

from typing import Any

import torch

SAME = {torch.ops.aten.detach, torch.ops.aten.view, torch.ops.aten.clone, torch.ops.aten._to_copy}
"""Operations that torch's engine, or DTensor, does with a tensor before it is saved."""


class Scaled(torch.Tensor):
    """int8 values and a scale for each row, like torchao's tensors."""

    values: torch.Tensor
    scale: torch.Tensor
    block: int

    @staticmethod
    def __new__(cls, values: torch.Tensor, scale: torch.Tensor, block: int = 32) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.size(), dtype=torch.float32
        )

    def __init__(self, values: torch.Tensor, scale: torch.Tensor, block: int = 32) -> None:
        self.values = values
        self.scale = scale
        self.block = block

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["values", "scale"], self.block

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, block: Any, size: Any, stride: Any) -> Any:
        return cls(inner["values"], inner["scale"], block)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in SAME:
            return cls(args[0].values, args[0].scale, args[0].block)
        if func is torch.ops.aten.is_pinned.default:
            return False
        if func is torch.ops.aten.copy_.default:  # as torch's own engine loads it
            args[0].values.copy_(args[1].values)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        raise NotImplementedError(str(func))


class Outer(Scaled):
    """One whose scale is a wrapper too."""


def scaled(factor: int, *, block: int = 32) -> Scaled:
    values = (torch.arange(6).reshape(2, 3) * factor).to(torch.int8)
    return Scaled(values, torch.tensor([0.5, 2.0]) * factor, block)


def outer(factor: int) -> Outer:
    inner: Any = scaled(factor)
    return Outer(torch.full((2, 3), factor, dtype=torch.int8), inner)


def per_tensor(factor: int) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.arange(6.0) * factor, 0.5, 3, torch.quint8)


def per_channel(factor: int) -> torch.Tensor:
    scales, zeros = torch.tensor([0.5, 1.0]) * max(factor, 1), torch.tensor([0, 1])
    full = torch.arange(6.0).reshape(2, 3) * factor
    return torch.quantize_per_channel(full, scales, zeros, 0, torch.qint8)


def inside(value: Any) -> list[Any]:
    """All that a tensor holds, to compare."""
    if isinstance(value, Blocks):
        parts = [value.codes.tolist(), value.scale.tolist(), value.table.tolist()]
        return [*parts, value.signed]
    if isinstance(value, Scaled):
        return [type(value).__name__, value.block, *inside(value.values), *inside(value.scale)]
    if not value.is_quantized:
        return [value.dtype, value.tolist()]
    scheme = value.qscheme()
    if scheme is torch.per_tensor_affine:
        scales: list[Any] = [value.q_scale(), value.q_zero_point()]
    else:
        scales = [value.q_per_channel_scales().tolist(), value.q_per_channel_zero_points().tolist()]
    return [value.dtype, scheme, value.int_repr().tolist(), scales]


class Blocks(torch.Tensor):
    """Codes, a scale for each block of them in row-major order, and a table, as torchao's states.

    Its rows can be cut where blocks end; a part shares codes and scales, and copies the table.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    table: torch.Tensor
    signed: bool

    @staticmethod
    def __new__(cls, codes: Any, scale: Any, table: Any, signed: bool = True) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.size(), dtype=torch.float32
        )

    def __init__(self, codes: Any, scale: Any, table: Any, signed: bool = True) -> None:
        self.codes, self.scale, self.table = codes, scale, table
        self.signed = signed
        self.block_size = codes.numel() // scale.numel()

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale", "table"], [self.signed]

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return cls(inner["codes"], inner["scale"], inner["table"], *context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        it = args[0]
        if func.overloadpacket in SAME:
            return cls(it.codes, it.scale, it.table, it.signed)
        if func is torch.ops.aten.is_pinned.default:
            return False
        if func is torch.ops.aten.copy_.default:
            it.codes.copy_(args[1].codes)
            it.scale.copy_(args[1].scale)
            return it
        if func is torch.ops.aten.slice.Tensor:
            _, dim, start, end = args[:4]
            row = it.codes[0].numel()
            if dim or start * row % it.block_size or end * row % it.block_size:
                raise ValueError("not at a block's end")
            first, last = start * row // it.block_size, end * row // it.block_size
            return cls(it.codes[start:end], it.scale[first:last], it.table.clone(), it.signed)
        raise NotImplementedError(str(func))


def blocks(
    factor: int, *, first: int = 0, rows: int = 8, block: int = 8, signed: bool = True
) -> Blocks:
    """Rows of 4 elements, beginning with this row of the full tensor."""
    codes = (torch.arange(4 * first, 4 * (first + rows)) * factor).to(torch.uint8)
    scale = torch.arange(4 * first // block, 4 * (first + rows) // block).float() + factor
    return Blocks(codes.reshape(rows, 4), scale, torch.tensor([0.25, 4.0]), signed)
