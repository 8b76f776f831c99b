"""Matches a state dict with a checkpoint's index. Pure (no I/O).

One error names all keys that do not fit, with the nearest existing names.

The checkpoint has `w` in two chunks, as two ranks saved it, and `b`:

>>> from torch.distributed.checkpoint.metadata import (
...     ChunkStorageMetadata, TensorProperties, TensorStorageMetadata)
>>> def stored(size, *boxes):
...     chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
...     return TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), chunks)
>>> index = Index.of({
...     "w": stored([4, 2], ([0, 0], [2, 2]), ([2, 0], [2, 2])), "b": stored([2], ([0], [2]))})

How a tensor is cut does not matter here, only its full size and dtype:

>>> half = {"w": torch.zeros(4, 2, dtype=torch.float16)}
>>> found = match(half, index, strict=True)
>>> found.unexpected, found.converted
(('b',), {'w': (torch.float32, torch.float16)})

All problems come in one error:

>>> match({"w": torch.zeros(2, 2), "b2": torch.zeros(2)}, index, strict=True)
Traceback (most recent call last):
    ...
pytest_dcp.errors.CheckpointMismatchError: Missing key in checkpoint state_dict: b2 (nearest:
'b').
Size mismatch between saved torch.Size([4, 2]) and current: torch.Size([2, 2]) for w
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.declared_parts import BOXES, declares_parts, global_shape
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.numbers import kind_of, takes_tensor_of
from pytest_dcp._engine.plan.shards import PLAIN, describes_its_parts, own_write_items
from pytest_dcp._torch_internals.dtensors import spec_of
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor
from pytest_dcp.errors import CheckpointMismatchError

SHOWN = 20
USUAL = (*PLAIN, DTensor)
"""Classes whose own shape and dtype are those of the full tensor."""
SUGGESTED_FROM = 2000
"""The most names that one name is compared with for similarity, which is slow."""


Dtype = torch.dtype | type
"""The dtype of a tensor, or the class of a number."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one rank loaded, and how its keys matched the checkpoint's."""

    missing: tuple[str, ...] = ()
    """Requested but not in the checkpoint: left unchanged."""
    unexpected: tuple[str, ...] = ()
    """In the checkpoint, but not requested."""
    converted: Mapping[str, tuple[Dtype, Dtype]] = field(default_factory=dict)
    """Loaded from another dtype: (stored, asked for). The dtype of a number is its class: a stored
    number can fill a tensor of one element, and such a tensor can be loaded into a number."""
    bytes_needed: int = 0
    """Bytes of tensor data and values that the plan requested."""
    bytes_read: int = 0
    """From storage, for them."""
    bytes_verified: int = 0
    """How many of the bytes read were verified by a checksum."""

    @property
    def missing_keys(self) -> list[str]:
        """`missing`, under the name that `torch.nn.Module.load_state_dict` uses."""
        return list(self.missing)

    @property
    def unexpected_keys(self) -> list[str]:
        """`unexpected`, under the name that `torch.nn.Module.load_state_dict` uses."""
        return list(self.unexpected)

    def __iter__(self) -> Iterator[list[str]]:
        """For `missing_keys, unexpected_keys = load(...)`."""
        return iter((self.missing_keys, self.unexpected_keys))


@dataclass(frozen=True, slots=True)
class Match:
    """The outcome of comparing keys."""

    loaded: dict[str, Any]
    """The values to load."""
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    converted: dict[str, tuple[Dtype, Dtype]]


def match(
    state_dict: Mapping[str, Any],
    index: Index,
    *,
    strict: bool,
    stored_as: Mapping[str, str] | None = None,
    numbers: bool = False,
) -> Match:
    """The part of the flat state dict that the index holds."""
    row_of = index.row_of
    renamed = stored_as or {}
    names = {fqn: renamed.get(fqn, fqn) for fqn in state_dict}
    missing, unexpected = _compare_names(names, index, renamed=bool(stored_as))
    loaded = dict(state_dict)
    for fqn in missing:
        del loaded[fqn]
    problems: dict[str, str] = {}
    converted: dict[str, tuple[Dtype, Dtype]] = {}
    ndims = index.ndim.tolist()
    sizes = [tuple(size[:n]) for size, n in zip(index.size.tolist(), ndims, strict=True)]
    dtypes = [p.dtype for p in index.properties]
    stored = [dtypes[n] if n >= 0 else None for n in index.property_of.tolist()]
    for fqn, value in loaded.items():
        row = row_of[names[fqn]]
        if ndims[row] < 0:
            continue  # a value: it is checked when it is read
        if type(value) in USUAL:
            here: Any = spec_of(value).tensor_meta if type(value) is DTensor else value
            try:
                same = here.shape == sizes[row] and here.dtype is stored[row]
            except RuntimeError:  # A nested tensor; checking every tensor for this would cost more.
                same = False
            if same and not hasattr(value, BOXES):
                continue  # the ordinary kinds of values, which need none of the checks below.
        fit = _fit(fqn, value, sizes[row], stored[row], strict, numbers)
        if isinstance(fit, str):
            problems[fqn] = fit
        elif fit is not None:
            converted[fqn] = fit
    if problems or (missing and strict):
        raise _error(missing if strict else (), names, unexpected, problems, index)
    return Match(loaded, tuple(missing), unexpected, converted)


def _compare_names(
    names: Mapping[str, str], index: Index, *, renamed: bool
) -> tuple[list[str], tuple[str, ...]]:
    """The names that the index lacks, and the names of the index that are not asked for.

    names: for each name here the checkpoint's. renamed: whether any differ.
    """
    if not renamed and names.keys() == index.row_of.keys():
        return [], ()
    used = set(names.values())
    return (
        [fqn for fqn, name in names.items() if name not in index.row_of],
        tuple(fqn for fqn in index.fqns if fqn not in used),
    )


def merge_errors(errors: Sequence[CheckpointMismatchError]) -> CheckpointMismatchError:
    """One error with all of these messages; the error itself if there is only one."""
    if len(errors) == 1:
        return errors[0]
    more = [f"... and {len(errors) - SHOWN} more"] if len(errors) > SHOWN else []
    return CheckpointMismatchError(
        "\n".join([error.message for error in errors[:SHOWN]] + more),
        missing=tuple(fqn for error in errors for fqn in error.missing),
        unexpected=tuple(fqn for error in errors for fqn in error.unexpected),
        mismatched=tuple(fqn for error in errors for fqn in error.mismatched),
    )


def _fit(
    fqn: str,
    value: Any,
    size: tuple[int, ...],
    dtype: torch.dtype | None,
    strict: bool,
    numbers: bool,
) -> str | tuple[Dtype, Dtype] | None:
    """How a value takes the stored tensor: as it is (None), converted (the stored dtype and its
    own), or not at all: then the reason.
    """
    if not isinstance(value, torch.Tensor):
        kind = type(value)
        if (
            numbers
            and dtype
            and math.prod(size) == 1
            and takes_tensor_of(kind, dtype, strict=strict)
        ):
            return dtype, kind
        return f"{fqn!r} is a tensor in the checkpoint, and {type(value).__name__} here"
    if not isinstance(value, ShardedTensor) and value.is_nested:
        return f"{fqn!r} is a nested tensor here: load its values() and offsets()"
    here, now = _size_and_dtype(fqn, value)
    if tuple(here) != size:
        return f"Size mismatch between saved {torch.Size(size)} and current: {here} for {fqn}"
    if dtype is None or now is None or dtype == now:
        return None
    if strict and kind_of(dtype) != kind_of(now):
        return f"dtype mismatch between saved {dtype} and current: {now} for {fqn}"
    return dtype, now


def _size_and_dtype(fqn: str, value: torch.Tensor) -> tuple[torch.Size, torch.dtype | None]:
    """The full tensor's size, and the dtype of its memory; None if this rank has none."""
    if describes_its_parts(value):
        descriptions = [item.tensor_data for item in own_write_items(fqn, value)]
        data = next((some for some in descriptions if some is not None), None)
        return (value.shape, None) if data is None else (data.size, data.properties.dtype)
    if isinstance(value, ShardedTensor):
        # Its own methods warn about its deprecation; its metadata does not.
        found = value.metadata()
        return found.size, found.tensor_properties.dtype
    if declares_parts(value):
        return global_shape(fqn, value), value.dtype
    return value.shape, value.dtype


def _error(
    missing: Sequence[str],
    names: Mapping[str, str],
    unexpected: Sequence[str],
    problems: Mapping[str, str],
    index: Index,
) -> CheckpointMismatchError:
    lines = list(problems.values())
    if missing:
        pool = unexpected or index.fqns
        likely = [_with_nearest(fqn, names[fqn], pool, index.row_of) for fqn in missing[:SHOWN]]
        lines.insert(0, f"Missing key in checkpoint state_dict: {', '.join(likely)}.")
    if len(missing) > SHOWN:
        lines.insert(1, f"... and {len(missing) - SHOWN} more missing keys")
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"... and {len(lines) - SHOWN} more"]
    return CheckpointMismatchError(
        "\n".join(lines),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=tuple(problems),
    )


def _with_nearest(fqn: str, stored_as: str, names: Iterable[str], stored: Collection[str]) -> str:
    """A missing name, with the nearest names in the checkpoint."""
    subject = fqn if stored_as == fqn else f"{fqn}, looked for as {stored_as!r}"
    below = [name for name in stored if name.startswith(f"{stored_as}.")]
    if below:
        return (
            f"{subject} (the checkpoint has {len(below)} name(s) below it, such as {below[0]!r}; "
            "the state dict has something else or an empty container there)"
        )
    above = next((name for name in _names_above(stored_as) if name in stored), None)
    if above is not None:
        return f"{subject} (the checkpoint has {above!r} itself, with nothing below it)"
    pool = list(names)[:SUGGESTED_FROM]
    nearest = difflib.get_close_matches(stored_as, pool, n=1)
    return f"{subject} (nearest: {nearest[0]!r})" if nearest else subject


def _names_above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
