"""A state dict -> a copy of it on the CPU, so that training can go on while it is saved.

The tensors may have any layout and be on any device; their copies are row-major, one after another
in the memory of an arena. Only the part of a storage that a tensor views is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from itertools import compress
from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager, StagingOptions
from torch.distributed.tensor import DTensor

from pytest_dcp._engine.plan.containers import alike
from pytest_dcp._engine.plan.declared_parts import BOXES, declarations_of, declare_parts
from pytest_dcp._engine.plan.describe import find_save_problem, require_savable
from pytest_dcp._engine.plan.opaque import HOOK, is_opaque, map_inner_tensors
from pytest_dcp._engine.plan.per_rank import PerRank
from pytest_dcp._engine.plan.shards import PLAIN, hooks_of, require_memory, with_hooks
from pytest_dcp._engine.staging.buffer_pool import Pool, needed_bytes
from pytest_dcp._engine.staging.unstaged_tensors import UnstagedTensors
from pytest_dcp._torch_internals.dtensors import local_tensor
from pytest_dcp._torch_internals.sharded_tensors import (
    Shard,
    ShardedTensor,
    ShardMetadata,
    make_detached_sharded_tensor,
)
from pytest_dcp.errors import PlanError
from pytest_dcp.garbage_collection import collector_paused

State = dict[str, Any]

KEPT = Pool(shared=False)
KEPT_SHARED = Pool(shared=True)
"""The pool in which `async_save` stages without a stager; shared for a save in a process."""


def release_memory() -> None:
    """Free the memory kept for the next `async_save`; memory in use is freed when it is
    released.
    """
    KEPT.clear()
    KEPT_SHARED.clear()


class BlockingAsyncStager(AsyncStager):
    """Copies the state dict to the CPU and returns when the copy is done."""

    _synchronize_after_execute = False
    state_dict_cache: State | None = None
    """The last copy, which the next one overwrites; None if no memory is kept."""
    _upload: Future[Any] | None = None
    """The save of that copy."""

    def __init__(self, cache_staged_state_dict: bool = False, type_check: bool = False) -> None:
        """cache_staged_state_dict: keep the copy, and fill it anew at the next one.

        type_check: refuse values that are neither tensors nor of Python's plain types.
        """
        self.cache_staged_state_dict = cache_staged_state_dict
        self.type_check = type_check
        self.state_dict_cache = self._upload = None

    def stage(self, state_dict: State) -> State:
        """A copy of the state dict on the CPU.

        With `cache_staged_state_dict` it is the same copy each time, filled anew: users of the
        last one see it change. Waits for a save of the last one that is under way.
        """
        if self.type_check:
            _check_types(state_dict, "")
        if not self.cache_staged_state_dict:
            return stage_state(state_dict, Pool(shared=False))
        if self._upload is not None:
            wait([self._upload])
        if self.state_dict_cache is None or not refill(self.state_dict_cache, state_dict):
            self.state_dict_cache = stage_state(state_dict, Pool(shared=False))
        return self.state_dict_cache

    def hold_for(self, upload: Future[Any]) -> None:
        """Do not change the kept copy until this save of it is done."""
        self._upload = upload

    def synchronize_staging(self) -> None:
        """Nothing: the copy is made when `stage` returns."""

    def close(self) -> None:
        """Free the kept memory."""
        self.state_dict_cache = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "state_dict_cache": None, "_upload": None}


class DefaultStager(AsyncStager):
    """Copies the state dict to memory of its own, which it keeps for the next copy.

    Options about GPUs have no effect without one.
    """

    def __init__(self, config: StagingOptions = StagingOptions()) -> None:  # noqa: B008 - as torch's
        """use_pinned_memory: copy from a GPU into pages that are locked for it.

        use_shared_memory: copy to memory that a background process can map, without another copy.
        use_async_staging: copy in a thread; the state must not change until the future is done.
        use_non_blocking_copy: queue all copies from a GPU, and wait once.
        """
        self._config = config
        self._pool = Pool(shared=config.use_shared_memory)
        self._thread: ThreadPoolExecutor | None = None
        if config.use_async_staging:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="dcp-staging")
        self._under_way: Future[State] | None = None

    def stage(self, state_dict: State, **kwargs: Any) -> State | Future[State]:
        """A copy of the state dict on the CPU, or its future with `use_async_staging`."""
        if self._thread is None:
            return self._stage(state_dict, None)
        # The GPU must finish its pending work before the copy.
        before = torch.accelerator.current_stream() if torch.accelerator.is_available() else None
        self._under_way = self._thread.submit(self._stage, state_dict, before)
        return self._under_way

    def synchronize_staging(self) -> None:
        """Return when the last copy is done."""
        if self._under_way is not None:
            self._under_way.result()

    def close(self) -> None:
        """Wait for the copy under way, and free the memory."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        self._pool.close()

    def _stage(self, state_dict: State, before: torch.Stream | None) -> State:
        config = self._config
        with ExitStack() as stack:
            if before is not None:
                stream = torch.Stream(before.device)
                stream.wait_stream(before)
                stack.enter_context(stream)
            return self._copy_state(
                state_dict,
                pin=config.use_pinned_memory,
                blocking=not config.use_non_blocking_copy,
            )

    def _copy_state(self, state_dict: State, *, pin: bool, blocking: bool) -> State:
        return stage_state(state_dict, self._pool, pin=pin, blocking=blocking)


def stage_state(
    state_dict: State, pool: Pool, *, pin: bool = True, blocking: bool = False
) -> State:
    """A copy of the state dict, its tensors in memory of the pool.

    pin: lock the memory if tensors are on a GPU. blocking: wait after each copy, not once for all.
    Raises PlanError, before anything is copied, for tensors that have no values to copy.
    """
    return _stage_sources(state_dict, _tensors_to_stage(state_dict), pool, pin, blocking)


def stage_within_budget(
    state_dict: State, pool: Pool, budget_bytes: int
) -> tuple[State, UnstagedTensors | None]:
    """A copy of the state dict that leaves the tensors uncopied for which the budget has no room.

    budget_bytes: for all states in the pool's memory. The tensors that were left are the state
    dict's own: it must not change before they are written. None: everything was copied.
    Raises PlanError as `stage_state`.
    """
    sources = _tensors_to_stage(state_dict)
    fit = _choose_to_fit(sources, pool.available_bytes(budget_bytes))
    copied = _stage_sources(state_dict, sources, pool, fit=fit, budget_bytes=budget_bytes)
    unstaged = [source for source, fits in zip(sources, fit, strict=True) if not fits]
    waits = any(source.nbytes for source in unstaged)
    return copied, UnstagedTensors(unstaged) if waits else None


def _choose_to_fit(sources: Sequence[torch.Tensor], room_bytes: int) -> list[bool]:
    """Whether each tensor is copied: in the state's order, each that still has room.

    An empty one has nothing to copy.
    """
    fit = []
    for source in sources:
        nbytes = needed_bytes([source])
        fit.append(0 < nbytes <= room_bytes)
        room_bytes -= nbytes if fit[-1] else 0
    return fit


def _tensors_to_stage(state_dict: State) -> list[torch.Tensor]:
    try:
        return [tensor for _, tensor in _sources(state_dict)]
    except RecursionError:
        raise PlanError(
            "the state dict is nested more deeply than Python can walk, or holds a container that "
            "is inside itself: save fewer levels"
        ) from None


def _stage_sources(
    state_dict: State,
    sources: Sequence[torch.Tensor],
    pool: Pool,
    pin: bool = True,
    blocking: bool = False,
    *,
    fit: Sequence[bool] | None = None,
    budget_bytes: int | None = None,
) -> State:
    """The state dict with copies of its tensors, or of those that fit."""
    with torch.no_grad(), collector_paused():
        if fit is None:
            rooms = _copy_tensors(sources, pool, pin, blocking)
        else:
            to_copy = list(compress(sources, fit))
            copies = iter(_copy_tensors(to_copy, pool, pin, blocking, budget_bytes))
            rooms = [
                next(copies) if fits else source.detach()
                for source, fits in zip(sources, fit, strict=True)
            ]
        copied: State = _copy_value(state_dict, iter(rooms))
    return copied


def _copy_tensors(
    sources: Sequence[torch.Tensor],
    pool: Pool,
    pin: bool,
    blocking: bool,
    budget_bytes: int | None = None,
) -> list[torch.Tensor]:
    """Copies in one lease of the pool, whose size the budget limits."""
    if budget_bytes is not None and not sources:
        return []
    on_gpu = {tensor.device for tensor in sources if tensor.is_cuda}
    arena = pool.lease(needed_bytes(sources), budget_bytes)
    if on_gpu and pin:
        arena.memory.pin()
    queued = bool(on_gpu) and arena.memory.pinned and not blocking
    rooms = arena.allocate_like(sources)
    for room, source in zip(rooms, sources, strict=True):
        room.copy_(source, non_blocking=queued)
    for device in on_gpu if queued else ():
        torch.cuda.current_stream(device).synchronize()
    return rooms


def refill(copied: State, state_dict: State) -> bool:
    """Fill the copy from the state dict, in place; False if it has another structure.

    Raises PlanError, before anything is copied, for tensors that have no values to copy.
    """
    rooms, sources = list(_named_tensors(copied, "")), _sources(state_dict)
    if [_kind_of(*room) for room in rooms] != [_kind_of(*source) for source in sources]:
        return False
    with torch.no_grad(), collector_paused():
        for (_, room), (_, source) in zip(rooms, sources, strict=True):
            room.copy_(source)
        filled: State = _copy_value(state_dict, (room for _, room in rooms))
    copied.clear()
    copied.update(filled)
    return True


def _kind_of(name: str, tensor: torch.Tensor) -> tuple[str, torch.dtype, torch.Size]:
    return name, tensor.dtype, tensor.shape


def _fits(tensor: torch.Tensor) -> bool:
    """Whether the tensor consists of nothing but its values."""
    plain = type(tensor) in PLAIN and tensor.layout is torch.strided
    return plain and not (tensor.is_quantized or tensor.is_meta or tensor.is_nested)


def tensors_of(state_dict: State) -> Iterator[torch.Tensor]:
    """The tensors of a state that consist of nothing but their values; these go to the arena."""
    return (tensor for _, tensor in _named_tensors(state_dict, ""))


def _sources(state_dict: State) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a state that go to the arena, all of which have memory.

    Raises PlanError for tensors without memory, and, in the words of a save, for tensors that
    cannot be copied at all.
    """
    problems: list[str] = []
    tensors = _named_tensors(state_dict, "", problems)
    found = [(name, require_memory(name, tensor)) for name, tensor in tensors]
    require_savable(problems)
    return found


def _named_tensors(
    value: Any, name: str, problems: list[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a state that go to the arena, in the order of `_copy_value`.

    problems: receives a save's messages about tensors without values to copy.
    """
    if isinstance(value, DTensor):
        yield from _named_tensors(local_tensor(value), name, problems)
    elif isinstance(value, ShardedTensor):
        for shard in value.local_shards():
            yield from _named_tensors(shard.tensor, name, problems)
    elif isinstance(value, torch.Tensor):
        if _fits(value):
            yield name, value
        elif problems is not None and (value.is_nested or value.is_meta):
            problems.append(f"{find_save_problem(name, value)}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _named_tensors(inner, f"{name}.{key}" if name else str(key), problems)
    elif isinstance(value, list | tuple):
        for n, inner in enumerate(value):
            yield from _named_tensors(inner, f"{name}.{n}", problems)


def _copy_value(value: Any, rooms: Iterator[torch.Tensor]) -> Any:
    """The value with the next of the rooms for each tensor, and copies of everything else."""
    if isinstance(value, DTensor):
        memory = local_tensor(value)
        local = _copy_value(memory, rooms)
        if hasattr(memory, HOOK) and (hooks := hooks_of(memory)):
            local = with_hooks(local, hooks)
        return dtensor(local, value._spec)
    if isinstance(value, ShardedTensor):
        shards = [move_shard(s, _copy_value(s.tensor, rooms)) for s in value.local_shards()]
        return make_detached_sharded_tensor(shards, value.metadata(), value.sharding_spec())
    if isinstance(value, torch.Tensor):
        copied = next(rooms) if _fits(value) else _copy_with_attributes(value)
        return declare_parts(copied, declarations_of(value)) if hasattr(value, BOXES) else copied
    if isinstance(value, PerRank):
        return PerRank(_copy_value(value.value, rooms))
    if isinstance(value, Mapping):
        return alike(value, {key: _copy_value(inner, rooms) for key, inner in value.items()})
    if isinstance(value, list | tuple):
        parts = [_copy_value(inner, rooms) for inner in value]
        if isinstance(value, list):
            return parts
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return copy.deepcopy(value)


def _copy_with_attributes(value: Any) -> torch.Tensor:
    """A copy on the CPU of a tensor that has more than its values.

    A wrapper subclass is rebuilt around copies: its own `to` may do anything.
    """
    if not is_opaque(value) or value.is_quantized:
        copied: torch.Tensor = value.detach().to("cpu", copy=True)
        return copied
    return map_inner_tensors(value, _copy_with_attributes)


def move_shard(shard: Shard, tensor: torch.Tensor) -> Shard:
    """The same part of a sharded tensor, held by another tensor, which may be on any device."""
    metadata = shard.metadata
    # A Shard checks that its tensor is on the device of its placement.
    anywhere = ShardMetadata(metadata.shard_offsets, metadata.shard_sizes, placement=None)
    return Shard(tensor, anywhere)


def dtensor(local: torch.Tensor, spec: Any) -> DTensor:
    """A DTensor of this part, on any device: `from_local` would move it to the mesh's device."""
    return DTensor(local, spec, requires_grad=False)  # type: ignore[no-untyped-call]  # torch's own


PLAIN_VALUES = (torch.Tensor, str, bytes, int, float, complex, bool, type(None))


def _check_types(value: Any, name: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_types(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple | set):
        for n, inner in enumerate(value):
            _check_types(inner, f"{name}.{n}")
    elif not isinstance(value, PLAIN_VALUES):
        raise ValueError(  # noqa: TRY004 - torch's stager raises the same
            f"{name.lstrip('.')!r} is a {type(value).__name__}: with type_check=True a state dict "
            "holds tensors and values of Python's plain types only"
        )
