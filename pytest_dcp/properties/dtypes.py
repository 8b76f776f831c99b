"""Dtypes to draw: all that a checkpoint can hold, simplest first."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

FLOATING = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
OTHERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
    torch.complex128,
    torch.complex32,
    torch.float4_e2m1fn_x2,
)
DTYPES = FLOATING + OTHERS
"""All dtypes of plain elements of whole bytes, which `torch.save` can write."""


def dtypes(*, floating: bool = False) -> st.SearchStrategy[torch.dtype]:
    """Any dtype that a checkpoint can hold, or floating ones only; shrinks to float32.

    >>> from hypothesis import given
    >>> @given(dtypes(floating=True))
    ... def check(dtype):
    ...     assert dtype.is_floating_point
    >>> check()
    """
    return st.sampled_from(FLOATING if floating else DTYPES)
