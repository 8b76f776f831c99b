"""Opens this rank's team for one operation of a process group."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch.distributed as dist

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.coordinate import rendezvous
from pytest_dcp._engine.coordinate.failure import CoordinationError
from pytest_dcp._engine.coordinate.idle_connections import open_liveness_connection
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.operation_order import CallOrder, Subject, kind_of
from pytest_dcp._engine.coordinate.team import Team


@dataclass(frozen=True, slots=True)
class OperationCall:
    """One call of an operation."""

    operation: str
    """Its kind first ("save", "load", "save step_100"): ranks that name different ones fail."""
    subject: Subject | None = None
    """The folder."""
    one_subject: bool = False
    """Whether ranks with different folders fail."""
    background: bool = False
    """Whether it runs while the caller does something else."""


def team_of(
    process_group: dist.ProcessGroup | None,
    call: OperationCall,
    *,
    use_dist: bool,
    coordinator_rank: int,
) -> Team:
    """This rank's team for one operation of a process group; local, nothing is sent yet.

    Call it where the operation is called, in program order: it takes the operation's place in the
    group's order. Before the first step, `wait_for_turn` waits for earlier operations (see
    operation_order). `coordinator_rank` is a rank of the group, as for torch. Without
    `process_group` the team is of the default group. Without `use_dist` this rank is alone, and its
    own coordinator.

    Raises ValueError if this rank or the coordinator is not in the group.
    """
    operation, background = call.operation, call.background
    if not use_dist:
        place = _alone.take(kind_of(operation), call.subject, background=background)
        return Team(OperationContext(0, 1, 0, operation, float("inf"), None, place), _alone)
    group = process_group if process_group is not None else dist.group.WORLD
    if group is None:
        raise ValueError(
            f"{operation}: no process group is initialized; call init_process_group, or ask for "
            "an operation of this rank alone (no_dist=True)"
        )
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"{operation}: this rank is not in the process group")
    if not 0 <= coordinator_rank < size:
        raise ValueError(
            f"{operation}: the coordinator must be a rank of the group, 0 to {size - 1}; "
            f"got {coordinator_rank}"
        )
    if is_fake(group):
        return _view_of_fake_world(call, rank, size)
    if size > 1:
        rendezvous.announce_presence(group, rank, coordinator_rank)
    order = rendezvous.meeting_of(group).order
    place = order.take(kind_of(operation), call.subject, background=background)
    timeout_s = rendezvous.timeout_of(group)
    context = OperationContext(
        rank, size, coordinator_rank, operation, timeout_s, group, place, call.one_subject
    )
    return Team(context, order)


def is_fake(group: dist.ProcessGroup) -> bool:
    """Whether the group is one rank's view of a world that does not exist."""
    return dist.get_world_size(group) > 1 and dist.get_backend(group) == FAKE


def _view_of_fake_world(call: OperationCall, rank: int, size: int) -> Team:
    """A team of this rank alone, which loads its own part.

    Raises ValueError for any other operation.
    """
    kind = kind_of(call.operation)
    if kind != "load":
        raise ValueError(
            f"{call.operation}: the other ranks of a fake process group do not exist and cannot "
            "take part: in a fake world `save` plans, `load` reads this rank's part, and all else "
            "needs no_dist=True"
        )
    place = _alone.take(kind, call.subject, background=call.background)
    team = Team(OperationContext(0, 1, 0, call.operation, float("inf"), None, place), _alone)
    team.view = rank, size
    return team


FAKE = "fake"
"""The backend of torch's FakeProcessGroup."""
_alone = CallOrder(one_folder_at_a_time=True)
"""Operations of this process alone: saves to one folder are made one after another."""
operating_system.call_in_forked_children(_alone.forget_pending)


def announce(process_group: dist.ProcessGroup | None, coordinator_rank: int) -> None:
    """Let the others see this rank's end from now on, before its first step.

    A coordinator publishes its address; a peer connects to a coordinator that has published it
    already. Queries the group's store once, the first time; a failure is left to the first step.
    """
    group = process_group if process_group is not None else dist.group.WORLD
    if group is None:
        return
    with contextlib.suppress(CoordinationError, RuntimeError, ValueError, OSError):
        rank = dist.get_rank(group)
        if rank == coordinator_rank:
            rendezvous.publish(group, coordinator_rank)
        elif rank >= 0:
            address = rendezvous.look_up(group, coordinator_rank, until_s=0.0)
            if address is not None:
                open_liveness_connection(group, coordinator_rank, rank, address)
