"""Reports and fates of ranks -> one outcome, with messages from real worlds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_dcp._harness.protocol.messages import Done, RankOutcome
from pytest_dcp._harness.world.outcome import (
    SessionEnd,
    combine,
    first_line,
    headline,
    is_echo,
    lead_with,
    peers,
)
from pytest_dcp.errors import FailureKind, LostRank, RankFailure
from pytest_dcp.rank_names import ranks_text


def done(outcome: RankOutcome = "passed", text: str = "", at_s: float = 1.0) -> Done:
    return Done("call", outcome, at_s, text=text)


def failure(
    rank: int, summary: str = "ValueError: 3", at_s: float = 1.0, kind: FailureKind = "failed"
) -> RankFailure:
    """A failure; the exchange's own error says that it is an echo."""
    return RankFailure(
        rank, kind, "call", at_s, summary, is_echo=(kind, summary) == ("failed", NOT_MET)
    )


PASSED, SKIPPED, XFAILED = done(), done("skipped", "no GPU"), done("xfailed", "issue 7")
XPASSED = Done("call", "passed", 1.0, text="issue 7", xpassed=True)

# As torch 2.13 says them in ranks of one machine, and `rank.lines_of` gives them.
GLOO_CLOSED = (
    "RuntimeError: [/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "
    "Connection closed by peer [127.0.0.1]:1234. This is typically caused by a remote worker "
    "crashing. Check the logs of the remote worker before reporting an error. GLHF! 🏖️"
)
GLOO_RESET = (
    "RuntimeError: [Rank 0]: Rank 1 failed to pass monitoredBarrier in 1000 ms Original exception: "
    "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error "
    "[127.0.0.1]:5035: Connection reset by peer. This is typically caused by a remote worker "
    "hanging or bugs in the application."
)
GLOO_OLD = (
    "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer "
    "[127.0.0.1]:10895"
)
STORE_GONE = "DistNetworkError: Connection reset by peer"
STORE_CLOSED = (
    "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote "
    "server shutdown or crash?"
)
NCCL_RESET = (
    "DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, "
    "remote process exited or there was a network error, NCCL version 2.21.5 ncclRemoteError: A "
    "call failed possibly due to a network error or a remote process exiting prematurely. Last "
    "error: socketProgressOpt: Call to recv from 172.17.0.2<33759> failed : Connection reset by "
    "peer"
)
NCCL_REMOTE = (  # https://github.com/NVIDIA/nccl/issues/934
    "DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1347, "
    "remote process exited or there was a network error, NCCL version 2.18.5 ncclRemoteError: A "
    "call failed possibly due to a network error or a remote process exiting prematurely."
)
NCCL_CLOSED = (  # https://github.com/NVIDIA/nccl/issues/1514
    "DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1275, "
    "internal error, NCCL version 2.14.3 ncclInternalError: Internal check failed. Last error: "
    "Net : Connection closed by remote peer node2<50260>"
)
NOT_MET = (
    "DivergedError: the world's exchange cannot complete (rank 0: barrier()): rank 1 (ValueError: "
    "3) will not come"
)
ECHOES = {
    "gloo, peer died": GLOO_CLOSED,
    "gloo, peer died, before 2.5": GLOO_OLD,
    "gloo, monitored barrier": GLOO_RESET,
    "store, server died": STORE_GONE,
    "store, server left": STORE_CLOSED,
    "nccl, connection reset": NCCL_RESET,
    "nccl, remote error": NCCL_REMOTE,
    "nccl, connection closed": NCCL_CLOSED,
    "our exchange": NOT_MET,
    "the standard library, broken": "BrokenPipeError: [Errno 32] Broken pipe",
    "the standard library, reset": "ConnectionResetError: [Errno 104] Connection reset by peer",
}
CAUSES = {
    "an assertion about the very message": "AssertionError: assert 'Connection closed by peer'",
    "a mismatch of shapes": "RuntimeError: The size of tensor a (3) must match tensor b (4)",
    "a user's own class": "MyRuntimeError: Connection closed by peer",
    "an import": "ModuleNotFoundError: No module named 'socket_closed'",
    "out of memory": "OutOfMemoryError: CUDA out of memory",
    "a bare runtime error": "RuntimeError",
}


# Precedence.


def test_a_world_whose_ranks_all_passed_passed() -> None:
    outcome = combine(3, dict.fromkeys(range(3), PASSED), ())
    assert (outcome.kind, outcome.groups, outcome.first) == ("passed", (), None)


def test_a_world_whose_ranks_all_skipped_is_skipped_with_their_reason() -> None:
    outcome = combine(2, {0: SKIPPED, 1: SKIPPED}, ())
    assert (outcome.kind, outcome.reason, outcome.groups) == ("skipped", "no GPU", ())


LOST = {2: LostRank(2, "was killed by signal 9 (SIGKILL) as asked: world.kill(2) in rank 0")}


@pytest.mark.parametrize("said", [PASSED, SKIPPED, XFAILED])
def test_the_verdicts_of_the_ranks_that_are_left_decide(said: Done) -> None:
    outcome = combine(3, {0: said, 1: said}, (), LOST)
    assert outcome.kind == said.outcome
    assert outcome.lost == LOST


def test_a_lost_rank_is_reported_beside_the_failure_of_another() -> None:
    outcome = combine(3, {0: PASSED}, [failure(1)], LOST)
    assert outcome.kind == "failed"
    assert outcome.reason == "rank 1: ValueError: 3"
    assert peers(outcome) == [f"rank 2: {LOST[2].reason}"]


def test_a_verdict_that_is_missing_is_not_excused_by_another_s_loss() -> None:
    outcome = combine(3, {0: PASSED}, (), LOST)
    assert outcome.reason == "no verdict came from rank 1"


def test_a_world_of_which_no_rank_is_left_failed() -> None:
    outcome = combine(1, {}, (), {0: LostRank(0, "was killed as asked")})
    assert outcome.kind == "failed"
    assert "no rank is left" in outcome.reason
    assert peers(outcome) == ["rank 0: was killed as asked"]


def test_a_rank_that_failed_before_it_was_lost_has_failed() -> None:
    outcome = combine(3, {0: PASSED, 1: PASSED}, [failure(2)], LOST)
    assert outcome.kind == "failed"


@pytest.mark.parametrize("other", [XFAILED, XPASSED])
def test_a_world_in_which_all_ranks_expect_the_failure_is_xfailed(other: Done) -> None:
    outcome = combine(2, {0: other, 1: XFAILED}, ())
    assert (outcome.kind, outcome.reason) == ("xfailed", "issue 7")


def test_an_xfail_on_some_ranks_only_is_a_failure_that_names_both_sides() -> None:
    outcome = combine(4, {0: PASSED, 1: XFAILED, 2: XFAILED, 3: PASSED}, ())
    assert outcome.first is not None
    assert (outcome.kind, outcome.first.failure.kind) == ("failed", "diverged")
    assert outcome.reason.startswith("ranks 1-2 xfailed (issue 7), but ranks 0,3 passed: ")


@pytest.mark.parametrize("other", [PASSED, XFAILED])
def test_a_skip_on_some_ranks_only_is_a_failure_that_names_both_sides(other: Done) -> None:
    outcome = combine(4, {0: other, 1: SKIPPED, 2: SKIPPED, 3: other}, ())
    assert outcome.kind == "failed"
    assert outcome.first is not None
    assert outcome.first.failure.kind == "diverged"
    assert "ranks 1-2 skipped (no GPU)" in outcome.reason
    assert "ranks 0,3" in outcome.reason
    assert other.outcome in outcome.reason


@pytest.mark.parametrize("other", [PASSED, SKIPPED, XFAILED])
@pytest.mark.parametrize("kind", get_args(FailureKind))
def test_a_failure_of_one_rank_fails_the_world_despite_the_others(
    other: Done, kind: FailureKind
) -> None:
    outcome = combine(2, {0: other}, (failure(1, "SIGSEGV", kind=kind),))
    assert outcome.kind == "failed"
    assert outcome.first is not None
    assert outcome.first.ranks == (1,)
    assert "SIGSEGV" in outcome.reason


ENDS: tuple[Literal["exit", "interrupt"], ...] = ("exit", "interrupt")


@pytest.mark.parametrize("kind", ENDS)
def test_a_failure_beside_a_rank_that_ends_the_session_is_shown_and_the_session_ends(
    kind: Literal["exit", "interrupt"],
) -> None:
    said = Done("call", kind, 1.0, text="enough", returncode=0)
    outcome = combine(3, {0: PASSED, 2: said}, (failure(1),))
    assert (outcome.kind, outcome.reason) == ("failed", "rank 1: ValueError: 3")
    assert outcome.session_end == SessionEnd(kind, 2, "enough", 0)
    assert peers(outcome) == ["rank 2: ended the session: enough"]


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize(
    "follows",
    [
        failure(0, "still in call, in all_reduce, at x.py:3 in f", kind="blocked"),
        failure(0, NOT_MET),
    ],
    ids=["waited", "waited in an exchange"],
)
def test_a_peer_that_only_waited_for_a_rank_that_ends_the_session_is_no_failure(
    kind: Literal["exit", "interrupt"], follows: RankFailure
) -> None:
    outcome = combine(2, {1: done(kind, "enough")}, (follows,))
    assert (outcome.kind, outcome.reason) == (kind, "rank 1: enough")
    assert outcome.session_end == SessionEnd(kind, 1, "enough", None)


@pytest.mark.parametrize("kind", ["crashed", "timeout", "flooded", "closed", "spared"])
def test_any_own_failure_of_a_peer_is_shown_beside_an_exit(kind: FailureKind) -> None:
    outcome = combine(2, {1: done("exit", "enough")}, (failure(0, "it went wrong", kind=kind),))
    assert (outcome.kind, outcome.reason) == ("failed", "rank 0: it went wrong")


def test_another_group_can_lead_the_outcome() -> None:
    blocked = failure(0, "still in call, at x.py:3 in f", 2.0, "blocked")
    outcome = combine(2, {1: done("failed", "ValueError: 3")}, (blocked, failure(1)))
    led = lead_with(outcome, outcome.groups[1])
    assert outcome.reason == "rank 1: ValueError: 3"
    assert led.reason == "rank 0: still in call, at x.py:3 in f"
    assert [(group.ranks, group.echo) for group in led.groups] == [((0,), False), ((1,), False)]


def test_ctrl_c_in_a_rank_comes_before_an_exit_in_another() -> None:
    outcome = combine(2, {0: done("exit", "enough"), 1: done("interrupt", "^C")}, ())
    assert outcome.kind == "interrupt"


@pytest.mark.parametrize(
    ("said", "missing"), [({}, "ranks 0-2"), ({0: PASSED, 2: PASSED}, "rank 1")]
)
def test_a_verdict_that_is_missing_is_a_failure_that_names_the_rank(
    said: Mapping[int, Done], missing: str
) -> None:
    outcome = combine(3, said, ())
    assert outcome.kind == "failed"
    assert missing in outcome.reason


def test_a_missing_verdict_beats_a_skip_of_all_others() -> None:
    assert combine(2, {0: SKIPPED}, ()).kind == "failed"


outcomes = st.sampled_from(get_args(RankOutcome))


@settings(deadline=None)
@given(st.integers(1, 6), st.data())
def test_a_world_passes_only_when_every_rank_passed_and_nothing_failed(
    size: int, data: st.DataObject
) -> None:
    said = data.draw(st.dictionaries(st.integers(0, size - 1), st.builds(done, outcomes)))
    failures = data.draw(st.lists(st.builds(failure, st.integers(0, size - 1)), max_size=2))
    outcome = combine(size, said, failures)
    all_passed = True
    for rank in range(size):
        if rank not in said or said[rank].outcome != "passed":
            all_passed = False
    assert (outcome.kind == "passed") == (all_passed and not failures)
    assert (outcome.kind == "failed") == bool(outcome.groups)


def test_a_rank_that_says_failed_fails_the_world_even_without_a_recorded_failure() -> None:
    assert combine(2, {0: PASSED, 1: done("failed", "ValueError: 3")}, ()).kind == "failed"


# Causes and echoes.


@pytest.mark.parametrize("summary", ECHOES.values(), ids=ECHOES)
def test_an_error_about_a_lost_peer_is_an_echo(summary: str) -> None:
    assert is_echo(failure(0, summary))


def test_our_exchange_s_error_is_an_echo_by_its_flag_and_not_by_its_words() -> None:
    assert is_echo(RankFailure(0, "failed", "call", 1.0, "any words", is_echo=True))
    assert not is_echo(RankFailure(0, "failed", "call", 1.0, NOT_MET))
    said = replace(done("failed", "any words"), is_echo=True)
    outcome = combine(2, {0: said, 1: done("failed", "ValueError: 3")}, ())
    assert outcome.reason == "rank 1: ValueError: 3"


@pytest.mark.parametrize("summary", CAUSES.values(), ids=CAUSES)
def test_an_error_of_the_rank_itself_is_no_echo(summary: str) -> None:
    assert not is_echo(failure(0, summary))


@pytest.mark.parametrize("kind", ["crashed", "closed", "flooded", "timeout", "diverged"])
def test_a_ranks_own_end_is_no_echo_in_any_words(kind: FailureKind) -> None:
    assert not is_echo(failure(0, GLOO_CLOSED, kind=kind))


@pytest.mark.parametrize("summary", ECHOES.values(), ids=ECHOES)
def test_the_first_cause_comes_before_its_echoes_even_if_reported_later(
    summary: str,
) -> None:
    # A rank's death is seen by its peers before the controller reaps it.
    crash = failure(2, "was killed by signal 9 (SIGKILL) in call", 5.0, "crashed")
    echoes = [failure(0, summary, 4.0), failure(1, summary, 4.5)]
    outcome = combine(3, {}, [*echoes, crash])
    assert [(group.ranks, group.echo) for group in outcome.groups] == [
        ((2,), False),
        ((0, 1), True),
    ]
    assert outcome.reason == "rank 2: was killed by signal 9 (SIGKILL) in call"


def test_of_two_causes_the_earlier_is_the_first_and_the_later_is_no_echo() -> None:
    late, early = failure(0, "ValueError: late", 3.0), failure(1, "KeyError: 'early'", 2.0)
    outcome = combine(2, {}, [late, early])
    assert [(group.failure, group.echo) for group in outcome.groups] == [
        (early, False),
        (late, False),
    ]


def test_when_all_failures_are_echoes_the_earliest_is_taken_for_the_cause() -> None:
    outcome = combine(3, {}, [failure(0, GLOO_CLOSED, 3.0), failure(2, STORE_GONE, 2.0)])
    assert outcome.first is not None
    assert outcome.first.failure.rank == 2
    assert not outcome.first.echo


def test_ranks_that_had_to_be_killed_come_after_the_one_that_failed_although_killed_first() -> None:
    blocked = failure(0, "still in call", 1.0, "blocked")
    outcome = combine(2, {}, [blocked, failure(1, at_s=2.0)])
    assert [group.failure.kind for group in outcome.groups] == ["failed", "blocked"]
    assert outcome.groups[1].echo


def test_who_reached_the_limit_comes_after_who_failed_however_early() -> None:
    timeout = failure(0, "still in call at the time limit of 5 s", 1.0, "timeout")
    outcome = combine(2, {}, [timeout, failure(1, at_s=2.0)])
    assert [group.failure.kind for group in outcome.groups] == ["failed", "timeout"]


def test_of_the_ranks_that_reached_the_limit_the_one_waiting_for_no_peer_comes_first() -> None:
    late = "still in call at the time limit of 2 s, "
    waits = failure(0, late + "in all_reduce, at test_a.py:6 in test_b", 1.0, "timeout")
    meets = failure(1, late + "in the world's exchange, at test_a.py:7 in test_b", 1.1, "timeout")
    sleeps = failure(2, late + "at test_a.py:5 in test_b", 2.0, "timeout")
    outcome = combine(3, {}, [waits, meets, sleeps])
    assert [group.ranks for group in outcome.groups] == [(2,), (0,), (1,)]
    assert outcome.reason.startswith("rank 2: ")


def test_ranks_that_all_wait_in_different_collectives_are_reported() -> None:
    late = "still in call at the time limit of 2 s, in {}, at test_a.py:{} in test_b"
    outcome = combine(
        3,
        {},
        [
            failure(0, late.format("all_reduce", 6), kind="timeout"),
            failure(1, late.format("barrier", 8), kind="timeout"),
            failure(2, late.format("all_reduce", 6), kind="timeout"),
        ],
    )
    assert "ranks 0,2: all_reduce" in outcome.reason
    assert "rank 1: barrier" in outcome.reason


def test_ranks_that_all_wait_in_the_same_collective_are_not_said_to_differ() -> None:
    late = "still in call at the time limit of 2 s, in barrier, at test_a.py:{} in test_b"
    failures = [failure(rank, late.format(rank), kind="timeout") for rank in (0, 1)]
    assert "different" not in combine(2, {}, failures).reason


# Groups.


def test_ranks_that_failed_alike_are_one_group_and_the_others_are_not() -> None:
    outcome = combine(
        5,
        {},
        [
            failure(4, "ValueError: 3", 3.0),
            failure(1, "ValueError: 3", 2.0),
            failure(2, "ValueError: 4", 2.5),
            failure(0, "ValueError: 3", 2.1),
            failure(3, "ValueError: 3", 9.0, "crashed"),
        ],
    )
    assert [group.ranks for group in outcome.groups] == [(0, 1, 4), (2,), (3,)]
    assert outcome.groups[0].failure.rank == 1  # the first of them in time
    assert outcome.reason == "ranks 0-1,4: ValueError: 3"


def test_echoes_that_differ_in_the_peer_s_address_only_are_one_group() -> None:
    echoes = [failure(rank, GLOO_CLOSED.replace("1234", f"{rank}4"), 2.0) for rank in (0, 1, 3)]
    outcome = combine(4, {}, [*echoes, failure(2)])
    assert [group.ranks for group in outcome.groups] == [(2,), (0, 1, 3)]


def test_a_failure_that_looks_like_an_echo_is_the_cause_when_it_is_alone() -> None:
    outcome = combine(2, {0: PASSED}, [failure(1, GLOO_CLOSED)])
    assert outcome.first is not None
    assert not outcome.first.echo
    assert GLOO_CLOSED in outcome.reason


summaries = st.sampled_from([GLOO_CLOSED, NCCL_RESET, NOT_MET, *CAUSES.values()])
failures_ = st.builds(
    failure,
    st.integers(0, 9),
    summaries,
    st.floats(0, 100),
    st.sampled_from(get_args(FailureKind)),
)


@settings(deadline=None)
@given(st.lists(failures_, min_size=1, max_size=8))
def test_every_failure_is_reported_once_and_echoes_come_after_causes(
    failures: Sequence[RankFailure],
) -> None:
    outcome = combine(10, {}, failures)
    assert sorted(outcome.failures, key=repr) == sorted(failures, key=repr)
    assert outcome.first is not None
    assert not outcome.first.echo
    echo = [group.echo for group in outcome.groups]
    assert echo == sorted(echo)
    for group in outcome.groups:
        assert list(group.ranks) == sorted({f.rank for f in group.members})
        assert group.failure in group.members
        assert group.failure.at_s == min(f.at_s for f in group.members)
    assert outcome.reason.endswith(headline(outcome.first))


@settings(deadline=None)
@given(st.lists(failures_, min_size=1, max_size=8))
def test_the_first_cause_is_the_earliest_real_failure(failures: Sequence[RankFailure]) -> None:
    real = [f for f in failures if f.kind in ("crashed", "closed", "flooded", "diverged", "spared")]
    real += [f for f in failures if f.kind == "failed" and f.summary in CAUSES.values()]
    first = combine(10, {}, failures).first
    assert first is not None
    if real:
        assert first.failure.at_s == min(f.at_s for f in real)
        assert first.failure in real


# Words.


def test_each_other_group_gets_a_line_with_its_ranks_and_how_much_later() -> None:
    outcome = combine(
        4,
        {3: PASSED},
        [
            failure(0, at_s=2.0),
            failure(1, "KeyError: 'x'", 2.25),
            failure(2, "still in call, in barrier, at a.py:3 in b", 3.5, "blocked"),
        ],
    )
    later, blocked = peers(outcome)
    assert "rank 1" in later
    assert "KeyError: 'x'" in later
    assert "0.25 s later" in later
    assert "rank 2" in blocked
    assert "in barrier" in blocked
    assert "killed" in blocked


def test_an_echo_reported_before_its_cause_is_not_said_to_be_later_by_less_than_nothing() -> None:
    crash = failure(1, "was killed by signal 9 (SIGKILL)", 5.0, "crashed")
    (line,) = peers(combine(2, {}, [crash, failure(0, GLOO_CLOSED, 4.0)]))
    assert "-" not in line.replace("GLHF-", "")
    assert "0.00 s later" in line


def test_at_the_limit_the_ranks_that_had_ended_are_named() -> None:
    outcome = combine(3, {0: PASSED, 2: PASSED}, [failure(1, "still in call", 9.0, kind="timeout")])
    assert peers(outcome) == ["ranks 0,2: had ended call (passed)"]


def test_an_outcome_without_failures_has_no_peers() -> None:
    assert peers(combine(1, {0: PASSED}, ())) == []


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([0], "rank 0"),
        ([3], "rank 3"),
        ([0, 1], "ranks 0-1"),
        ([0, 2], "ranks 0,2"),
        ([5, 0, 2, 1], "ranks 0-2,5"),
        ([9, 10, 11, 99, 100], "ranks 9-11,99-100"),
    ],
)
def test_ranks_are_reported_as_ranges(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text


def naive_ranks_text(ranks: set[int]) -> str:
    """By membership, rank by rank."""
    parts = []
    for low in range(max(ranks) + 1):
        if low in ranks and low - 1 not in ranks:
            high = low
            while high + 1 in ranks:
                high += 1
            parts.append(f"{low}-{high}" if high > low else f"{low}")
    return ("rank " if len(ranks) == 1 else "ranks ") + ",".join(parts)


@settings(deadline=None)
@given(st.sets(st.integers(0, 40), min_size=1), st.randoms())
def test_ranks_text_agrees_with_a_naive_one_in_any_order(ranks: set[int], random: object) -> None:
    shuffled = list(ranks)
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # a random.Random
    assert ranks_text(shuffled) == naive_ranks_text(ranks)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ValueError: a", "ValueError: a"),
        ("AssertionError: a\nassert 1 == 2\n +  where", "AssertionError: a"),
        ("LawError: loading:\n  rank 0: w\n  rank 1: w", "LawError: loading: rank 0: w"),
        ("E:\n\tone:\n\ttwo\n\tthree", "E: one: two"),
        ("\n\n  text\n", "text"),
        ("", ""),
    ],
)
def test_a_heading_shows_the_first_line_that_says_something(text: str, shown: str) -> None:
    assert first_line(text) == shown


def test_failures_that_differ_in_a_later_line_stay_apart() -> None:
    texts = ["AssertionError: a\nassert 0 == 9", "AssertionError: a\nassert 1 == 9"]
    done = {
        rank: Done("call", "failed", float(rank), 0.0, text=text) for rank, text in enumerate(texts)
    }
    outcome = combine(2, done, ())
    assert [group.ranks for group in outcome.groups] == [(0,), (1,)]
    assert outcome.reason == "rank 0: AssertionError: a"
    assert peers(outcome) == ["rank 1: AssertionError: a, 1.00 s later"]
