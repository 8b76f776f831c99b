"""Optional extras of storages, stagers and file systems beyond torch's hooks. Pure (no I/O).

For authors of storages: see `capabilities`, which explains what a capability is. Subclass ours to
have them, or define attributes of these names.

Without a capability of a storage writer:

- `CleansUp`: the files of a failed save stay where they are;
- `NamesSaves`: parts that ranks save on their own can be of different saves unnoticed;
- `StagesAtWill`: `async_save` copies the state by the writer's `stage` if it is a stager;

of a storage reader:

- `KeepsFiles`: a load fails if a save removes its files meanwhile;
- `PreparesData`: values that do not fit are noticed while targets are being filled;
- `SharesReads`: each rank reads all that it wants itself, and `read="shared"` is refused;
- `VerifiesBytes`: `verify=` has no effect, and the report counts no bytes (`CountedBytes`);
- `IgnoresPlans`: the plans of all ranks are gathered for `prepare_global_plan`;
- `MayHoldWrappers`: wrappers of other tensors that do not fit are noticed while targets are filled;
- `KnowsSaves`: saves can be distinguished only if there is metadata for all ranks;

of both:

- `KnowsPlace`: messages name the object, and the folders of ranks are not compared;
- `SharesFolder`: a rank that names another folder than the others is not refused at once;

of a stager:

- `HoldsCopy`: it may use its memory again while a save still reads it;

of a file system:

- `HasDisk`: the engine goes through its streams.

Most are looked up on the class, not on the object. They go past torch's hooks, and a wrapper that
forwards attributes by `__getattr__` may have replaced just those:

    >>> class Cleans:
    ...     def remove_leftovers(self): ...
    ...     def discard(self): ...
    >>> class Wrapper:
    ...     def __init__(self, inner):
    ...         self.inner = inner
    ...     def __getattr__(self, name):
    ...         return getattr(self.inner, name)
    >>> cleans_up(Cleans()), cleans_up(Wrapper(Cleans()))
    (True, False)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from typing_extensions import TypeIs

from pytest_dcp._engine.plan.boxes import Ints
from pytest_dcp._engine.plan.capabilities import LoadPlannerCapabilities
from pytest_dcp._engine.plan.shared_reads import ReadShare, Wants

# Of storage writers.


class CleansUp(Protocol):
    """A writer that removes files of saves that did not end. Used by `save`."""

    def remove_leftovers(self) -> None:
        """Remove files of dead saves, so that a full disk has room for this one.

        Called on the coordinator, before anything is written.
        """

    def discard(self) -> None:
        """Remove this rank's files of a save that failed, unless it was committed after all.

        An OSError or CheckpointError from here is logged: the save's own error is raised.
        """


def cleans_up(writer: object) -> TypeIs[CleansUp]:
    """Whether a writer's class is a `CleansUp`."""
    return _class_has(writer, "remove_leftovers", "discard")


class NamesSaves(Protocol):
    """A writer whose saves have ids. Used by `save` where ranks save on their own, and by
    `async_save` in a process.

    All ranks' parts of a save get the same id, so that a load can tell parts of different saves
    apart.
    """

    def new_save_id(self) -> str:
        """Give the next save a new id; returns it. Called on one rank."""

    def set_save_id(self, save_id: str) -> None:
        """Give the next save this id. Called on every rank."""

    def remove_collective_metadata(self) -> None:
        """Remove an earlier checkpoint of all ranks, which a load would find first.

        Called on one rank, after every rank has committed its own part.
        """


def names_saves(writer: object) -> TypeIs[NamesSaves]:
    """Whether a writer's class is a `NamesSaves`."""
    return _class_has(writer, "new_save_id", "set_save_id", "remove_collective_metadata")


class StagesAtWill(Protocol):
    """A writer that is a stager, and does not need to be used as one. Used by `async_save`."""

    def must_stage(self) -> bool:
        """Whether the state must be copied by `stage`: a subclass or an option asks for it."""

    def skip_stage(self) -> None:
        """Prepare to write a state that was copied without `stage`: it is all in CPU memory."""


def stages_at_will(writer: object) -> TypeIs[StagesAtWill]:
    """Whether a writer's class is a `StagesAtWill`."""
    return _class_has(writer, "must_stage", "skip_stage")


# Of storage readers.


class KeepsFiles(Protocol):
    """A reader of files that can stay open, so that a save may remove them. Used by `load`.

    Its `read_metadata` raises FileNotFoundError if there is no metadata, and only then.
    """

    def leased(self, rank: int) -> AbstractContextManager[None]:
        """Hold off the next save's commit for some seconds, if the storage can do that."""

    def keep_files(self) -> None:
        """Keep files that are opened from now on open until `close_files`."""

    def open_files(self, plan: LoadPlan) -> bool:
        """Open the files of the plan; returns whether all are open now.

        Raises CheckpointReplacedError if another save has removed one already.
        """

    def close_files(self) -> None:
        """Close files kept open."""


def keeps_files(reader: object) -> TypeIs[KeepsFiles]:
    """Whether a reader's class is a `KeepsFiles`."""
    return _class_has(reader, "leased", "keep_files", "open_files", "close_files")


class PreparesData(Protocol):
    """A reader that judges values before any target changes. Used by `load`."""

    def prepares(self) -> bool:
        """Whether `read_data` continues from `prepare_data`."""

    def prepare_data(
        self, plan: LoadPlan, planner: LoadPlanner, capabilities: LoadPlannerCapabilities
    ) -> None:
        """Read the values that may not fit their target, and change nothing.

        Called before each `read_data`. capabilities: of the planner, as the load began.

        Raises CheckpointMismatchError, naming every key, for values that do not fit.
        """


def prepares_data(reader: object) -> TypeIs[PreparesData]:
    """Whether a reader's class is a `PreparesData`."""
    return _class_has(reader, "prepares", "prepare_data")


class SharesReads(Protocol):
    """A reader that reads ranges of bytes for other ranks. Used by `load`, for `read`.

    `may_share_reads` is asked once, when the load begins. Then, where ranks share reads, after
    planning: `unlocated_entries` on each rank, and if there are any, `locate_entries` for a part of
    them; `offer_reads`; `share_reads` with what the coordinator makes of the offers; and
    `prepare_data` and `read_data` as always.
    """

    is_far: bool
    """Whether reading goes over a network: `read="auto"` shares then."""

    def may_share_reads(self) -> bool:
        """Whether it can: a subclass may read in its own way."""

    def unlocated_entries(self, plan: LoadPlan) -> Ints:
        """The entries of a plan that must be parsed before it is known where their data is."""

    def locate_entries(self, entries: Ints) -> Any:
        """Find the data of some entries for all ranks. The result can be sent (`coordinate.wire`);
        each rank's goes into `offer_reads`."""

    def offer_reads(
        self,
        plan: LoadPlan,
        planner: LoadPlanner,
        capabilities: LoadPlannerCapabilities,
        located: Sequence[Any],
        *,
        insist: bool,
    ) -> Wants:
        """The ranges that a plan reads and other ranks may want, too; none is read yet.

        insist: whether the caller of `load` asked for it, so that more memory may be used.
        """

    def share_reads(self, rank: int, share: ReadShare, channel: Any) -> None:
        """Read the offered plan together with other ranks. channel: an `io.shared_reading`
        `ByteChannel`."""


def shares_reads(reader: object) -> TypeIs[SharesReads]:
    """Whether a reader's class is a `SharesReads`."""
    hooks = ("unlocated_entries", "locate_entries", "offer_reads", "share_reads")
    return _class_has(reader, "is_far", "may_share_reads", *hooks)


class CountedBytes(Protocol):
    """What one load has read; part of `VerifiesBytes`. Used by `load`, for its report."""

    @property
    def bytes_needed(self) -> int:
        """Bytes of the planned items."""

    @property
    def bytes_read(self) -> int:
        """Bytes that were read for them."""

    @property
    def bytes_verified(self) -> int:
        """Bytes whose checksum was compared."""


class VerifiesBytes(Protocol):
    """A reader that compares checksums, and counts. Used by `load`."""

    verify: Literal["auto", "full", "off"]
    """How much to compare. `load(verify=...)` sets it, and then restores it."""

    @property
    def filled(self) -> CountedBytes:
        """Counts of the last `read_data`."""


def verifies_bytes(reader: object) -> TypeIs[VerifiesBytes]:
    """Whether a reader's class is a `VerifiesBytes`."""
    return _class_has(reader, "verify", "filled")


class IgnoresPlans(Protocol):
    """A reader whose `prepare_global_plan` changes nothing. Used by `load`, on every rank.

    Then plans are not sent, unless the planner wants them. The value must be the same on all ranks.
    """

    @property
    def ignores_plans(self) -> bool:
        """Whether that is so: a subclass may have a `prepare_global_plan` of its own."""


def ignores_plans(reader: object) -> bool:
    """Whether a reader's class is an `IgnoresPlans` that says so."""
    return _class_has(reader, "ignores_plans") and bool(getattr(reader, "ignores_plans", False))


class MayHoldWrappers(Protocol):
    """A reader whose checkpoint has entries that must be parsed. Used by `load`."""

    may_hold_wrappers: bool
    """Whether some entries may be wrappers of other tensors, as the manifest shows."""


def may_hold_wrappers(reader: object) -> bool:
    """Whether a reader says so of its checkpoint. Looked up on the object."""
    return bool(getattr(reader, "may_hold_wrappers", False))


class KnowsSaves(Protocol):
    """A reader that can tell one save from another. Used by `load`, after `read_metadata`."""

    has_manifest: bool
    """Whether all ranks' parts of the checkpoint carry the id of one save, so that ranks which
    found different saves are refused."""


def knows_saves(reader: object) -> bool:
    """Whether a reader says so of itself. Looked up on the object."""
    return bool(getattr(reader, "has_manifest", False))


# Of both.


class KnowsPlace(Protocol):
    """A storage that says where its checkpoint is. Used by `save` and `load`.

    Ranks that name different places are refused, and messages name the place.
    """

    checkpoint_id: str | os.PathLike[str]


def place_of(storage: object) -> str | os.PathLike[str] | None:
    """The place of a `KnowsPlace`; None for any other storage. Looked up on the object."""
    place: str | os.PathLike[str] | None = getattr(storage, "checkpoint_id", None)
    return place


class SharesFolder(KnowsPlace, Protocol):
    """A storage whose place is one folder for all ranks. Used by `save` and `load`.

    Ranks that name different folders are refused before anything is planned. Other storages may put
    each rank's files anywhere.
    """

    shares_folder: bool


def shares_folder(storage: object) -> bool:
    """Whether a storage's class is a `SharesFolder`."""
    return bool(getattr(type(storage), "shares_folder", False))


# Of stagers.


class HoldsCopy(Protocol):
    """A stager that keeps its memory for the next copy. Used by `async_save`."""

    def hold_for(self, upload: Future[Any]) -> None:
        """Leave the last copy as it is until the save that reads it has ended."""


def holds_copy(stager: object) -> TypeIs[HoldsCopy]:
    """Whether a stager's class is a `HoldsCopy`."""
    return _class_has(stager, "hold_for")


# Of file systems.


class HasDisk(Protocol):
    """A file system that has a better way than its streams. Used by our storages."""

    disk: Any
    """A `Disk` (see `io.disk`): files by ranges, atomic publishing, syncs."""


def has_disk(filesystem: object) -> TypeIs[HasDisk]:
    """Whether a file system's class is a `HasDisk`."""
    return _class_has(filesystem, "disk")


def _class_has(owner: object, *names: str) -> bool:
    return all(hasattr(type(owner), name) for name in names)
