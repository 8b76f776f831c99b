"""Broadcasts rank 0's state to every rank, a bucket of tensors at a time.

First all ranks learn the values and the tensors' specs (`broadcast_values`) and agree that they fit
(`join_mismatches`); then rank 0 sends the tensors (`from_rank0`). Everything here is collective
over the default process group. No rank needs more memory than a bucket of BUCKET_BYTES, or the
largest tensor.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.materialise import current_device, group_device_type
from pytest_dcp._engine.state_dicts.agreement import Agreement, raise_on_all_ranks
from pytest_dcp._engine.state_dicts.mismatch import Mismatch
from pytest_dcp._engine.state_dicts.packing import BUCKET_BYTES, Spec, views
from pytest_dcp._torch_internals.sharded_tensors import ShardedTensor

K = TypeVar("K", bound=Hashable)


def broadcast_values(make_values: Callable[[], Mapping[K, Any]]) -> dict[K, Any]:
    """Send the values that `make_values` returns on rank 0 to every rank: a Spec for each tensor.

    Raises ValueError, on every rank, for tensors of rank 0 that are not whole or have no values;
    and errors from pickling its values.
    """
    message: list[Any] = [None, None]
    with raise_on_all_ranks("rank 0's state cannot be announced"):
        if dist.get_rank() == 0:
            values = make_values()
            specs = {
                key: Spec(value.shape, value.dtype) if isinstance(value, torch.Tensor) else value
                for key, value in values.items()
            }
            message = [specs, _unsendable(values)]
            # Here a failure reaches all ranks; within the broadcast it would reach only this one.
            pickle.dumps(message)
    dist.broadcast_object_list(message, src=0)
    specs, problem = message
    if problem:
        raise ValueError(problem)
    return dict(specs)


def _unsendable(values: Mapping[K, Any]) -> str | None:
    parts = [key for key, value in values.items() if isinstance(value, DTensor | ShardedTensor)]
    empty = [k for k, v in values.items() if isinstance(v, torch.Tensor) and v.is_meta]
    if not parts and not empty:
        return None
    return (
        f"rank 0 cannot broadcast {parts + empty}: with broadcast_from_rank0 its state dict must "
        "hold whole tensors with values, as get_*_state_dict makes with full_state_dict=True"
    )


def join_mismatches(mismatch: Mismatch) -> Mismatch:
    """Join the mismatches of all ranks, so that all raise or none."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mismatch)
    return Mismatch().merge(every)


def from_rank0(
    values: Mapping[K, Any],
    specs: Mapping[K, Any],
    near: Iterable[Any],
    take: Callable[[K, torch.Tensor], object],
) -> None:
    """Give each tensor of rank 0 to `take`, with its key; it is gone when `take` returns.

    values: rank 0's; other ranks' are ignored. specs: the result of `broadcast_values`. near: the
    tensors to fill; sent tensors are on their device if the group supports it.

    A failure on one rank, in `take` too, is raised on all ranks once all tensors were sent.
    """
    tensors = {key: spec for key, spec in specs.items() if isinstance(spec, Spec)}
    sizes = [spec.packed_bytes for spec in tensors.values()]
    limit = max(0, *sizes, min(BUCKET_BYTES, sum(sizes)))
    with raise_on_all_ranks("no room for the state from rank 0"):
        memory = torch.empty(limit, dtype=torch.uint8, device=_choose_broadcast_device(near))
    sends = dist.get_rank() == 0
    receiving = Agreement("while rank 0's state was received")
    # One memory for all buckets, cut into the same views on every rank, so no names need be sent.
    for bucket in _buckets(tensors, limit):
        arrived = dict(zip(bucket, views(memory, list(bucket.values())), strict=True))
        for key, view in arrived.items() if sends else ():
            receiving.run(partial(_copy, view, values, key))
        # Sent even after a failure here: the other ranks wait for it, and learn of it in `settle`.
        used = sum(spec.packed_bytes for spec in bucket.values())
        dist.broadcast(memory[:used], src=0)
        for key, view in arrived.items():
            receiving.run(partial(take, key, view))
    receiving.settle()


def _copy(view: torch.Tensor, values: Mapping[K, Any], key: K) -> None:
    view.copy_(values[key])


def _buckets(tensors: Mapping[K, Spec], limit: int) -> Iterator[dict[K, Spec]]:
    """The tensors in their order, in groups that fit into a bucket; empty ones too."""
    bucket: dict[K, Spec] = {}
    used = 0
    for key, spec in tensors.items():
        if used + spec.packed_bytes > limit:
            yield bucket
            bucket, used = {}, 0
        bucket[key] = spec
        used += spec.packed_bytes
    if bucket:
        yield bucket


def _choose_broadcast_device(near: Iterable[Any]) -> torch.device:
    """The device on which tensors are sent: that of the first target that the group serves."""
    served = {pair.split(":")[0] for pair in dist.get_backend_config().split(",")}
    kinds = (value.device.type for value in near if isinstance(value, torch.Tensor))
    return current_device(next((kind for kind in kinds if kind in served), group_device_type()))
