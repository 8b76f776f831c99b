"""Reads the pickle of a stored Python value: plain and inert values, and tensors within them.

Enters: the bytes of an entry's `data.pkl`, and a function that gives the bytes of its storages.
Leaves: the value, or `UnknownGlobalError` naming a class that is not loaded by default. All memory
is charged to one budget, in proportion to the entry: containers and work by the machine's rules,
arrays and storages by the bytes that are really there.

Classes that the user has allowed with `torch.serialization.add_safe_globals` are made as
`torch.load` makes them: the user is responsible for the effects of creating them and setting their
state.
"""

from __future__ import annotations

from argparse import Namespace
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pytest_dcp._engine.plan.shards import PLAIN as PLAIN_TENSORS
from pytest_dcp._engine.unpickle.inert_classes import BUILD, KEYS, inert_globals
from pytest_dcp._engine.unpickle.interpreter import run
from pytest_dcp._engine.unpickle.machine import (
    Callee,
    PickleMachine,
    UnknownGlobalError,
    Vocabulary,
    brief,
)
from pytest_dcp._engine.unpickle.plain_values import MAX_LOGICAL_ITEMS, PLAIN, check_plain
from pytest_dcp._engine.unpickle.tensor_pickles import (
    STORAGE_DTYPES,
    StorageClass,
    TensorPickle,
    describe_tensor,
)
from pytest_dcp._engine.unpickle.unread_fields import UnreadObject, may_stay_unread
from pytest_dcp._torch_internals.tensors import set_negative_bit
from pytest_dcp.errors import CheckpointCorruptError

LARGE_PICKLE_BYTES = 8 << 20
"""Pickles of at least this size are read in place, not copied: such large values are mostly one
array. Reading many small objects from a view takes half as long again."""
StorageBytes = Callable[[str], bytes | memoryview]
"""The bytes of a storage, by its key in the entry."""
MakeStorage = Callable[[str], torch.UntypedStorage]
"""A storage by its key in the entry; called once for each."""
_Args = tuple[Any, ...]


def storages_in_memory(read: StorageBytes, *, share: bool) -> MakeStorage:
    """Makes storages of their bytes.

    share: whether they use the memory that `read` gives, which must be writable; otherwise it is
        copied.
    """

    def make(key: str) -> torch.UntypedStorage:
        stored = read(key)
        raw = stored if share else bytearray(stored)
        tensor = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0).byte()
        return tensor.untyped_storage()

    return make


def read_stored_value(data: bytes | memoryview, make_storage: MakeStorage) -> Any:
    """The value that the `data.pkl` of an entry describes.

    make_storage: gives the storages; their elements are not used, except those of sparse tensors,
        whose indices are checked unless the storage is without memory (device "meta").

    Raises:
        UnknownGlobalError: it holds a class that is neither inert nor allowed by the user.
        CheckpointCorruptError: the pickle is malformed or made to exhaust its reader, or a tensor
            reaches beyond its storage.
    """
    allowed_globals, build, others = _vocabulary(tuple(torch.serialization.get_safe_globals()))
    persistent = _Storages(make_storage).find
    known_here = Vocabulary(allowed_globals, build, KEYS, persistent, nested_keys=True)
    value = run(data, known_here, copy=len(data) < LARGE_PICKLE_BYTES)
    check_plain(value, "the value", others, max(MAX_LOGICAL_ITEMS, len(data)))
    return value


def read_inert_values(data: bytes | memoryview, storages: StorageBytes) -> Any:
    """As `read_stored_value`, for values that are looked at: classes that the user has allowed are
    not made either, and each object of an unknown class becomes an `UnreadObject`, by its name.

    An `argparse.Namespace` is read. Raises as `read_stored_value`; functions and classes of
    Python's library, torch and numpy that no plain value needs are still refused.
    """
    known_here, build, others = _vocabulary(())
    namespace = Callee("argparse.Namespace", new=Namespace)
    vocabulary = Vocabulary(
        {**known_here, ("argparse", "Namespace"): namespace},
        {**build, Namespace: build[SimpleNamespace]},
        KEYS,
        _Storages(storages_in_memory(storages, share=False)).find,
        nested_keys=True,
        keeps_unread=_may_be_named,
    )
    value = run(data, vocabulary)
    limit = max(MAX_LOGICAL_ITEMS, len(data))
    check_plain(value, "the value", others | {UnreadObject}, limit, frozenset({Namespace}))
    return value


def _may_be_named(module: str, name: str) -> bool:
    # Arguments of Megatron may have a signal to end at.
    return may_stay_unread(module, name) or (module, name) == ("signal", "Signals")


@lru_cache(maxsize=8)
def _vocabulary(
    allowed: tuple[Any, ...],
) -> tuple[dict[tuple[str, str], object], dict[type, Any], frozenset[type]]:
    """The globals, the setters of state, and the additional classes of values.

    allowed: classes and functions, or pairs of one and its full name, as torch keeps them.
    """
    allowed_globals = dict(PLAIN.globals) | dict(inert_globals()) | dict(_tensors())
    made_of = set()
    for one in allowed:
        allowed_object, name = one if isinstance(one, tuple) else (one, None)
        module, _, inside = str(name).rpartition(".")
        key = (
            (allowed_object.__module__, allowed_object.__qualname__)
            if name is None
            else (module, inside)
        )
        allowed_globals[key] = _callee(allowed_object)
        if isinstance(allowed_object, type):
            made_of.add(allowed_object)
    return allowed_globals, BUILD | dict.fromkeys(made_of, _build_allowed), _OTHERS | made_of


_OTHERS = frozenset(
    {
        *(KEYS | BUILD.keys() | set(PLAIN_TENSORS)) - {OrderedDict, SimpleNamespace},
        *(np.dtype(code).type for code in "?bhilqBHILQefdgFDGSUMm"),
        *(array, type(...), type(NotImplemented), torch.qscheme, torch.memory_format),
    }
)
"""Values that hold no others."""


# ---- tensors


class _Storages:
    """The storages of one entry, each read once, so that tensors that shared a storage share it
    again."""

    def __init__(self, make: MakeStorage) -> None:
        self._make = make
        self._storage_by_key: dict[str, torch.UntypedStorage] = {}

    def find(self, saved_id: object) -> _Stored:
        """Decodes a persistent id: ('storage', class, key, location, elements)."""
        if type(saved_id) is not tuple or len(saved_id) != 5 or saved_id[0] != "storage":
            raise UnknownGlobalError(f"expected a reference to a storage, got {brief(saved_id)}")
        _, kind, key, _, numel = saved_id
        if type(kind) is not StorageClass or type(key) is not str:
            raise UnknownGlobalError(f"expected a storage of plain elements, got {brief(kind)}")
        if type(numel) is not int or numel < 0:
            raise CheckpointCorruptError(f"expected a storage's elements, got {brief(numel)}")
        return _Stored(self, kind.dtype, key, numel * kind.dtype.itemsize)

    def bytes_of(self, key: str, nbytes: int) -> torch.UntypedStorage:
        found = self._storage_by_key.get(key)
        if found is None:
            found = self._storage_by_key[key] = self._make(key)
        if found.nbytes() != nbytes:
            raise CheckpointCorruptError(
                f"expected a storage of {nbytes} bytes, got one of {found.nbytes()}"
            )
        return found

    def tensor(self, description: TensorPickle) -> torch.Tensor:
        """The described tensor, over its storage."""
        memory = self.bytes_of(description.storage_key, description.storage_nbytes)
        tensor = torch.empty(0, dtype=description.dtype, device=memory.device)
        tensor.set_(memory, description.storage_offset, description.shape, description.stride)
        return tensor.requires_grad_(description.requires_grad)


class _Stored:
    """A storage that a pickle refers to."""

    __slots__ = ("dtype", "key", "loader", "nbytes")

    def __init__(self, loader: _Storages, dtype: torch.dtype, key: str, nbytes: int) -> None:
        self.loader, self.dtype, self.key, self.nbytes = loader, dtype, key, nbytes


def _tensors() -> dict[tuple[str, str], object]:
    calls: dict[str, Callable[[PickleMachine, _Args], object]] = {
        "_rebuild_tensor_v2": partial(_rebuild, 5),
        "_rebuild_tensor_v3": partial(_rebuild, 6),
        "_rebuild_parameter": _parameter,
        "_rebuild_sparse_tensor": _sparse,
    }
    return {
        ("torch._utils", name): Callee(f"torch._utils.{name}", call) for name, call in calls.items()
    } | dict(_storage_classes())


def _storage_classes() -> Iterator[tuple[tuple[str, str], object]]:
    for name, dtype in STORAGE_DTYPES.items():
        for module in ("torch", "torch.storage"):
            yield (module, name), StorageClass(dtype)


def _rebuild(facts: int, machine: PickleMachine, args: _Args) -> torch.Tensor:
    """_rebuild_tensor_v2 and _v3: storage, offset, shape, stride, requires_grad, hooks, dtype."""
    hooks_at = 5
    if not facts < len(args) <= facts + 2 or type(args[0]) is not _Stored:
        raise UnknownGlobalError(f"expected a tensor over a storage, got {len(args)} facts of one")
    dtype = args[6] if facts > hooks_at else args[0].dtype
    if type(dtype) is not torch.dtype:
        raise CheckpointCorruptError(f"expected a tensor's dtype, got {brief(dtype)}")
    if type(args[hooks_at]) is not OrderedDict or args[hooks_at]:
        raise UnknownGlobalError("expected a tensor without hooks, got one with them")
    machine.charge(_TENSOR_COST)
    stored = args[0]
    tensor = stored.loader.tensor(describe_tensor(dtype, stored.key, stored.nbytes, args[1:5]))
    bits = args[facts + 1] if len(args) == facts + 2 else {}
    return _with_bits(tensor, bits)


_TENSOR_COST = 128
"""A tensor takes about 600 bytes, and its pickle some 100."""


def _with_bits(tensor: torch.Tensor, bits: object) -> torch.Tensor:
    """The tensor with the lazy bits that its metadata sets."""
    if bits is None or bits == {}:
        return tensor
    if type(bits) is not dict or not bits.keys() <= {"conj", "neg"}:
        raise UnknownGlobalError("expected a tensor with a conjugate or negative bit at most")
    if bits.get("conj") and tensor.is_complex():
        tensor = tensor.conj()
    return set_negative_bit(tensor) if bits.get("neg") else tensor


def _parameter(_: PickleMachine, args: _Args) -> torch.nn.Parameter:
    if len(args) != 3 or type(args[0]) is not torch.Tensor or type(args[1]) is not bool:
        raise UnknownGlobalError("expected a parameter over a tensor, got one over something else")
    return torch.nn.Parameter(args[0].detach(), requires_grad=args[1])


def _sparse(_: PickleMachine, args: _Args) -> torch.Tensor:
    """_rebuild_sparse_tensor(layout, (indices, values, size, is_coalesced))."""
    parts = args[1] if len(args) == 2 and args[0] is torch.sparse_coo else ()
    if type(parts) is not tuple or not 3 <= len(parts) <= 4 or type(parts[2]) is not torch.Size:
        raise UnknownGlobalError("expected a sparse tensor in coordinates, got another layout")
    coalesced = parts[3] if len(parts) == 4 else None
    try:
        return torch.sparse_coo_tensor(
            parts[0],
            parts[1],
            parts[2],
            check_invariants=not getattr(parts[0], "is_meta", False),
            is_coalesced=coalesced,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointCorruptError(
            f"expected a sparse tensor's indices and values, got {error!s:.200}"
        ) from None


# ---- classes that the user has allowed


def _callee(allowed_object: Any) -> Callee:
    def call(_: PickleMachine, args: _Args) -> Any:
        return allowed_object(*args)

    def new(_: PickleMachine, args: _Args) -> Any:
        return allowed_object.__new__(allowed_object, *args)

    return Callee(getattr(allowed_object, "__qualname__", repr(allowed_object)), call, None, new)


def _build_allowed(target: Any, state: Any) -> None:
    """As `pickle` gives an object its state."""
    if hasattr(target, "__setstate__"):
        target.__setstate__(state)
        return
    slots: Any = None
    if type(state) is tuple and len(state) == 2:
        state, slots = state
    if state:
        target.__dict__.update(state)
    for name, value in (slots or {}).items():
        setattr(target, name, value)
