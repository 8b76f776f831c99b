"""Differences between two state dicts, to the bit. Pure (no I/O), local to a rank.

A tensor that is sharded in one of them and whole in the other is compared without communication:
each rank compares its own part.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from pytest_dcp.errors import LawError
from pytest_dcp.properties.bits import Bits, bits_of
from pytest_dcp.properties.placed import local_of
from pytest_dcp.properties.placements import Places, part_of, places_of
from pytest_dcp.properties.subworlds import rank


@dataclass(frozen=True, slots=True)
class Difference:
    """One name whose values differ."""

    fqn: str
    """Keys joined with dots."""
    rank: int
    what: str
    """missing, unexpected, kind, shape, dtype, layout, bits or value."""
    actual: str
    expected: str
    index: tuple[int, ...] | None = None
    """Of the first differing element, in the full tensor; None if no elements were compared."""
    count: int = 0
    """Elements of this rank's part that differ."""
    of: int = 0
    """Elements of this rank's part."""

    def __str__(self) -> str:
        where = "" if self.index is None else f"{list(self.index)}"
        many = f", {self.count} of {self.of} elements" if self.of else ""
        return (
            f"rank {self.rank}: {self.fqn}{where}: {self.what}: "
            f"expected {self.expected}, got {self.actual}{many}"
        )


def differences(actual: Any, expected: Any) -> list[Difference]:
    """All names whose values differ on this rank, in the order of `expected`.

    Tensors must agree in dtype, shape and bits. A DTensor is compared with a plain tensor at the
    indices that this rank holds; two DTensors must also agree in mesh and placements. Python values
    must also have the same type; floats are compared by their bits.

    >>> for one in differences({"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([-0.0, 2.0])}):
    ...     print(one)
    rank 0: w[0]: bits: expected 0x80000000 (-0.0), got 0x00000000 (0.0), 1 of 2 elements
    """
    return list(_differences("", actual, expected))


def assert_state_dict_equal(actual: Any, expected: Any) -> None:
    """Raise LawError that names every difference on this rank: fqn, index, bits. Local.

    >>> assert_state_dict_equal({"step": 3, "extra": 0}, {"step": 4})
    Traceback (most recent call last):
        ...
    pytest_dcp.errors.LawError: the state dicts differ in 2 names:
      rank 0: step: value: expected int 4, got int 3
      rank 0: extra: unexpected: expected nothing, got int 0
    """
    __tracebackhide__ = True
    found = differences(actual, expected)
    if found:
        lines = "\n  ".join(map(str, found))
        raise LawError(f"the state dicts differ in {len(found)} names:\n  {lines}")


def _differences(fqn: str, actual: Any, expected: Any) -> Iterator[Difference]:
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        yield from _tensors(fqn, actual, expected)
    elif isinstance(expected, Mapping) and isinstance(actual, Mapping):
        for key in dict.fromkeys((*expected, *actual)):
            yield from _entry(_below(fqn, key), key, actual, expected)
    elif type(expected) is type(actual) and isinstance(expected, list | tuple):
        one, other = dict(enumerate(actual)), dict(enumerate(expected))
        for position in range(max(len(one), len(other))):
            yield from _entry(_below(fqn, position), position, one, other)
    elif _kind(actual) != _kind(expected):
        yield Difference(fqn, rank(), "kind", _describe(actual), _describe(expected))
    elif not _same_value(actual, expected):
        yield Difference(fqn, rank(), "value", _describe(actual), _describe(expected))


def _entry(
    fqn: str, key: Any, actual: Mapping[Any, Any], expected: Mapping[Any, Any]
) -> Iterator[Difference]:
    if key not in actual:
        yield Difference(fqn, rank(), "missing", "nothing", _describe(expected[key]))
    elif key not in expected:
        yield Difference(fqn, rank(), "unexpected", _describe(actual[key]), "nothing")
    else:
        yield from _differences(fqn, actual[key], expected[key])


def _tensors(fqn: str, actual: torch.Tensor, expected: torch.Tensor) -> Iterator[Difference]:
    facts = [
        ("dtype", actual.dtype, expected.dtype),
        ("shape", tuple(actual.shape), tuple(expected.shape)),
    ]
    if isinstance(actual, DTensor) and isinstance(expected, DTensor):
        facts.append(("layout", _layout(actual), _layout(expected)))
    for what, one, other in facts:
        if one != other:
            yield Difference(fqn, rank(), what, str(one), str(other))
            return
    if actual.is_meta or expected.is_meta:
        if actual.is_meta != expected.is_meta:
            yield Difference(fqn, rank(), "kind", _describe(actual), _describe(expected))
        return
    yield from _bits(fqn, actual, expected)


def _bits(fqn: str, actual: torch.Tensor, expected: torch.Tensor) -> Iterator[Difference]:
    places = _places(actual if isinstance(actual, DTensor) else expected)
    if places is None:
        return
    parts = []
    for one, other in ((actual, expected), (expected, actual)):
        bits = _reshape_bits(bits_of(local_of(one)), local_of(one))
        whole = isinstance(other, DTensor) and not isinstance(one, DTensor)
        parts.append(part_of(bits, places) if whole else bits)
    actual_bits, expected_bits = parts
    if not actual_bits.size and not expected_bits.size:
        return  # FSDP2 gives some empty parts fewer rows than the full tensor has
    if actual_bits.shape != expected_bits.shape:
        sides = [str(part.shape[:-1]) for part in parts]
        yield Difference(fqn, rank(), "shape of the local part", sides[0], sides[1])
        return
    wrong = np.argwhere((actual_bits != expected_bits).any(axis=-1))
    if len(wrong):
        at = tuple(int(n) for n in wrong[0])
        index = tuple(int(indices[n]) for indices, n in zip(places, at, strict=True))
        elements = [_element(part[at], actual.dtype) for part in parts]
        count, size = len(wrong), actual_bits[..., 0].size
        yield Difference(fqn, rank(), "bits", elements[0], elements[1], index, count, size)


def _places(tensor: torch.Tensor) -> Places | None:
    """The full tensor's indices that this rank holds; None outside the mesh."""
    if not isinstance(tensor, DTensor):
        return places_of(tensor.shape, (), (), ())
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    return places_of(tensor.shape, tensor.device_mesh.shape, coordinate, tensor.placements)


def _reshape_bits(bits: Bits, tensor: torch.Tensor) -> Bits:
    return bits.reshape(*tensor.shape, tensor.dtype.itemsize)


def _layout(tensor: DTensor) -> tuple[Any, ...]:
    return tensor.device_mesh.mesh.tolist(), tensor.placements


def _element(bits: Bits, dtype: torch.dtype) -> str:
    """The element's bits in hexadecimal, highest first, and its value if it has a number type."""
    digits = bits[::-1].tobytes().hex()
    if dtype == torch.float4_e2m1fn_x2:
        return f"0x{digits}"
    return f"0x{digits} ({torch.from_numpy(bits.copy()).view(dtype).to('cpu').tolist()[0]!r})"


def _kind(value: Any) -> Any:
    return "mapping" if isinstance(value, Mapping) else type(value)


def _same_value(actual: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return struct.pack("<d", actual) == struct.pack("<d", expected)
    return bool(actual == expected)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        layout = f" {value.placements}" if isinstance(value, DTensor) else ""
        return f"{type(value).__name__} {tuple(value.shape)} {value.dtype} {value.device}{layout}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def _below(fqn: str, key: Any) -> str:
    return f"{fqn}.{key}" if fqn else str(key)
