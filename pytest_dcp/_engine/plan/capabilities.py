"""Optional extras of planners beyond torch's hooks. Pure (no I/O).

For authors of planners and storages. torch's classes (`SavePlanner`, `LoadPlanner`,
`StorageWriter`, `StorageReader`, `FileSystemBase`) are the contract, and an object that has their
methods is enough: nothing here is required. Each class below is a **capability**: one or more
attributes that the engine looks for and uses. Our classes have them; yours gets them by defining
attributes of these names, or by subclassing ours without overriding any of the hooks that a
capability bypasses. For an object without a capability the engine goes through torch's hooks, which
is slower or refuses more, but is never wrong.

Without a capability of a save planner:

- `GivesData`: `resolve_data` is called for each item;
- `ComparesReplicas`: copies of the same data on several ranks are not compared;

of a load planner:

- `GivesTargets`: `resolve_tensor` and `commit_tensor` are called for each item;
- `PreparesValues`: `load_bytes` is called for each value, without a check before;
- `TakesNumbers`: a stored tensor does not load into a Python number;
- `HoldsWrappers`: a plain tensor for a wrapper of other tensors is refused in other words;
- `PlansAlone`: the plans of all ranks are gathered for `create_global_plan`;
- `Repeats`: a load fails if another save replaces the checkpoint meanwhile;
- `ReportsKeys`: `load` returns a report without keys;

of a planner or a storage:

- `ChoosesPickles`: its objects travel in pickles between ranks if its class is neither ours nor
  torch's.

`storage_capabilities` has those of storages, stagers and file systems.

The functions check for capabilities. They look attributes up on the object, so a wrapper that
forwards attributes by `__getattr__` has the capabilities of the object that it wraps. A load
planner is asked by `planners.load_capabilities`, once: the answers are `LoadPlannerCapabilities`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, WriteItem
from typing_extensions import TypeIs

from pytest_dcp._engine.plan.columns import ReadItems, WriteItems
from pytest_dcp._engine.plan.match_keys import LoadReport
from pytest_dcp._engine.plan.replica_comparison import ReplicaCheck, Replicas

# Of save planners.


class GivesData(Protocol):
    """A save planner that gives the data of many items at a time. Used by our writers."""

    def source(self, items: Sequence[WriteItem]) -> Callable[[int], torch.Tensor | bytes]:
        """A function that gives the data of the n-th item: a tensor of its size, or a value's
        bytes.

        Called once, in `write_data`; the returned function is called once for each item, in any
        order and from several threads. It must give the same data as `resolve_data`.
        """


def gives_data(planner: object) -> TypeIs[GivesData]:
    """Whether a save planner is a `GivesData`."""
    return hasattr(planner, "source")


class ComparesReplicas(Protocol):
    """A save planner whose local plan has rows for the state's own data, so that copies of it on
    several ranks can be compared. Used by `save`.

    Looked up on the class: a wrapper that forwards attributes may save other data.
    """

    replica_check: ReplicaCheck
    """Which copies to compare."""
    replicas: Replicas | None
    """On the coordinator, once plans are joined: which rows are copies of each other."""
    planned: Sequence[Sequence[WriteItem]]
    """On the coordinator: the local plans' items that `replicas` was made from."""
    offered: WriteItems
    """The items of this rank's local plan, also where it sent a shorter plan."""

    def lookup(self, items: WriteItems) -> Callable[[int], Any] | None:
        """A function that gives the state's data of the n-th row: a box's memory, or a value.

        None if the planner computes its data.
        """


def compares_replicas(planner: object) -> TypeIs[ComparesReplicas]:
    """Whether a save planner's class is a `ComparesReplicas`."""
    return hasattr(type(planner), "replica_check") and hasattr(type(planner), "lookup")


# Of load planners.


class GivesTargets(Protocol):
    """A load planner that gives the targets of many items at a time. Used by our readers."""

    def targets(self, items: ReadItems) -> Callable[[int], torch.Tensor] | None:
        """A function that gives the memory of the n-th item's whole wanted box, to be filled in
        place.

        The engine narrows it to the part that the item fills, and does not commit it. None if
        `resolve_tensor` and `commit_tensor` must be called.
        """


class PreparesValues(Protocol):
    """A load planner that checks a value before it takes it. Used by our readers.

    So a value that does not fit is refused before any target changes. `takes_values` is asked once,
    at the start of a load.
    """

    takes_values: bool
    """Whether `prepare_value` may be called instead of `load_bytes`."""

    def prepare_value(self, fqn: str, entry: bytes | memoryview) -> Callable[[], None]:
        """Check the stored bytes of a value; the returned function then takes it, and cannot fail.

        Raises CheckpointMismatchError or CheckpointCorruptError.
        """


class TakesNumbers(Protocol):
    """A load planner that loads stored tensors into Python numbers. Used by `load` and readers."""

    takes_numbers: Container[str]
    """Names of numbers that are loaded from tensors. Their `resolve_tensor` gives the planner's own
    memory, and `commit_tensor` takes the number out of it."""

    def check_read_number(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Raise CheckpointMismatchError if a number that was read does not fit.

        Called before any target is filled.
        """


class HoldsWrappers(Protocol):
    """A load planner some of whose targets are wrappers of other tensors. Used by `load` and
    readers.
    """

    wrapper_targets: Container[str]
    """Names of these, and of DTensors of them; `lookup_tensor` gives the wrapper itself."""

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The rank's own memory of a wanted box, or the wrapper that stands for it."""


class PlansAlone(Protocol):
    """A load planner whose `create_global_plan` changes nothing. Used by `load`, on every rank.

    Then plans are not sent. Asked once, at the start of a load; the value must be the same on all
    ranks.
    """

    plans_alone: bool


class Repeats(Protocol):
    """A load planner that can be used again if the checkpoint is replaced meanwhile.

    Used by `load`, on every rank: asked once, at the start; the values must be the same on all
    ranks. Between two tries `load` calls `begin_again`, then `set_up_planner` as for a new load.
    """

    plans_again: bool
    """Before anything was read: whether planning may begin again."""
    repeatable: bool
    """After targets were filled in part: whether a further try overwrites all of that."""

    def begin_again(self) -> None:
        """Prepare for another try with the same state dict."""


class ReportsKeys(Protocol):
    """A load planner that reports which keys matched. Used by `load`, after planning and at its
    end."""

    report: LoadReport
    """The keys that this rank has seen."""
    idle_renames: Mapping[str, str]
    """Prefixes that rename no key of this rank, each with a message. A prefix that is idle on all
    ranks is an error."""


@dataclass(frozen=True, slots=True)
class LoadPlannerCapabilities:
    """The capabilities of one load planner, as they were at the start of a load. Used by `load`,
    which hands them to all stages.
    """

    plans_alone: bool
    """Whether no rank's plan depends on another's: a `PlansAlone`."""
    prepares_values: bool
    """Whether `prepare_value` may be called instead of `load_bytes`: a `PreparesValues`."""
    plans_again: bool
    """Whether planning may begin again before anything was read: a `Repeats`."""
    repeatable: bool
    """Whether the load may begin again after targets were filled in part: a `Repeats`."""

    def may_repeat(self, *, has_read: bool) -> bool:
        """Whether a further try is allowed. has_read: whether targets may have been filled."""
        return self.repeatable if has_read else self.plans_again


# Of planners and storages alike.


class ChoosesPickles(Protocol):
    """A planner or storage that says whether its objects may be pickled between ranks.

    Checked once for each save or load. Without a choice, objects of classes that are neither ours
    nor torch's may be pickled, since their plans and results hold classes that only pickles can
    carry.
    """

    pickles_between_ranks: bool


def pickle_choice_of(owner: object) -> bool | None:
    """The choice of a `ChoosesPickles`; None for any other object."""
    choice: bool | None = getattr(owner, "pickles_between_ranks", None)
    return choice
