"""The load planner without a template: it builds the state dict from the checkpoint alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pytest_dcp._engine.plan.containers import Description, description_of
from pytest_dcp._engine.plan.index import Index
from pytest_dcp._engine.plan.nested import Path, Room
from pytest_dcp._engine.plan.rank_paths import check_one_tree
from pytest_dcp._engine.planners.load_planner import DefaultLoadPlanner
from pytest_dcp.errors import CheckpointCorruptError


class _EmptyStateDictLoadPlanner(DefaultLoadPlanner):
    """Loads without a template: builds the state dict from the checkpoint.

    keys: load only these, each a flat name or the name of a container; None: everything.
    Every rank that uses it holds the whole state dict.
    """

    def __init__(self, keys: Iterable[str] | None = None, *args: Any, **kwargs: Any) -> None:
        self.keys = keys
        self._filled: dict[str, Any] = {}
        self._description: Description | None = None
        super().__init__(*args, **kwargs)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Fill the state dict, which must be empty, with empty tensors to load into."""
        if state_dict:
            raise ValueError(
                f"the state dict must be empty, it is built here: it has {sorted(state_dict)[:5]}"
            )
        if metadata is None:
            raise ValueError("the planner was set up without metadata: it has nothing to load from")
        self._filled = state_dict
        self._description = None
        paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
        room = Room(len(metadata.state_dict_metadata))
        flat: dict[str, Any] = {}
        places: dict[str, Path] = {}
        for fqn, stored in metadata.state_dict_metadata.items():
            path = room.check_path(fqn, paths.get(fqn, (fqn,)))
            if self._should_include_key(fqn, metadata):
                places[fqn] = path
                if isinstance(stored, TensorStorageMetadata):
                    flat[fqn] = self.empty_tensor(fqn, stored)
                else:
                    flat[fqn] = None
        check_one_tree(places)
        for fqn, path in places.items():
            room.put(state_dict, fqn, path, flat[fqn])
        super().set_up_planner(state_dict, metadata, is_coordinator)
        # Otherwise the built state would be flattened if a list no longer holds a tensor.
        self.state_dict, self.mappings = flat, places
        described = description_of(metadata.planner_data)
        if described is not None:
            self._description = Description(described)
            if self.weights_only:
                # Values that cannot be returned are refused before anything is read.
                self.rebuilt()

    def empty_tensor(self, fqn: str, stored: TensorStorageMetadata) -> torch.Tensor:
        """Memory for a stored tensor. Raises CheckpointCorruptError if there is not enough."""
        try:
            return torch.empty(stored.size, dtype=stored.properties.dtype)
        except (RuntimeError, MemoryError) as error:
            raise CheckpointCorruptError(
                f"there is no memory for a tensor of {tuple(stored.size)} of "
                f"{stored.properties.dtype}",
                entry=fqn,
            ) from error

    def rebuilt(self) -> dict[Any, Any]:
        """The loaded state dict, with the saved containers and keys.

        Raises CheckpointMismatchError, naming them, for containers and keys of other classes than
        Python's own, unless the planner trusts the checkpoint.
        """
        if self._description is None:
            return self._filled
        return self._description.rebuilt(
            self._filled,
            lambda path: self._includes(".".join(map(str, path)), path),
            trusted=not self.weights_only,
        )

    @property
    def repeatable(self) -> bool:
        """Always: a new try discards the state dict built so far."""
        return True

    @property
    def plans_again(self) -> bool:
        """Whether a load that has read nothing yet may be planned again: not with a subclass."""
        return type(self) is _EmptyStateDictLoadPlanner

    def begin_again(self) -> None:
        """Empty the state dict, to be built anew."""
        self._filled.clear()

    def _read_as_torch_2_3(self, index: Index) -> None:
        """Nothing: the paths are the checkpoint's own."""

    def _should_include_key(self, key: str, metadata: Metadata) -> bool:
        """Whether to load a flat name: for subclasses to extend."""
        paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
        return self._includes(key, tuple(paths.get(key, (key,))))

    def _includes(self, name: str, path: Path) -> bool:
        """Whether the caller asked for this name and path, or for a container of it."""
        if self.keys is None or name in self.keys:
            return True
        above = (".".join(map(str, path[:depth])) for depth in range(1, len(path)))
        return any(name in self.keys for name in above)
