"""Python values as entries, and back.

A value is stored as `torch.save` stores it: an archive whose data.pkl is its pickle. Plain values
are written without torch's machinery, the others by `torch.save`. The engine's own reader reads all
of them, with memory and time in proportion to the entry; it passes unknown values to `torch.load`
only if the caller trusts the checkpoint.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from datetime import date, timedelta
from typing import Any

import numpy as np
import torch

from pytest_dcp._engine.format.entry import records_of, value_entry
from pytest_dcp._engine.format.opaque_values import read_quantised
from pytest_dcp._engine.plan.opaque import is_opaque
from pytest_dcp._engine.plan.shards import PLAIN as PLAIN_TENSORS
from pytest_dcp._engine.unpickle import UnknownGlobalError
from pytest_dcp._engine.unpickle.stored_tensors import read_stored_value, storages_in_memory
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
ERRORS_OF_CLASSES = (
    *(RuntimeError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError),
)
"""That torch, numpy or an allowed class raises for arguments of the right types."""
MANY = 1000
"""Containers with more items than this are not inspected item by item."""


def encode_value(value: Any) -> bytes:
    """The value as the bytes of an entry."""
    if plain(value):
        return value_entry(pickle.dumps(value, PICKLE_PROTOCOL))
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def decode_value(
    entry: bytes | memoryview, *, weights_only: bool = True, share: bool = False
) -> Any:
    """The value of an entry.

    share: whether its tensors lie in the entry's memory, which must be writable.

    Raises CheckpointCorruptError if the bytes are not an entry, and UntrustedPickleError if the
    entry holds more than plain and inert values, tensors, and classes that the user has allowed,
    unless `weights_only` is False.
    """
    read = records_of(entry)
    try:
        return read_stored_value(
            read("data.pkl"), storages_in_memory(lambda key: read(f"data/{key}"), share=share)
        )
    except UntrustedPickleError as unknown:
        if not weights_only:
            return torch.load(io.BytesIO(entry), weights_only=False)
        if not isinstance(unknown, UnknownGlobalError):
            raise
        if (quantised := read_quantised(entry)) is not None:
            return quantised
        raise _advise_trust(unknown) from unknown
    except ERRORS_OF_CLASSES as error:
        raise CheckpointCorruptError(f"the value cannot be made: {error!r:.200}") from error


def decode_pickle(
    pickled: bytes | memoryview, make_storage: Callable[[str], torch.UntypedStorage]
) -> Any:
    """The value of the `data.pkl` of an entry, with tensors over storages that the caller makes.

    make_storage: a storage by its key, which may be without memory (device "meta").

    Raises as `decode_value`.
    """
    try:
        return read_stored_value(pickled, make_storage)
    except UnknownGlobalError as unknown:
        raise _advise_trust(unknown) from unknown
    except ERRORS_OF_CLASSES as error:
        raise CheckpointCorruptError(f"the value cannot be made: {error!r:.200}") from error


def _advise_trust(unknown: UnknownGlobalError) -> UntrustedPickleError:
    return UntrustedPickleError(
        f"{unknown.reason}: pass weights_only=False if you trust the checkpoint's writer, or "
        "allow the class with torch.serialization.add_safe_globals"
    )


def refusal_of(value: Any, entry: bytes) -> str | None:
    """Why a load will by default refuse the value of this entry; None if it will not."""
    if inert(value):
        return None
    try:
        decode_value(entry)
    except CheckpointCorruptError as error:
        return error.reason
    return None


def inert(value: Any, depth: int = DEPTH) -> bool:
    """Whether the value has only parts that are sure to be readable, so that no trial is needed."""
    kind = type(value)
    if kind in LEAVES or kind in INERT_LEAVES:
        return True
    if kind is np.ndarray:
        return value.dtype.kind in "biufcSU"
    if is_opaque(value):  # A load fills an existing one.
        return True
    if kind in PLAIN_TENSORS:
        return value.layout is torch.strided and not value.is_quantized
    if kind not in CONTAINERS or not depth or len(value) > MANY:
        return False
    if issubclass(kind, dict):
        return all(plain(k, 1) and inert(v, depth - 1) for k, v in value.items())
    return kind is not set and all(inert(v, depth - 1) for v in value)


def plain(value: Any, depth: int = DEPTH) -> bool:
    """Whether the value has only parts that `read_value` reads."""
    kind = type(value)
    if kind in LEAVES:
        return True
    if kind not in CONTAINERS or not depth:
        return False
    if issubclass(kind, dict):
        return all(plain(k, 1) and plain(v, depth - 1) for k, v in value.items())
    return all(plain(v, depth - 1) for v in value)
