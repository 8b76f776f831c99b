"""The supervisor: any history settles in bounded time, with every rank accounted for."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_dcp._harness.protocol.messages import (
    Announce,
    At,
    DebugAnswer,
    DebugAsk,
    DebugDone,
    Done,
    Down,
    Exchange,
    FaultAnswer,
    FaultAsk,
    Go,
    Leave,
    Met,
    Phase,
    Place,
    SubReport,
)
from pytest_dcp._harness.protocol.places import PREPARE_S, REPORT_S
from pytest_dcp._harness.world.rank_states import Action, Continue, KillRank, Send, StopRank
from pytest_dcp._harness.world.requested_deaths import OWED_S
from pytest_dcp._harness.world.supervisor import Supervisor
from pytest_dcp._harness.world.terminal import Terminal
from pytest_dcp._harness.world.timers import CLOSED_S, LOST_S, STACKS_S
from support.supervisor_replay import (
    FAILED,
    GRACE_S,
    LIMIT_S,
    PASSED,
    T0,
    Closes,
    Ends,
    Event,
    Floods,
    Halts,
    Says,
    Strikes,
    hand_over,
)

Intent = Literal[
    "pass", "fail", "meet", "diverge", "debug", "babble", "die", "leave", "close", "flood",
    "announce", "kill", "pause", "resume", "kill next", "pause next", "resume next",
    "prepare", "ready", "report",
]  # fmt: skip
"""A rank's next actions; the meaning of each depends on the rank's state."""


class Witness:
    """Runs fake ranks against a supervisor through any history, keeping books of its own.

    It sees only the messages and the orders, never the supervisor's states.
    """

    def __init__(self, size: int, unkillable: frozenset[int], limit_s: float) -> None:
        self.supervisor = Supervisor(size, grace_s=GRACE_S, terminal=Terminal())
        self.now = T0
        self.unkillable = unkillable
        self.doing = dict.fromkeys(range(size), "running")
        """idle, running, asking, meeting, debugging, debugging and meeting, killed or gone."""
        self.asked: set[int] = set()
        """Ranks whose end or stop was asked for, and that did not go on since."""
        self.stopped: set[int] = set()
        self.halting: list[Halts] = []
        """Effects of signals that the supervisor has not received yet."""
        self.ordered: set[int] = set(range(size))
        """Ranks that owe an answer to this phase."""
        self.paused_s = 0.0
        self.allowed_s = 0.0
        """The most time beyond the limit that ranks may use for announced preparation and
        reports."""
        self.limit_s = limit_s
        self.deadline = T0 + limit_s
        self.supervisor.boot(self.deadline)

    def watch(self, actions: Sequence[Action]) -> None:
        for action in actions:
            state = self.doing[action.rank]
            assert state not in ("killed", "gone"), f"{action} to a rank that is {state}"
            match action:
                case KillRank(rank):
                    self.doing[rank] = "killed"
                case StopRank(rank) | Continue(rank):
                    self.halting.append(Halts(rank, isinstance(action, StopRank)))
                case Send(rank, FaultAnswer()):
                    assert state == "asking"
                    self.doing[rank] = "running"
                case Send(rank, Met()):
                    assert "meeting" in state
                    self.doing[rank] = "debugging" if "debugging" in state else "running"
                case Send(rank, DebugAnswer(granted)):
                    assert not (granted and self.holder is not None), "two have the terminal"
                    self.doing[rank] = "debugging" if granted else "running"
                case Send(rank, _):
                    assert state == "idle"
                    self.doing[rank] = "running"

    @property
    def holder(self) -> int | None:
        """The rank that has the terminal."""
        return next((rank for rank, state in self.doing.items() if "debugging" in state), None)

    def act(self, rank: int, intent: Intent) -> None:
        """Have a rank do something that fits where it is, if anything does."""
        if rank in self.stopped and intent not in ("die", "kill", "resume"):
            return
        target = (rank + 1) % len(self.doing)
        meeting = Exchange("barrier()" if intent == "meet" else "gather()", b"x")
        match self.doing[rank], intent:
            case "killed", "pass" | "fail":  # said before the kill, and still on its way
                self.tell(Says(rank, PASSED if intent == "pass" else FAILED))
            case "killed", "meet" | "diverge":
                self.tell(Says(rank, meeting))
            case "running", "pass" | "fail":
                self.doing[rank] = "idle"
                self.tell(Says(rank, PASSED if intent == "pass" else FAILED))
            case ("running" | "debugging") as state, "meet" | "diverge":
                self.doing[rank] = "meeting" if state == "running" else "debugging and meeting"
                self.tell(Says(rank, meeting))
            case "running", "debug":
                self.tell(Says(rank, DebugAsk("set_trace")))
            case "debugging", "pass" | "fail" | "debug":
                self.doing[rank] = "running"
                self.tell(Says(rank, DebugDone()))
            case (("running" | "debugging"), "prepare" | "ready"):
                self.allowed_s += PREPARE_S
                place: Place = "preparing" if intent == "prepare" else "ready"
                self.tell(Says(rank, At(place, "importing torch")))
            case (("running" | "debugging"), "report"):
                self.allowed_s += REPORT_S
                self.tell(Says(rank, At("reporting", "ValueError: 3", self.now)))
            case _, "babble":
                self.tell(Says(rank, SubReport({})))
            case state, "die" | "leave" if state != "gone":
                self.end(rank, 0 if intent == "leave" else -signal.SIGSEGV)
            case state, "announce" if state not in ("killed", "gone"):
                self.asked.add(rank)
                self.tell(Says(rank, Announce("at save")))
            case state, "kill" | "pause" as wish if state not in ("killed", "gone"):
                self.asked.add(rank)
                self.tell(Strikes(wish, rank))
            case _, "resume":
                self.tell(Strikes("resume", rank))
            case "running", "kill next" | "pause next" | "resume next":
                act = intent.removesuffix(" next")
                if act != "resume" and self.doing[target] not in ("killed", "gone"):
                    self.asked.add(target)
                self.doing[rank] = "asking"
                self.tell(Says(rank, FaultAsk(act, target)))  # type: ignore[arg-type]  # the act
            case _, "close":
                self.tell(Closes(rank))
            case _, "flood":
                self.tell(Floods(rank, 1 << 30))

    def halt(self) -> None:
        """Let the signals that were sent have their effect."""
        halting, self.halting = self.halting, []
        for one in halting:
            if self.doing[one.rank] in ("killed", "gone") or one.rank in self.unkillable:
                continue
            if one.stopped:
                self.stopped.add(one.rank)
            elif one.rank in self.stopped:
                self.stopped.discard(one.rank)
                self.asked.discard(one.rank)
            self.tell(one)

    def end(self, rank: int, status: int) -> None:
        self.doing[rank] = "gone"
        self.stopped.discard(rank)
        self.tell(Ends(rank, status))

    def tell(self, event: Event) -> None:
        self.watch(hand_over(self.supervisor, event, self.now))

    def pass_time(self, seconds: float) -> None:
        self.halt()
        self.now += seconds
        if self.supervisor.paused:
            self.paused_s += seconds
        self.watch(self.supervisor.tick(self.now))

    def begin(self, phase: Phase, order: Down) -> None:
        ranks = [rank for rank, state in self.doing.items() if state == "idle"]
        assert self.supervisor.idle == ranks
        self.ordered = set(ranks)
        self.deadline, self.paused_s = self.now + self.limit_s, 0.0
        self.watch(self.supervisor.begin(phase, dict.fromkeys(ranks, order), self.deadline))

    def wind_up(self) -> None:
        """Deliver the ends of killed ranks and let time pass until all is settled."""
        if self.supervisor.paused:  # the user leaves the debugger: the one wait without a bound
            assert self.holder is not None
            self.end(self.holder, 1)
        for _ in range(100):
            for rank, state in list(self.doing.items()):
                if state == "killed" and rank not in self.unkillable:
                    self.end(rank, -signal.SIGKILL)
            self.halt()
            if self.supervisor.settled:
                if not self.supervisor.deaths.stopped:
                    return
                self.watch(self.supervisor.dismiss(self.now))
                continue
            wake_at = self.supervisor.wake_at()
            assert wake_at < math.inf, "the supervisor waits for ever"
            self.pass_time(max(0.0, wake_at - self.now))
        raise AssertionError("the supervisor is woken without end")

    def check_settled(self) -> None:
        """Each rank of the phase is accounted for, and none is said to be alive that is not."""
        kinds = {(f.rank, f.kind) for f in self.supervisor.failures}
        failed = {rank for rank, _ in kinds}
        lost = self.supervisor.deaths.lost
        assert lost.keys() <= self.asked
        for rank in self.ordered:
            said = rank in self.supervisor.results or rank in failed
            assert said or rank in lost or rank in self.stopped
        for rank, state in self.doing.items():
            assert state in ("idle", "killed", "gone") or rank in self.stopped
            if state == "killed" and rank in self.ordered:
                assert (rank, "lost") in kinds
        assert self.supervisor.busy == []


STEPS_S = st.sampled_from([0.0, 0.015625, STACKS_S, CLOSED_S, GRACE_S, 3.0, LOST_S, 40.0])
TAME: list[Intent] = [
    "pass", "pass", "fail", "meet", "meet", "diverge", "debug", "prepare", "ready", "report",
]  # fmt: skip
WILD: list[Intent] = ["babble", "die", "leave", "close", "flood"]
ASKED: list[Intent] = [
    "announce", "kill", "pause", "resume", "kill next", "pause next", "resume next",
]  # fmt: skip
Step = tuple[int, Intent] | float | Literal["call", "leave", "interrupt", "abandon"]


@dataclass(frozen=True, slots=True)
class History:
    """A drawn history, for a witness to go through."""

    witness: Witness
    steps: list[Step]

    def play(self, after_each: Callable[[Witness], None] = lambda _: None) -> None:
        witness = self.witness
        for step in self.steps:
            match step:
                case float():
                    witness.pass_time(step)
                case "interrupt":
                    witness.watch(witness.supervisor.interrupt(witness.now))
                case "abandon":
                    witness.doing = dict.fromkeys(witness.doing, "gone")
                    witness.supervisor.abandon("the zygote is gone", witness.now)
                case "call" | "leave":
                    witness.halt()
                    if witness.supervisor.settled:
                        witness.watch(witness.supervisor.dismiss(witness.now))
                    if witness.supervisor.settled:
                        witness.check_settled()
                        witness.begin(
                            "call" if step == "call" else "finish",
                            Go("call") if step == "call" else Leave(),
                        )
                case (rank, intent):
                    witness.act(rank % len(witness.doing), intent)
            after_each(witness)


@st.composite
def histories(draw: st.DrawFn) -> History:
    size = draw(st.integers(1, 4))
    unkillable = draw(st.frozensets(st.integers(0, size - 1), max_size=1))
    witness = Witness(size, unkillable, draw(st.sampled_from([5.0, LIMIT_S])))
    ranks = st.integers(0, size - 1)
    tame: st.SearchStrategy[Step] = st.tuples(ranks, st.sampled_from(TAME))
    rest: st.SearchStrategy[Step] = st.one_of(
        STEPS_S,
        st.tuples(ranks, st.sampled_from(WILD)),
        st.tuples(ranks, st.sampled_from(ASKED)),
        st.sampled_from(["call", "leave"]),
    )
    boot: list[Step] = [(rank, "pass") for rank in range(size)]
    opening: list[Step] = [*boot, "call"] if draw(st.booleans()) else []
    drawn = draw(st.lists(st.one_of(*[tame] * 5, rest), min_size=4, max_size=40))
    ends: list[list[Step]] = [[], [], ["interrupt"], ["abandon"]]
    return History(witness, [*opening, *drawn, *draw(st.sampled_from(ends))])


@settings(max_examples=150, deadline=None)
@given(histories())
def test_any_history_settles_in_bounded_time_with_every_rank_accounted_for(
    history: History,
) -> None:
    witness = history.witness
    history.play()
    limit = max(witness.now, witness.deadline + witness.paused_s)
    witness.wind_up()
    # At worst a socket closed just before the limit, then stacks are taken, and then a rank can not
    # be killed; or one lives on after the end that it announced.
    limit += witness.allowed_s
    assert witness.now <= limit + OWED_S + STACKS_S + CLOSED_S + 2 * LOST_S + 0.001
    witness.check_settled()


@settings(max_examples=100, deadline=None)
@given(histories())
def test_in_any_history_nothing_is_left_to_do_at_once_after_a_tick(history: History) -> None:
    def look(witness: Witness) -> None:
        witness.pass_time(0.0)
        assert witness.supervisor.wake_at() > witness.now

    history.play(after_each=look)


@settings(max_examples=100, deadline=None)
@given(histories())
def test_in_any_history_a_rank_that_was_killed_or_died_never_answers_again(
    history: History,
) -> None:
    answered: dict[int, Done] = {}

    def look(witness: Witness) -> None:
        for rank, said in witness.supervisor.results.items():
            assert witness.doing[rank] == "idle" or said is answered.get(rank)
        answered.clear()
        answered.update(witness.supervisor.results)

    history.play(after_each=look)


@settings(max_examples=100, deadline=None)
@given(histories())
def test_in_any_history_no_rank_waits_at_an_exchange_for_a_dead_one(
    history: History,
) -> None:
    def look(witness: Witness) -> None:
        awaited = {s for rank, s in witness.doing.items() if rank not in witness.asked}
        if any("meeting" in state for state in witness.doing.values()):
            assert not {"idle", "killed", "gone"} & awaited
            assert {"running", "asking", "debugging"} & awaited

    history.play(after_each=look)


@settings(max_examples=100, deadline=None)
@given(histories())
def test_in_any_history_time_in_the_debugger_ends_no_rank(history: History) -> None:
    def look(witness: Witness) -> None:
        witness.halt()
        if witness.supervisor.paused:
            before = dict(witness.doing)
            witness.pass_time(1000.0)
            assert witness.doing == before

    history.play(after_each=look)
