"""The verbs `load`, `load_state_dict` and `load_without_template`: arguments -> one load.

Each makes the team and the request, and hands both to `load_steps`, which describes a load.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from typing_extensions import deprecated

from pytest_dcp._engine.coordinate import OperationCall, Team, team_of
from pytest_dcp._engine.io.checked_ranges import Verify
from pytest_dcp._engine.io.progress_observer import Progress
from pytest_dcp._engine.plan.match_keys import LoadReport
from pytest_dcp._engine.plan.select import Rename, Selection
from pytest_dcp._engine.plan.storage_capabilities import verifies_bytes
from pytest_dcp._engine.planners.empty_state_dict import _EmptyStateDictLoadPlanner
from pytest_dcp._engine.planners.load_planner import DefaultLoadPlanner
from pytest_dcp._engine.storages.folder_reader import checked_verify
from pytest_dcp._engine.verbs.load_steps import Load, LoadRequest
from pytest_dcp._engine.verbs.shared_reading import Read, checked_read
from pytest_dcp._engine.verbs.storage_for_id import reader_for, subject_of
from pytest_dcp._engine.verbs.torch_arguments import (
    allow_positional_storage,
    check_planner,
    check_state_dict,
    is_stateful,
    resolve_no_dist,
    resolve_stateful,
)
from pytest_dcp.tracebacks import drop_inner_frames


@deprecated(
    "`load_state_dict` is deprecated and will be removed in future versions. "
    "Please use `load` instead.",
    category=FutureWarning,
)
@drop_inner_frames
def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Load into a state dict of tensors and values: the older form of `load`, without Stateful."""
    team = _load_team(process_group, no_dist, coordinator_rank, storage_reader, None)
    with team.preparing():
        check_state_dict(state_dict)
        storage_reader.reset()
        planner = planner or DefaultLoadPlanner()
    Load(team, LoadRequest(lambda: state_dict, storage_reader, planner)).run()


@allow_positional_storage("storage_reader")
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    strict: bool = True,
    keys: str | Sequence[str] | None = None,
    rename: Rename | None = None,
    weights_only: bool = True,
    verify: Verify | None = None,
    progress: Callable[[Progress], None] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    read: Read = "auto",
) -> LoadReport:
    """Fill the state dict; report missing, unexpected and converted keys. Collective.

    Tensors are loaded in place, in any layout; values are replaced; Stateful objects get their
    loaded state. Meta tensors are replaced by real ones. Up to `no_dist` the arguments are torch's;
    the others are for the default planner and storage:

    strict: False leaves keys that the checkpoint lacks unchanged, and converts between any dtypes.
    keys: load only these flat names, or names that match these shell-style patterns.
    rename: from the state dict's flat names to the checkpoint's, {"mine.": "stored."}: a mapping of
        names, or of prefixes that end in a dot, or a function. An entry that matches nothing on any
        rank is refused, even without `strict`.
    weights_only: False allows values of any class, and loading them can run code: only for
        checkpoints whose writer you trust.
    verify: "auto", "full" or "off", see FileSystemReader; None: "auto", or the given reader's.
    progress: called now and then with this rank's progress.
    storage_options: for the file system of a URL, such as {"endpoint_url": ...}.
    read: "local": each rank reads what it wants. "shared": bytes that several ranks want are read
        by one of them, which sends them to the others, directly and not over the process group.
        "auto": "shared" in object stores and on network file systems, where ranks want at least
        1 MiB twice; otherwise "local". The same on every rank.

    Raises CheckpointException, the same on every rank, naming each rank that failed and why: keys
    that do not fit (CheckpointMismatchError) before any byte moves, damage
    (CheckpointCorruptError) with file, entry and offset.

    >>> import torch
    >>> from pytest_dcp.checkpoint import load, save
    >>> metadata = save({"net": {"w": torch.ones(2), "b": torch.zeros(2)}}, checkpoint_id="step-1")
    >>> state = {"model": {"w": torch.zeros(2, dtype=torch.float64)}}
    >>> report = load(state, checkpoint_id="step-1", rename={"model.": "net."})
    >>> state["model"]["w"]
    tensor([1., 1.], dtype=torch.float64)
    >>> report.unexpected, report.converted
    (('net.b',), {'model.w': (torch.float32, torch.float64)})
    """
    no_dist = resolve_no_dist(no_dist, "load")
    options = {} if verify is None else {"verify": verify}
    team = _load_team(process_group, no_dist, 0, storage_reader, checkpoint_id)
    with team.preparing():
        check_state_dict(state_dict)
        storage_reader = reader_for(storage_reader, checkpoint_id, storage_options, **options)
        chosen = Selection([keys] if isinstance(keys, str) else keys, rename)
        chosen.check_types()
        planner = _planner_for(planner, chosen, strict=strict, weights_only=weights_only)
        if verify is not None:
            checked_verify(verify)
        checked_read(read, storage_reader)

    def ordered() -> dict[str, Any]:
        return resolve_stateful({key: state_dict[key] for key in sorted(state_dict)})

    work = Load(team, LoadRequest(ordered, storage_reader, planner, progress, read))
    with verify_with(storage_reader, verify):
        report = work.run()
    for key, loaded in work.state_dict.items():
        # A planner may build the state that it loads; the caller then had no value there.
        value: Any = state_dict.get(key)
        if isinstance(value, torch.Tensor) or not is_stateful(value):
            state_dict[key] = loaded
        else:
            value.load_state_dict(loaded)
    return report


def _planner_for(
    planner: LoadPlanner | None, selection: Selection, *, strict: bool, weights_only: bool
) -> LoadPlanner:
    """The given planner, or a default one with these options; only the default one takes them."""
    if planner is None:
        return DefaultLoadPlanner(
            allow_partial_load=not strict, weights_only=weights_only, selection=selection
        )
    check_planner(planner, "LoadPlanner")
    if not strict or not weights_only or selection != Selection():
        raise ValueError(
            "strict, keys, rename and weights_only are for the default planner: give them to "
            f"your {type(planner).__name__} (DefaultLoadPlanner has allow_partial_load, selection "
            "and weights_only)"
        )
    return planner


@drop_inner_frames
def load_without_template(
    keys: set[str] | str | None = None,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    weights_only: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the checkpoint's whole state dict on the CPU of every rank.

    It has the saved containers and keys; a PerRank becomes a dict from each rank to the value that
    the rank saved. A checkpoint that does not describe its containers (torch's, or an older one of
    ours) gives dicts and lists, with strings as keys.

    keys: only these flat names, and names below them; None: everything.
    no_dist: this rank loads alone, even in a process group.
    storage_options: for the file system of a URL.

    Raises CheckpointException, as `load`; its cause is a CheckpointMismatchError, naming them, for
    containers and keys of other classes than Python's own, unless `weights_only` is False.
    """
    no_dist = resolve_no_dist(no_dist, "load")
    team = _load_team(process_group, no_dist, 0, storage_reader, checkpoint_id)
    state_dict: dict[str, Any] = {}
    with team.preparing():
        storage_reader = reader_for(storage_reader, checkpoint_id, storage_options)
        planner = _EmptyStateDictLoadPlanner(
            {keys} if isinstance(keys, str) else keys, weights_only=weights_only
        )
    Load(team, LoadRequest(lambda: state_dict, storage_reader, planner)).run()
    return planner.rebuilt()


def _load_team(
    group: dist.ProcessGroup | None,
    no_dist: bool,
    coordinator_rank: int,
    reader: StorageReader | None,
    checkpoint_id: str | os.PathLike[str] | None,
) -> Team:
    """The team of a load that is called now. Ranks may have copies in folders of their own."""
    return team_of(
        group,
        OperationCall("load", subject_of(reader, checkpoint_id)),
        use_dist=not no_dist,
        coordinator_rank=coordinator_rank,
    )


@contextmanager
def verify_with(reader: StorageReader, verify: Verify | None) -> Iterator[None]:
    """Set how the reader verifies inside the block, if it is one of ours; then restore it."""
    if verify is None or not verifies_bytes(reader):
        yield
        return
    before, reader.verify = reader.verify, checked_verify(verify)
    try:
        yield
    finally:
        reader.verify = before
