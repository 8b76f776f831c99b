"""Tensors to draw: descriptions that every process builds identically, and the tensors themselves.

A `TensorSpec` specifies shape, dtype, content and strides. It always builds the same bits, which
makes it the oracle for saves and loads.

>>> w = TensorSpec(shape=(2, 3), memory="transposed")
>>> w.build(), w.build().stride()
(tensor([[1., 2., 3.],
        [4., 5., 6.]]), (1, 2))
>>> torch.equal(w.build(), TensorSpec((2, 3)).build())
True
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import numpy as np
import torch
from hypothesis import strategies as st

from pytest_dcp.properties.bits import Bits, Memory, bits_of, tensor_of
from pytest_dcp.properties.dtypes import dtypes

Content = Literal["counting", "random", "special"]
"""counting: 1, 2, 3 ... as far as the dtype can represent them; random: any bits;"""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Description of a tensor, without its bytes.

    >>> TensorSpec((3,), torch.uint8, seed=4).build()
    tensor([5, 6, 7], dtype=torch.uint8)
    >>> TensorSpec((2,), content="special", seed=1).build()
    tensor([inf, inf])
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    content: Content = "counting"
    seed: int = 0
    """Of the content; another seed gives other bits."""
    memory: Memory = "contiguous"

    def bits(self) -> Bits:
        """The bits of all elements."""
        if self.content == "counting":
            return _count_up(self)
        rng = np.random.default_rng(self.seed)
        if self.content == "special":
            bits = _special(self, rng)
        else:
            bits = rng.integers(0, 256, (*self.shape, self.dtype.itemsize), dtype=np.uint8)
        return np.bitwise_and(bits, np.uint8(1)) if self.dtype == torch.bool else bits

    def build(self) -> torch.Tensor:
        """The tensor, on the CPU."""
        return tensor_of(self.bits(), self.dtype, self.memory)


def shapes(
    *, min_dims: int = 0, max_dims: int = 3, max_side: int = 6
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes, including 0-d and empty ones; shrink to fewer and shorter dimensions.

    >>> from hypothesis import given
    >>> @given(shapes(min_dims=1, max_side=2))
    ... def check(shape):
    ...     assert shape and max(shape) <= 2
    >>> check()
    """
    sides = st.integers(0, max_side)
    return st.lists(sides, min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def tensor_specs(
    draw: st.DrawFn,
    *,
    dtype: st.SearchStrategy[torch.dtype] | None = None,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
) -> TensorSpec:
    """Descriptions of tensors; shrink to a contiguous float32 scalar that holds 1."""
    return TensorSpec(
        shape=draw(shapes() if shape is None else shape),
        dtype=draw(dtypes() if dtype is None else dtype),
        content=draw(st.sampled_from(get_args(Content))),
        seed=draw(st.integers(0, 1 << 16)),
        memory=draw(st.sampled_from(get_args(Memory))),
    )


def tensors(
    *,
    dtype: st.SearchStrategy[torch.dtype] | None = None,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
) -> st.SearchStrategy[torch.Tensor]:
    """Tensors of any dtype, shape, content and strides; shrink like `tensor_specs`.

    >>> from hypothesis import given
    >>> @given(tensors(dtype=st.just(torch.float32)))
    ... def check(tensor):
    ...     assert tensor.dtype == torch.float32
    >>> check()
    """
    return tensor_specs(dtype=dtype, shape=shape).map(TensorSpec.build)


_COUNTS_TO = 100
"""Few dtypes represent more integers, and people read these."""


def _count_up(spec: TensorSpec) -> Bits:
    numbers = torch.arange(prod(spec.shape)).add_(spec.seed).remainder_(_COUNTS_TO).add_(1)
    if spec.dtype == torch.float4_e2m1fn_x2:
        # Conversion is impossible: two four-bit numbers share each byte.
        dtype = torch.uint8
    else:
        dtype = spec.dtype.to_real() if spec.dtype.is_complex else spec.dtype
    real = bits_of(numbers.to(torch.float64).to(dtype))
    if spec.dtype.is_complex:
        real = np.concatenate([real, np.zeros_like(real)], axis=-1)
    return real.reshape(*spec.shape, spec.dtype.itemsize)


_PATTERNS = {
    1: (0, 0x80, 1, 0x7F, 0xFF, 0x7C, 0x7E, 0x78),
    2: (0, 0x8000, 1, 0xFFFF, 0x7F80, 0xFF80, 0x7FC1, 0x7F81, 0x7C00, 0x7C01, 0x0080, 0x7FFF),
    4: (0, 1 << 31, 1, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0x7F800001, 0x00800000),
    8: (
        0,
        1 << 63,
        1,
        (1 << 64) - 1,
        0x7FF << 52,
        0xFFF << 52,
        (0x7FF8 << 48) + 1,
        (0x7FF << 52) + 1,
    ),
}
"""By width in bytes: zeros of both signs, the smallest subnormal, all ones, infinities, a quiet and
a signalling NaN with a payload, the smallest normal number (IEEE 754, bfloat16, fp8)."""


def _special(spec: TensorSpec, rng: np.random.Generator) -> Bits:
    size = spec.dtype.itemsize
    width = size // 2 if spec.dtype.is_complex else size
    patterns = np.array(_PATTERNS[width], dtype=f"<u{width}")
    drawn = rng.choice(patterns, (*spec.shape, size // width))
    return drawn.view(np.uint8).reshape(*spec.shape, size)
