"""Python values as entries, and back.

A value is stored as `torch.save` stores it: an archive whose data.pkl is its pickle. Plain values
are written and read without torch's machinery; the others go through `torch.save`, and come back
through `torch.load`, with `weights_only=True` unless the caller trusts the checkpoint.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from typing import Any

import torch

from pytest_dcp.checkpoint.store.entry import pickle_of, value_entry
from pytest_dcp.checkpoint.store.unpickle import UnknownGlobalError, read_value
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

PICKLE_PROTOCOL = 2
"""What torch.save uses and all that torch.load(weights_only=True) reads."""

LEAVES = frozenset({type(None), bool, int, float, str})
CONTAINERS = frozenset({list, tuple, dict, set, OrderedDict})
DEPTH = 16


def encoded(value: Any) -> bytes:
    """The value as the bytes of an entry."""
    if plain(value):
        return value_entry(pickle.dumps(value, PICKLE_PROTOCOL))
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def decoded(entry: bytes | memoryview, *, weights_only: bool = True) -> Any:
    """The value of an entry.

    Raises CheckpointCorruptError where the bytes are no entry, and UntrustedPickleError where it
    holds more than `torch.load(weights_only=True)` takes and `weights_only` is not switched off.
    """
    try:
        return read_value(bytes(pickle_of(entry)))
    except UntrustedPickleError as unknown:
        if weights_only and not isinstance(unknown, UnknownGlobalError):
            raise
        try:
            return torch.load(io.BytesIO(entry), weights_only=weights_only)
        except pickle.UnpicklingError as error:
            raise UntrustedPickleError(
                f"{unknown.reason}, which is not loaded by default: pass weights_only=False if you "
                "trust whoever wrote the checkpoint, or allow the class with "
                f"torch.serialization.add_safe_globals ({str(error).splitlines()[0]})"
            ) from error
        except (RuntimeError, ValueError, LookupError, TypeError, EOFError) as error:
            if not weights_only:
                raise
            raise CheckpointCorruptError(f"the value cannot be read: {error}") from error


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
