"""Python values as entries, and back.

A value is stored as `torch.save` stores it: an archive whose data.pkl is its pickle. Plain values
are written without torch's machinery, the others by `torch.save`. All are read by the engine's own
reader, whose memory and time are in proportion to the entry; unknown values go to `torch.load` only
if the caller trusts the checkpoint.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from datetime import date, timedelta
from typing import Any

import numpy as np
import torch

from pytest_dcp._engine.format.entry import records_of, value_entry
from pytest_dcp._engine.format.opaque_values import read_quantised
from pytest_dcp._engine.plan.opaque import is_opaque
from pytest_dcp._engine.plan.shards import PLAIN as PLAIN_TENSORS
from pytest_dcp._engine.unpickle import UnknownGlobalError
from pytest_dcp._engine.unpickle.stored_tensors import read_stored_value
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

PICKLE_PROTOCOL = 2
"""The protocol that torch.save uses, and the only one that torch.load(weights_only=True) reads."""

LEAVES = frozenset({type(None), bool, int, float, str})
CONTAINERS = frozenset({list, tuple, dict, set, OrderedDict})
INERT_LEAVES = frozenset(
    {
        *(bytes, complex, io.BytesIO, torch.dtype, torch.device, torch.Size),
        *(date, timedelta, np.bool_, np.float16, np.float32, np.float64),
        *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    }
)
DEPTH = 16
MANY = 1000
"""Items of a container beyond which its parts are not looked at one by one."""


def encode_value(value: Any) -> bytes:
    """The value as the bytes of an entry."""
    if plain(value):
        return value_entry(pickle.dumps(value, PICKLE_PROTOCOL))
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def decode_value(entry: bytes | memoryview, *, weights_only: bool = True) -> Any:
    """The value of an entry.

    Raises CheckpointCorruptError where the bytes are no entry, and UntrustedPickleError where it
    holds more than plain and inert values, tensors, and classes that the user has allowed, and
    `weights_only` is not switched off.
    """
    read = records_of(entry)
    try:
        return read_stored_value(read("data.pkl"), lambda key: read(f"data/{key}"))
    except UntrustedPickleError as unknown:
        if not weights_only:
            return torch.load(io.BytesIO(entry), weights_only=False)
        if not isinstance(unknown, UnknownGlobalError):
            raise
        if (quantised := read_quantised(entry)) is not None:
            return quantised
        raise UntrustedPickleError(
            f"{unknown.reason}: pass weights_only=False if you trust the checkpoint's writer, or "
            "allow the class with torch.serialization.add_safe_globals"
        ) from unknown
    except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as e:
        # Errors of torch, numpy or an allowed class for arguments of the right types.
        raise CheckpointCorruptError(f"the value cannot be made: {e!r:.200}") from e


def refusal_of(value: Any, entry: bytes) -> str | None:
    """Why a load will refuse, by default, the value of this entry; None where it will not."""
    if inert(value):
        return None
    try:
        decode_value(entry)
    except CheckpointCorruptError as error:
        return error.reason
    return None


def inert(value: Any, depth: int = DEPTH) -> bool:
    """Whether the value is made of what is sure to be read, so that no trial is needed."""
    kind = type(value)
    if kind in LEAVES or kind in INERT_LEAVES:
        return True
    if kind is np.ndarray:
        return value.dtype.kind in "biufcSU"
    if is_opaque(value):  # A load fills one that is there.
        return True
    if kind in PLAIN_TENSORS:
        return value.layout is torch.strided and not value.is_quantized
    if kind not in CONTAINERS or not depth or len(value) > MANY:
        return False
    if issubclass(kind, dict):
        return all(plain(k, 1) and inert(v, depth - 1) for k, v in value.items())
    return kind is not set and all(inert(v, depth - 1) for v in value)


def plain(value: Any, depth: int = DEPTH) -> bool:
    """Whether the value is made of what `read_value` reads."""
    kind = type(value)
    if kind in LEAVES:
        return True
    if kind not in CONTAINERS or not depth:
        return False
    if issubclass(kind, dict):
        return all(plain(k, 1) and plain(v, depth - 1) for k, v in value.items())
    return all(plain(v, depth - 1) for v in value)
