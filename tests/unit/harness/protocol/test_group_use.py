"""Ranks are in step when each group's collectives and messages match on all its members."""

from __future__ import annotations

import json

import pytest

from pytest_dcp._harness.protocol.group_use import (
    ANY,
    GROUPS_MADE,
    GroupUse,
    Kinds,
    from_plain,
    out_of_step,
    to_plain,
)
from pytest_dcp._harness.protocol.messages import Done
from pytest_dcp._harness.world.outcome import combine, in_step

PAIR = (0, 1)


def use(
    collectives: int = 0,
    members: tuple[int, ...] = PAIR,
    sent: dict[int, int] | None = None,
    received: dict[int, int] | None = None,
) -> dict[str, GroupUse]:
    return {"0": GroupUse(collectives, members, sent or {}, received or {})}


def test_equal_counts_are_in_step() -> None:
    assert out_of_step({0: use(3), 1: use(3)}) == ""
    assert out_of_step({}) == ""


def test_a_collective_that_one_rank_started_alone_is_named_with_its_group() -> None:
    assert out_of_step({0: use(3), 1: use(2), 2: use(3)}) == (
        "ranks started different numbers of collectives in process group '0' "
        "(ranks 0,2: 3, rank 1: 2)"
    )


def kinds_of(*last: str, called: int | None = None, digest: int | None = None) -> GroupUse:
    """Three collectives, some of which Python has called."""
    digest = hash(last) if digest is None else digest
    return GroupUse(3, PAIR, kinds=Kinds(len(last) if called is None else called, digest, last))


def test_as_many_collectives_of_other_kinds_are_named() -> None:
    ranks = {
        0: {"0": kinds_of("all_reduce", "barrier")},
        1: {"0": kinds_of("broadcast", "barrier")},
    }
    assert out_of_step(ranks) == (
        "ranks started different collectives in process group '0' "
        "(rank 0: all_reduce, barrier, rank 1: broadcast, barrier)"
    )
    long = {
        rank: {"0": kinds_of("barrier", called=9, digest=digest)}
        for rank, digest in ((0, 7), (1, 8))
    }
    assert out_of_step(long).endswith("in process group '0', before the last 1")


def test_calls_that_only_one_rank_made_in_python_are_not_compared() -> None:
    in_python, in_cpp = kinds_of("all_reduce"), kinds_of()
    assert out_of_step({0: {"0": in_python}, 1: {"0": in_cpp}}) == ""


def test_only_the_ranks_of_a_group_are_compared_in_it() -> None:
    left, right = {"left": GroupUse(1, PAIR)}, {"right": GroupUse(5, (2, 3))}
    assert out_of_step({0: left, 1: left, 2: right, 3: right}) == ""


def test_a_rank_that_has_destroyed_a_group_is_not_compared_in_it() -> None:
    assert out_of_step({0: use(4), 1: {}}) == ""


def test_different_numbers_of_groups_are_out_of_step() -> None:
    ranks = {rank: {GROUPS_MADE: GroupUse(1 + rank)} for rank in PAIR}
    assert out_of_step(ranks).startswith("ranks made different numbers of process groups")


@pytest.mark.parametrize("members", [PAIR, (0, 1, 2)])
def test_messages_that_were_sent_and_received_are_in_step(members: tuple[int, ...]) -> None:
    ranks = {rank: use(members=members) for rank in members}
    ranks |= {0: use(0, members, {1: 2}), 1: use(0, members, received={0: 2})}
    assert out_of_step(ranks) == ""


def test_a_message_that_was_not_received_is_named() -> None:
    ranks = {0: use(sent={1: 2}), 1: use(received={0: 1})}
    said = "rank 1 received 1 of 2 messages from rank 0 in process group '0'"
    assert out_of_step(ranks) == said
    assert "received 1 of 0 messages" in out_of_step({0: use(), 1: use(received={0: 1})})


def test_a_receive_from_anyone_takes_a_message_of_any_member() -> None:
    members = (0, 1, 2)

    def ranks(received: dict[int, int]) -> dict[int, dict[str, GroupUse]]:
        sender = use(0, members, {2: 1})
        return {0: sender, 1: sender, 2: use(0, members, received=received)}

    assert out_of_step(ranks({ANY: 1, 0: 1})) == ""
    assert "rank 2 received 1 of 2 messages from its peers" in out_of_step(ranks({ANY: 1}))


def test_uses_survive_the_wire() -> None:
    uses = {
        **use(3, sent={1: 2}, received={ANY: 1}),
        GROUPS_MADE: GroupUse(1),
        "1": kinds_of("barrier", "gather"),
    }
    assert from_plain(json.loads(json.dumps(to_plain(uses)))) == uses


def test_a_phase_that_leaves_ranks_out_of_step_has_failed() -> None:
    done = {rank: Done("call", "passed", 0.0, groups=to_plain(use(rank))) for rank in PAIR}
    outcome = in_step(combine(2, done, ()))
    assert outcome.kind == "failed"
    assert outcome.reason.startswith("ranks started different numbers of collectives")
    assert [failure.kind for failure in outcome.failures] == ["diverged"]


def test_ranks_that_do_not_tell_of_their_groups_are_not_compared() -> None:
    done = {0: Done("call", "passed", 0.0, groups=to_plain(use(1))), 1: Done("call", "passed", 0.0)}
    assert in_step(combine(2, done, ())).kind == "passed"


def test_equal_ranks_with_messages_not_received_are_out_of_step() -> None:
    both = to_plain(use(sent={0: 1, 1: 1}))
    done = {rank: Done("call", "passed", 0.0, groups=both) for rank in PAIR}
    assert "rank 0 received 0 of 1 messages from rank 0" in in_step(combine(2, done, ())).reason
