"""Sums of tensors and digests of Python values, by which ranks compare their copies.

Equal values have equal digests on every rank and in every process, independent of object identity,
memory address, the iteration order of sets and the insertion order of dicts. Values are walked as
`copy` walks them, by `__reduce_ex__`; values that cannot be walked this way are not compared.

Two ranks hold the same value, filled in a different order; a third holds a different value:

>>> ours, theirs = {"lr": 0.1, "betas": (0.9, 0.999)}, {"betas": (0.9, 0.999), "lr": 0.1}
>>> digest_of_value(ours) == digest_of_value(theirs)
True
>>> digest_of_value(ours) == digest_of_value({"lr": 1, "betas": (0.9, 0.999)})
False
>>> digest_of_value(1) == digest_of_value(1.0), digest_of_value(0.0) == digest_of_value(-0.0)
(False, False)

Tensors are compared by their bytes in row-major order, independent of their strides:

>>> w = torch.arange(6.0).reshape(2, 3)
>>> sum_of_tensor(w, 0, 24) == sum_of_tensor(w.T.contiguous().T, 0, 24)
True
>>> sum_of_tensor(w, 8, 8) == sum_of_tensor(torch.tensor([2.0, 3.0]), 0, 8)  # a sample of it
True
"""

from __future__ import annotations

import hashlib
import io
import pickle
import reprlib
import struct
from collections import OrderedDict
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import numpy as np
import torch

from pytest_dcp._engine.format.checksum import crc32
from pytest_dcp._engine.io.tensor_memory import is_flat, memory_of, pieces
from pytest_dcp._engine.plan.opaque import inner_tensors, is_wrapper
from pytest_dcp._engine.plan.replica_comparison import NOT_COMPARED
from pytest_dcp._engine.plan.shards import PLAIN

PIECE_BYTES = 1 << 20
BLOCK_BYTES = 1 << 16
"""To find where two copies of a tensor differ, blocks are compared first, then one block's
elements."""
OUTLINE_AT_MOST = 1 << 14
"""Leaves of a value that are compared to find the first difference."""
_SHORT, _BITS = 1 << 60, (1 << 64) - 1
_FLOATS = 0x9E37_79B9_7F4A_7C15
"""Distinguishes floats from ints with the same bits."""
_FLOAT64, _UINT64 = struct.Struct("<d"), struct.Struct("<Q")
_LEAVES = frozenset({type(None), bool, int, float, str, bytes})


def sum_of_tensor(tensor: torch.Tensor, start: int, nbytes: int) -> int:
    """A sum of these bytes of the tensor's row-major data, never `NOT_COMPARED`.

    Of a wrapper of other tensors, a sum of all bytes in these.
    """
    if is_wrapper(tensor):
        return sum_of_wrapper(tensor) + 1
    if is_flat(tensor):
        return crc32(memory_of(tensor)[start : start + nbytes]) + 1
    crc = 0
    if start or nbytes < tensor.numel() * tensor.itemsize:
        width = tensor.itemsize
        tensor = _elements(tensor.detach(), start // width, (start + nbytes) // width)
    for piece in pieces(tensor, PIECE_BYTES):
        crc = crc32(piece, crc)
    return crc + 1


def sum_of_wrapper(wrapper: torch.Tensor) -> int:
    """A sum of the inner tensors of a wrapper, all their bytes."""
    crc = 0
    for _, inner in inner_tensors(wrapper):
        if is_wrapper(inner):
            crc = crc32(struct.pack("<I", sum_of_wrapper(inner)), crc)
        else:
            for piece in pieces(inner.detach(), PIECE_BYTES):
                crc = crc32(piece, crc)
    return crc


def _elements(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Elements number `first` to `last` - 1 in row-major order, one after the other."""
    while tensor.dim() > 1:
        inner = tensor.numel() // tensor.size(0)
        low, high = first // inner, -(-last // inner)
        first, last = first - low * inner, last - low * inner
        if high - low > 1:
            tensor = tensor[low:high].reshape(-1)
            break
        tensor = tensor[low]
    return tensor.reshape(-1)[first:last]


def data_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's values as a flat tensor on the CPU."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu()
    return plain.contiguous().reshape(-1)


def block_sums(tensor: torch.Tensor) -> list[int]:
    """A sum for each block of the tensor's row-major data."""
    flat = data_of(tensor)
    return [crc32(piece) for piece in pieces(flat, BLOCK_BYTES)]


def digest_of_value(value: Any) -> int:
    """64 bits that are equal for equal values; `NOT_COMPARED` for values that cannot be walked."""
    # Numbers are most of the values of a state, and a hash takes ten times as long as this.
    kind = type(value)
    if kind is int and -_SHORT < value < _SHORT:
        return int(value << 3 | 1) & _BITS
    if kind is float:
        (bits,) = _UINT64.unpack(_FLOAT64.pack(value))
        return int(bits ^ _FLOATS) or 1
    try:
        text = _canonical(value, ())
    except Exception:  # noqa: BLE001 - any class may fail as it likes; the save itself says so
        return NOT_COMPARED
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _canonical(value: Any, above: tuple[int, ...]) -> bytes:
    """Bytes that say the value; `above` are the ids of the objects that it is in."""
    kind = type(value)
    if kind in _LEAVES:
        return _leaf(value)
    if id(value) in above:
        return b"up%d" % (len(above) - above.index(id(value)))
    within = (*above, id(value))
    if kind is list or kind is tuple:
        return _sequence(kind.__name__.encode(), value, within)
    if kind is dict:
        pairs = [(_canonical(k, within), _canonical(v, within)) for k, v in value.items()]
        return _frame_parts(b"dict", [part for pair in sorted(pairs) for part in pair])
    if kind is set or kind is frozenset:
        return _frame_parts(b"set", sorted(_canonical(item, within) for item in value))
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if kind is np.ndarray and not value.dtype.hasobject:
        header = f"{value.dtype.str}{value.dtype.fields}{value.shape}".encode()
        return _frame_parts(b"array", [header, _hash(np.ascontiguousarray(value).tobytes())])
    if isinstance(value, type | FunctionType):
        return f"global {value.__module__}.{value.__qualname__}".encode()
    return _digest_by_reduce(value, within)


def _leaf(value: Any) -> bytes:
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, 4)
    # Without a memo, equal values give equal bytes even if they share different parts.
    pickler.fast = True
    pickler.dump(value)
    return stream.getvalue()


def _sequence(name: bytes, value: Any, within: tuple[int, ...]) -> bytes:
    if _LEAVES.issuperset(map(type, value)):
        return _frame_parts(name, [_leaf(value)])
    return _frame_parts(name, [_canonical(item, within) for item in value])


def _tensor(value: torch.Tensor) -> bytes:
    header = f"{type(value).__qualname__}{value.dtype}{tuple(value.shape)}".encode()
    if type(value) not in PLAIN or value.layout is not torch.strided or value.is_meta:
        raise TypeError("a tensor that is not its values alone")
    return _frame_parts(
        b"tensor", [header, struct.pack("<q", sum_of_tensor(value, 0, _nbytes(value)))]
    )


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _digest_by_reduce(value: Any, within: tuple[int, ...]) -> bytes:
    """A digest of the parts from which pickle would rebuild the object."""
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return f"global {type(value).__module__}.{reduced}".encode()
    parts = [_canonical(part, within) for part in reduced[:3]]
    if len(reduced) > 3 and reduced[3] is not None:
        parts.append(_canonical(list(reduced[3]), within))
    if len(reduced) > 4 and reduced[4] is not None:
        items = [(_canonical(k, within), _canonical(v, within)) for k, v in reduced[4]]
        pairs = items if isinstance(value, OrderedDict) else sorted(items)
        parts.append(_frame_parts(b"items", [part for pair in pairs for part in pair]))
    return _frame_parts(b"object", parts)


def _frame_parts(name: bytes, parts: list[bytes]) -> bytes:
    """The parts with their lengths, so that no two lists of parts give the same bytes."""
    heads = [b"%d:%b" % (len(part), part) for part in parts]
    return b"%b[%d %b]" % (name, len(parts), b"".join(heads))


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


# ---- for the error


def outline(value: Any) -> list[tuple[str, str, int]]:
    """The first leaves of a value: path, short form, digest."""
    leaves: list[tuple[str, str, int]] = []
    for leaf in _leaves(value, ""):
        leaves.append(leaf)
        if len(leaves) == OUTLINE_AT_MOST:
            break
    return leaves


def _leaves(value: Any, where: str) -> Iterator[tuple[str, str, int]]:
    if isinstance(value, torch.Tensor) and is_wrapper(value):
        value = dict(inner_tensors(value))
    if type(value) in PLAIN and value.layout is torch.strided and value.numel():
        value = value.detach().cpu().tolist()
    elif type(value) is np.ndarray and value.size:
        value = value.tolist()
    if type(value) in (list, tuple) and value:
        for at, item in enumerate(value):
            yield from _leaves(item, f"{where}[{at}]")
    elif isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{where}[{reprlib.repr(key)}]")
    else:
        yield where, reprlib.repr(value), digest_of_value(value)
