"""The verdict on an example that Hypothesis gets, from replayed replies of the ranks."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence

import pytest

from pytest_dcp._harness.lockstep.example_messages import Choice, Entry, Property, Reply, Status
from pytest_dcp._harness.lockstep.verdict import (
    ExampleVerdict,
    drew_the_same,
    find_property,
    judge,
    reply_of,
)
from pytest_dcp._harness.protocol.group_use import GroupUse
from pytest_dcp._harness.protocol.messages import Done
from pytest_dcp._harness.world.outcome import Outcome, combine
from pytest_dcp.errors import FailureKind, RankFailure

ECHO = "RuntimeError: Connection closed by peer"


def integer(value: int) -> Choice:
    return Choice("integer", {"min_value": 0, "max_value": 10}, value, forced=False)


def reply(status: Status = "valid", count: int = 1, **facts: object) -> Reply:
    return Reply(status, (count, 0), **facts)  # type: ignore[arg-type]  # by name, in each case


def failed(rank: int, kind: FailureKind, text: str, at_s: float = 0.0) -> RankFailure:
    return RankFailure(rank, kind, "call", at_s, text)


def verdict_of(
    replies: Mapping[int, Reply],
    *failures: RankFailure,
    size: int = 2,
    records: Mapping[int, Sequence[Entry]] | None = None,
) -> ExampleVerdict:
    """The verdict on these replies; a rank without one sent no message."""
    words = {"valid": "passed", "interesting": "failed", "invalid": "passed", "overrun": "passed"}
    done = {
        rank: Done("call", words[one.status], 0.0, text=one.origin, payload=pickle.dumps(one))  # type: ignore[arg-type]  # words of ours
        for rank, one in replies.items()
    }
    outcome = combine(size, done, failures)
    return judge(outcome, replies, records or {rank: [integer(1)] for rank in range(size)})


def test_all_ranks_passed() -> None:
    verdict = verdict_of({0: reply(), 1: reply()})
    assert (verdict.outcome.kind, verdict.decisive, verdict.can_continue) == ("passed", 0, True)
    assert verdict.rejected_by is None


def test_no_example_follows_when_a_rank_has_ended_the_session_beside_a_failure() -> None:
    said = {0: reply("interesting"), 1: reply()}
    done = {0: Done("call", "failed", 0.0, text="ValueError: 3"), 1: Done("call", "exit", 0.0)}
    verdict = judge(combine(2, done, ()), said, {0: [integer(1)], 1: [integer(1)]})
    assert verdict.outcome.kind == "failed"
    assert verdict.is_last


def test_the_rank_that_failed_decides() -> None:
    verdict = verdict_of({0: reply(), 1: reply("interesting", origin="ValueError at x:1")})
    assert (verdict.decisive, verdict.bug) == (1, "ValueError at x:1")


def test_of_two_that_failed_the_lower_decides_whichever_was_first() -> None:
    replies = {r: reply("interesting", origin=f"Error{r} at x:{r}") for r in range(2)}
    for first, second in ((0.0, 1.0), (1.0, 0.0)):
        verdict = verdict_of(
            replies, failed(0, "failed", "Error0", first), failed(1, "failed", "Error1", second)
        )
        assert (verdict.decisive, verdict.bug) == (0, "Error0 at x:0")


def test_an_echo_does_not_decide() -> None:
    replies = {0: reply("interesting", origin="RuntimeError at gloo")}
    killed = failed(1, "crashed", "was killed by signal 9", 1.0)
    verdict = verdict_of(replies, failed(0, "failed", ECHO), killed)
    assert (verdict.decisive, verdict.bug) == (1, "was killed by signal 9")


def test_hangs_are_one_bug_wherever_they_are() -> None:
    verdict = verdict_of({0: reply()}, failed(1, "timeout", "still in call, at x:7 in f"))
    assert (verdict.decisive, verdict.bug) == (1, "timeout")


@pytest.mark.parametrize("peer", [[], [failed(0, "failed", ECHO)], [failed(0, "blocked", "in f")]])
def test_a_rejection_decides_over_ranks_that_waited_for_it(peer: list[RankFailure]) -> None:
    verdict = verdict_of({1: reply("invalid", reason="assume")}, *peer)
    assert (verdict.rejected_by, verdict.decisive) == (1, 1)


def test_a_failure_decides_over_a_rejection() -> None:
    replies = {0: reply("invalid"), 1: reply("interesting", origin="ValueError at x:1")}
    verdict = verdict_of(replies)
    assert (verdict.rejected_by, verdict.decisive) == (None, 1)


def test_ranks_that_drew_differently_have_failed_though_all_passed() -> None:
    records = {0: [integer(1)], 1: [integer(1), integer(2)]}
    verdict = verdict_of({0: reply(), 1: reply(count=2)}, records=records)
    assert verdict.outcome.kind == "failed"
    assert verdict.outcome.reason.startswith("ranks diverged at choice 2")
    assert (verdict.decisive, verdict.bug) == (1, "diverged")


def test_ranks_that_failed_early_drew_less_and_have_not_diverged() -> None:
    records = {0: [integer(1)], 1: [integer(1), integer(2)]}
    replies = {0: reply("interesting", origin="ValueError at x:1"), 1: reply(count=2)}
    assert not verdict_of(replies, records=records).diverged


def test_a_world_may_go_on_after_a_failure_when_its_collectives_match() -> None:
    def after(mine: int, theirs: int) -> bool:
        failure = reply("interesting", origin="E", groups={"0": GroupUse(mine)})
        return verdict_of({0: failure, 1: reply(groups={"0": GroupUse(theirs)})}).can_continue

    assert after(2, 2)
    assert not after(1, 2)


def test_an_example_that_leaves_the_ranks_out_of_step_has_failed() -> None:
    verdict = verdict_of({0: reply(groups={"0": GroupUse(1)}), 1: reply(groups={"0": GroupUse(2)})})
    assert not verdict.can_continue
    assert verdict.outcome.kind == "failed"
    said = "ranks started different numbers of collectives in process group '0' (rank 0: 1, rank 1"
    assert verdict.outcome.reason.startswith(said)
    assert verdict.bug == "diverged"


def test_a_rank_that_rejects_an_example_does_not_fail_it_by_being_out_of_step() -> None:
    ahead = reply(groups={"0": GroupUse(1)})
    verdict = verdict_of({0: reply("invalid", groups={"0": GroupUse(0)}), 1: ahead})
    assert not verdict.can_continue
    assert verdict.rejected_by == 0


def test_a_rank_that_cannot_be_used_again_ends_its_world() -> None:
    assert verdict_of({0: reply(), 1: reply()}).can_continue
    assert not verdict_of({0: reply(), 1: reply(reusable=False)}).can_continue


def test_a_health_check_ends_it_all() -> None:
    verdict = verdict_of({0: reply("interesting", fatal=True), 1: reply()})
    assert verdict.is_last
    assert not verdict_of({0: reply("interesting"), 1: reply()}).is_last


def test_a_rank_that_ended_the_test_has_the_last_say() -> None:
    said = reply_of(0, Done("call", "failed", 0.0, text="ValueError: in a thread"))
    assert said.fatal
    assert said.origin == "ValueError: in a thread"


def test_records_are_read_of_one_rank_only_when_all_ended_alike() -> None:
    passed = combine(0, {}, ())

    def alike(*replies: Reply) -> bool:
        return drew_the_same(passed, dict(enumerate(replies)), 2)

    assert alike(reply(), reply())
    assert alike(reply("invalid"), reply("invalid"))
    assert not alike(reply(), reply(count=2))
    assert not alike(reply())
    assert not alike(reply(), reply("invalid"))
    assert not alike(reply("interesting"), reply("interesting"))


@pytest.mark.parametrize("status", ["valid", "invalid"])
def test_a_rank_that_died_after_its_answer_is_looked_at(status: Status) -> None:
    died = combine(0, {}, [RankFailure(1, "crashed", "call", 0.0, "exited with code 3")])
    assert not drew_the_same(died, {0: reply(status), 1: reply(status)}, 2)


def outcome_of(*props: Property | None) -> Outcome:
    done = {
        rank: Done("call", "passed", 0.0)
        if prop is None
        else Done("call", "passed", 0.0, awaits=prop.name, payload=pickle.dumps(prop))
        for rank, prop in enumerate(props)
    }
    return combine(len(props), done, ())


ONE = Property("one", {}, b"1", None)
OTHER = Property("other", {}, b"2", None)


def test_ranks_wait_for_the_same_property() -> None:
    assert find_property(outcome_of(ONE, ONE)) == ONE
    assert find_property(outcome_of(None, None)) is None


@pytest.mark.parametrize(
    ("pair", "said"),
    [((ONE, OTHER), "rank 0: runs one; rank 1: runs other"), ((ONE, None), "rank 1: ended")],
)
def test_ranks_in_different_properties_have_diverged(
    pair: tuple[Property, Property | None], said: str
) -> None:
    outcome = find_property(outcome_of(*pair))
    assert isinstance(outcome, Outcome)
    assert said in outcome.reason
