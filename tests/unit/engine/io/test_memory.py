import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.io.tensor_memory import (
    is_flat,
    memory_at,
    memory_of,
    pieces,
    strided_tensor,
)
from support.catalogs import DTYPES
from support.tilings import fewer, shapes


@st.composite
def views(draw) -> torch.Tensor:
    """Views of a tensor: transposed, sliced, with steps, broadcast, conjugate, negated."""
    dtype = draw(st.sampled_from([*DTYPES, torch.complex64, torch.uint16]))
    shape = draw(shapes(max_dims=3, max_side=5))
    count = torch.Size(shape).numel()
    raw = (torch.arange(count * dtype.itemsize) * 37 % 256).to(torch.uint8)
    tensor = raw.view(dtype) if count else torch.empty(0, dtype=dtype)
    if dtype == torch.bool:
        tensor = raw % 2 == 1
    tensor = tensor.reshape(shape)
    for _ in range(draw(st.integers(0, 2))):
        how = draw(st.sampled_from(["transpose", "slice", "step", "expand", "conj"]))
        if tensor.dim() and how == "transpose":
            tensor = tensor.transpose(0, -1)
        elif tensor.dim() and how == "slice":
            tensor = tensor[1:]
        elif tensor.dim() and how == "step":
            tensor = tensor[..., ::2]
        elif how == "expand":
            tensor = tensor.expand(2, *tensor.shape)
        elif how == "conj" and dtype.is_complex:
            tensor = draw(st.sampled_from([tensor.conj(), tensor.conj().imag]))
            dtype = tensor.dtype
    return tensor


def row_major(tensor: torch.Tensor) -> bytes:
    """The values one by one, in the order of numpy."""
    flat = [tensor[tuple(at)] for at in np.ndindex(tuple(tensor.shape))]
    return b"".join(
        bytes(one.resolve_conj().resolve_neg().reshape(1).clone().view(torch.uint8).tolist())
        for one in flat
    )


@given(views(), st.integers(1, 70))
@fewer(2)
def test_pieces_are_the_values_in_row_major_order(tensor, nbytes):
    found = [bytes(piece) for piece in pieces(tensor, nbytes)]
    assert b"".join(found) == row_major(tensor)
    assert all(0 < len(piece) <= max(nbytes, tensor.itemsize) for piece in found)


@given(views())
@fewer(4)
def test_a_flat_tensor_is_seen_in_place(tensor):
    if not is_flat(tensor):
        return
    view = memory_of(tensor)
    assert bytes(view) == row_major(tensor)
    if len(view):
        view[0] ^= 1
        assert bytes(memory_of(tensor)) == bytes(view)


@given(st.data(), shapes(max_dims=3, max_side=4), st.sampled_from([torch.int64, torch.int8]))
@fewer(3)
def test_a_strided_view_of_a_buffer_equals_numpys(data, shape, dtype):
    stride = [data.draw(st.integers(0, 9)) for _ in shape]
    ends = [(n - 1) * step for n, step in zip(shape, stride, strict=True)]
    count = sum(ends) + 1 if all(shape) else 0
    more = data.draw(st.integers(0, 2))
    values = np.arange(count + more).astype("i8" if dtype == torch.int64 else "i1")
    buffer = memoryview(bytearray(values.tobytes()))
    found = strided_tensor(
        buffer, dtype, np.array(shape, dtype=np.int64), np.array(stride, dtype=np.int64)
    )
    expected = np.lib.stride_tricks.as_strided(
        values if count else np.zeros(1, values.dtype),
        shape,
        [step * values.itemsize for step in stride],
    )
    assert found.tolist() == expected.tolist()


def test_no_bytes_are_an_empty_view():
    assert bytes(memory_at(0, 0)) == b""
    assert bytes(memory_of(torch.empty(0, 3))) == b""
    assert list(pieces(torch.empty(3, 0).t(), 8)) == []


@pytest.mark.parametrize("tensor", [torch.ones(2, 3).t(), torch.ones(2, dtype=torch.cfloat).conj()])
def test_a_nested_state_is_refused(tensor):
    assert not is_flat(tensor)
    assert is_flat(torch.ones(2, 3))
