"""A wrapper subclass that is a part of a tensor -> its entry, as `torch.save` writes it.

The entry has no single place of the part's elements, so a manifest gives none, nor checksums: a
reader parses the entry, whose records have a CRC each.
"""

from __future__ import annotations

import io
from typing import Any

import torch

from pytest_dcp._engine.plan.opaque import map_inner_tensors
from pytest_dcp._torch_internals.tensors import is_traceable_wrapper_subclass
from pytest_dcp.errors import PlanError


class WrapperEntry(bytes):
    """The entry of a chunk that is a wrapper of other tensors."""

    fqn: str
    """The key, for messages."""


def encode_wrapper(fqn: str, wrapper: torch.Tensor) -> WrapperEntry:
    """The wrapper's entry; its inner tensors come to the CPU, without the rest of their storages.

    Raises PlanError, naming the key, if the class cannot be pickled.
    """
    stream = io.BytesIO()
    try:
        torch.save(_compact(wrapper), stream)
    except Exception as error:
        # Its class may fail as it likes.
        raise PlanError(
            f"{fqn!r} is a {type(wrapper).__name__} that cannot be pickled: {error}"
        ) from error
    entry = WrapperEntry(stream.getbuffer())
    entry.fqn = fqn
    return entry


def _compact(tensor: Any) -> torch.Tensor:
    if is_traceable_wrapper_subclass(tensor):
        return map_inner_tensors(tensor, _compact)
    plain: torch.Tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()
