"""Compares the facts from all ranks about one load; raises the errors that no rank sees alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.planner import LoadPlan

from pytest_dcp._engine.coordinate.sent_classes import record
from pytest_dcp._engine.verbs.shared_reading import SharingWish
from pytest_dcp.errors import CheckpointMismatchError, CheckpointReplacedError
from pytest_dcp.rank_names import ranks_text

Found = tuple[str | None, str | None]
"""The id of the save that a rank found, and the folder."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A rank's message to the coordinator about its plan."""

    plan: LoadPlan | None
    """None unless a hook wants to see it."""
    found: Found
    idle_renames: Mapping[str, str]
    """Entries of `rename` that match nothing on this rank, and why."""
    may_misfit: bool
    """Whether it reads data that can only be checked against the target after reading."""
    sharing: SharingWish
    """Whether it would read for other ranks."""


record(Planned)


def check_together(rank_values: Sequence[Planned]) -> bool:
    """Raise errors that only all ranks together show. Returns whether any rank may meet a
    misfit.
    """
    check_one_save([one.found for one in rank_values])
    idle = [one.idle_renames for one in rank_values]
    useless = set(idle[0]).intersection(*idle[1:])
    if useless:
        raise CheckpointMismatchError(
            "\n".join(reason for entry, reason in idle[0].items() if entry in useless)
        )
    return any(one.may_misfit for one in rank_values)


def check_one_save(found: Sequence[Found]) -> None:
    """Raise CheckpointReplacedError unless all ranks have found the same save.

    They may have looked in different folders, which may hold copies of one save.
    """
    saves, folders = [save for save, _ in found], [folder for _, folder in found]
    if len(set(saves)) == 1:
        return
    if len(set(folders)) > 1:
        raise CheckpointReplacedError(
            f"the ranks found different saves, in different folders ({_list_by_rank(folders)}): "
            "every rank must give the same checkpoint_id, and call the group's saves and loads in "
            "the same order"
        )
    raise CheckpointReplacedError(
        f"the ranks found different saves in {folders[0]}: the checkpoint was replaced meanwhile; "
        f"load again ({_list_by_rank(saves)})"
    )


def _list_by_rank(values: Sequence[str | None]) -> str:
    """`rank 2: a, ranks 0-1: b`; at most three values."""
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    rarest = sorted(ranks.items(), key=lambda item: len(item[1]))
    groups = [f"{ranks_text(those)}: {value}" for value, those in rarest[:3]]
    return ", ".join([*groups, "..."] if len(rarest) > 3 else groups)
