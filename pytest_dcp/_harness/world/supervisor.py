"""Decides what to do with a world's ranks: (state, event, now) -> actions.

Pure (no I/O): time is an argument, and actions are values that `rank_loop.RankLoop` carries out.
Enters: the ranks' messages and the ends of their processes. Leaves: replies, requests for stacks,
kills, and at last a result of every rank: a `Done`, a `RankFailure`, or a `LostRank` if its end was
requested.

The life of a world is a series of phases: boot, then setup, call and teardown of each test item,
and finally finish. In each phase every rank gets one order and must send one `Done`. A rank's
states:

    launched -> RUNNING <--Go-- IDLE --Leave--> LEAVING --exit code 0--> GONE
                RUNNING --Done-> IDLE           (says Done("finish") before it exits)
                RUNNING --Exchange--> MEETING --Met--> RUNNING
                RUNNING --DebugAsk--> DEBUGGING --DebugDone--> RUNNING
                any living state --our SIGKILL--> KILLED --exit--> GONE
                any living state --exit--> GONE

The messages (`rank_states.TRANSITIONS` and `refusals` have the exact table):

- `Go`, `Leave`: from the supervisor to an idle rank, which begins a phase. The answer is `Done`.
- `Exchange`: from a rank within a phase: "I wait for my peers." All waiting ranks get one `Met`:
  when every rank that may still come has come, or at once if one will never come.
- `At`: from a rank within a phase: it prepares, reports an error, or waits with an error. No
  answer. Such a rank does not hang, and other clocks apply to it (see `places`).
- `DebugAsk`, `DebugDone`: a rank requests the terminal, and returns it. One rank at a time has it;
  meanwhile all clocks stand still.
- `FaultAsk`: a rank requests that another be killed, stopped or continued; the answer comes when
  that has happened. `Announce`: a rank is about to end itself. No answer.

A message that the rank cannot have sent in its state ends the rank: other code wrote to its socket.

The clocks, in the order in which they run out after a failure (see `timers`):

1. A rank fails: it reports an error, it dies, or the phase's deadline passes. Its peers may be
   stuck in a collective that will never end. After a failure they get `grace_s`; after the
   deadline, no time.
2. The ranks that have not answered are asked for their stacks (`Dump`), and get `STACKS_S`.
3. They are killed (`KillRank`), each with a failure that says where it was.
4. The kernel gets `LOST_S` to end a killed process. After that the supervisor gives it up.

The meaning of a process's end depends on the rank's state:

    requested by the test       a LostRank, no failure; exchanges go on without it
    KILLED                      nothing more: the failure was recorded with the kill
    LEAVING, Done, code 0       a normal end
    LEAVING otherwise           crashed: its exit did not finish, or failed after its verdict
    IDLE                        crashed, after the phase
    inside a phase              crashed, in the phase, without a verdict

A rank that was to be stopped, and dies first, has crashed too. If a process closes its socket and
lives, the supervisor waits `CLOSED_S` for its exit, which shows the real cause; then it kills the
process.

Further rules:

- A rank that the test has stopped does not delay the others. Once all others have answered, no rank
  is left to continue it, and the supervisor ends it (`dismiss`).
- A leaving rank reports that its exit ran to the end. Exit code 0 without this report is a failure:
  a handler or a thread may have called `os._exit(0)` earlier.
- An interrupt of the session cuts a phase off: ranks get a bounded time to end it; see
  `interrupt_clock`.

Assumes that `tick` is called no later than `wake_at` says, that it receives a rank's messages
before its exit, and that time does not run backwards. Guarantees a result for every rank that was
given an order, in bounded time: it answers, dies, or is killed. Only the wait for a user at the
debugger's prompt has no bound.
"""

from __future__ import annotations

from pytest_dcp._harness.protocol.messages import (
    Announce,
    At,
    DebugAsk,
    DebugDone,
    Done,
    Down,
    Exchange,
    FaultAct,
    FaultAsk,
    Go,
    Leave,
    Met,
    Phase,
    Up,
)
from pytest_dcp._harness.world import exchange
from pytest_dcp._harness.world.rank_states import (
    BUSY,
    HAS_TERMINAL,
    TRANSITIONS,
    Action,
    Continue,
    Dump,
    Interrupt,
    KillRank,
    Send,
    StopRank,
    exit_text,
    when_text,
)
from pytest_dcp._harness.world.rank_states import RankState as S
from pytest_dcp._harness.world.refusals import RankTurn, refusal
from pytest_dcp._harness.world.requested_deaths import Deaths, Wish
from pytest_dcp._harness.world.terminal import Terminal
from pytest_dcp._harness.world.timers import LOST_S, Timers
from pytest_dcp.errors import FailureKind, RankFailure


class Supervisor:
    """The state of one world's ranks. See the module's docstring for the rules."""

    def __init__(self, size: int, *, grace_s: float, terminal: Terminal) -> None:
        self.size = size
        self.terminal = terminal
        self.states = dict.fromkeys(range(size), S.RUNNING)
        self.phase: Phase = "boot"
        self.results: dict[int, Done] = {}
        self.failures: list[RankFailure] = []
        self.deaths = Deaths(size)
        self._meeting: dict[int, Exchange] = {}
        self._timers = Timers(grace_s)

    # Requests of the world.

    @property
    def busy(self) -> list[int]:
        """Ranks that must answer, and can."""
        stopped = self.deaths.stopped
        return [
            rank for rank, state in self.states.items() if state in BUSY and rank not in stopped
        ]

    @property
    def settled(self) -> bool:
        """Whether every rank has answered, has ended, or is stopped as requested."""
        return not (self.busy or S.KILLED in self.states.values() or self.deaths.owing)

    @property
    def all_ranks_alive(self) -> bool:
        """Whether every rank is alive and none failed in this phase."""
        return not self.failures and S.GONE not in self.states.values()

    @property
    def gone_ranks(self) -> list[int]:
        """Ranks without a process."""
        return [rank for rank, state in self.states.items() if state is S.GONE]

    @property
    def idle(self) -> list[int]:
        """Ranks that wait for an order."""
        return [rank for rank, state in self.states.items() if state is S.IDLE]

    @property
    def paused(self) -> bool:
        """Whether a rank has the terminal, and so the clocks stand still."""
        return self._timers.paused

    @property
    def deadline(self) -> float:
        """The phase's deadline, postponed by the time for which a debugger had the terminal."""
        return self._timers.deadline

    @property
    def prepared_too_long(self) -> bool:
        """Whether ranks have used up the time to prepare the phase."""
        return self._timers.prepared_too_long

    def wake_at(self) -> float:
        """When `tick` must be called if no event comes first; inf: never."""
        return self._timers.wake_at(busy=bool(self.busy), deaths_due_at=self.deaths.due_at())

    # Events from the world.

    def boot(self, deadline: float, now: float = 0.0, preparing: str = "") -> None:
        """All ranks were started; each must send `Done("boot")` before `deadline`.

        preparing: the step that each does first, with the clock stopped; empty: none.
        """
        self._timers.deadline = deadline
        if preparing:
            self._timers.places.begin(self.states, preparing, now)

    def begin(self, phase: Phase, orders: dict[int, Down], deadline: float) -> list[Action]:
        """Start a phase on the ranks of `orders`, which must be idle."""
        self.phase = phase
        self.results = {}
        self.failures = []
        self._meeting = {}
        self._timers.begin_phase(deadline)
        for rank, order in orders.items():
            kind = Leave if isinstance(order, Leave) else Go
            self.states[rank] = TRANSITIONS[self.states[rank], kind]
        return [Send(rank, order) for rank, order in orders.items()]

    def hear(self, rank: int, message: Up, now: float) -> list[Action]:
        """A rank sent a message."""
        state = self.states[rank]
        # Sent before our SIGKILL arrived: the failure recorded with the kill must not change.
        if state in (S.KILLED, S.GONE):
            return []
        if isinstance(message, Announce):  # from any thread, at any time
            self.deaths.wishes[rank] = Wish("announced", message.reason, self._timers.clock(now))
            return self._meet()
        is_cut_off = self._timers.interruption.is_on
        turn = RankTurn(state, self.phase, rank in self.results, is_cut_off)
        if text := refusal(message, turn, self.size):
            return self._kill(rank, "closed", text, now)
        # Assumes that `refusal` lets only messages pass that the table has for this state.
        self.states[rank] = TRANSITIONS[state, type(message)]
        match message:
            case At("interrupted"):
                self._timers.interruption.see_interrupted(rank)
            case At():
                self._timers.move_place(rank, message, now)
            case Done():
                self._take_answer(rank, message, now)
            case Exchange():
                self._meeting[rank] = message
            case DebugAsk():
                return self._answer_debug_request(rank, now)
            case DebugDone():
                self._resume(now)
            case FaultAsk():
                self.deaths.ask(rank, message)
                why = f"world.{message.act}({message.rank}) in rank {rank}"
                return [
                    *self.apply_fault(message.act, message.rank, why, now),
                    *self._answer_requests(),
                ]
        return self._meet()

    def apply_fault(self, act: FaultAct, rank: int, why: str, now: float) -> list[Action]:
        """Kill, stop or continue a rank at the test's request."""
        if self.states[rank] in (S.KILLED, S.GONE):
            return []
        deaths = self.deaths
        match act:
            case "kill":
                deaths.wishes[rank] = Wish("kill", why, self._timers.clock(now))
                return [*self._end(rank, now), *self._meet()]
            # The first request counts: a rank that is to be killed is not stopped as well.
            case "pause" if rank not in deaths.wishes:
                deaths.wishes[rank] = Wish("pause", why, self._timers.clock(now))
                return [StopRank(rank), *self._meet()]
            case "resume" if rank in deaths.wishes:
                # If it has not stopped yet, `see_stop_change` continues it as soon as it has.
                deaths.resuming.add(rank)
                return [Continue(rank)] if rank in deaths.stopped else []
        return []

    def see_stop_change(self, rank: int, now: float, *, stopped: bool) -> list[Action]:
        """A rank's process was stopped, or goes on after a stop."""
        if self.states[rank] in (S.KILLED, S.GONE):
            return []
        self.deaths.see_stop_change(rank, stopped=stopped)
        again: list[Action] = [Continue(rank)] if rank in self.deaths.resuming else []
        return [*again, *self._meet(), *self._answer_requests()]

    def dismiss(self, now: float) -> list[Action]:
        """End the ranks that the test stopped: no rank is left to continue them."""
        return [
            action
            for rank in sorted(self.deaths.stopped)
            if self.states[rank] not in (S.KILLED, S.GONE)
            for action in self._end(rank, now)
        ]

    def give_up(self, now: float) -> list[Action]:
        """End the ranks that have not answered: the world no longer waits for them."""
        text = f"still in {self.phase}"
        return [a for rank in self.busy for a in self._kill(rank, "blocked", text, now)]

    def see_failure_elsewhere(self, now: float) -> None:
        """A rank of another world has failed, for which these may wait: they get the grace."""
        self._timers.end_soon(now)

    def await_survivors(self) -> None:
        """A failing rank does not shorten the time of its peers: the test expects it."""
        self._timers.grace_s = float("inf")

    def see_exit(self, rank: int, status: int, now: float, how: str = "") -> list[Action]:
        """A rank's process ended; `status` is negative for a signal.

        how: in words, if the status cannot be known.
        """
        state = self.states[rank]
        # Read first: leaving its place forgets the error.
        raised = self._timers.places.error_of(rank)
        self._timers.leave_place(rank, now)
        self._timers.forget_closed(rank)
        self._meeting.pop(rank, None)
        self.states[rank] = S.GONE
        # One clock serves all killed ranks: it stops with the last of them.
        if S.KILLED not in self.states.values():
            self._timers.end_deaths()
        if state in HAS_TERMINAL:
            self._resume(now)
        as_asked = self.deaths.see_end(rank, exit_text(status))
        has_left = state is S.LEAVING and status == 0 and rank in self.results
        # A killed rank's failure was noted with the kill; a rank that is gone was given up before.
        if as_asked or state in (S.KILLED, S.GONE) or has_left:
            return [*self._meet(), *self._answer_requests()]
        text = f"{how or exit_text(status)}{when_text(state, status, self.phase)}"
        if raised is not None:
            text += f"; it had raised {raised.text}"
        self._fail(RankFailure(rank, "crashed", self.phase, now, text), now)
        return [*self._meet(), *self._answer_requests()]

    def see_close(self, rank: int, now: float, *, exiting: bool = False) -> list[Action]:
        """A rank's report socket reached its end; most often its exit follows at once.

        `exiting`: it is known to follow.
        """
        if self.states[rank] not in (S.KILLED, S.GONE, S.LEAVING):
            if self.states[rank] in HAS_TERMINAL:  # it cannot give it back now
                self._resume(now)
            # No failure yet: the exit that follows names the cause, such as a signal.
            self._timers.close(rank, now, exiting=exiting)
        return []

    def refuse(self, rank: int, text: str, now: float) -> list[Action]:
        """A rank sent bytes that are not its own message, or cannot receive messages."""
        return self._kill(rank, "closed", text, now)

    def see_flood(self, rank: int, size_bytes: int, now: float) -> list[Action]:
        """A rank's captured output passed the limit."""
        if self.states[rank] in (S.KILLED, S.GONE):
            return []
        text = f"printed {size_bytes} bytes in {self.phase}, more than the limit"
        return self._kill(rank, "flooded", text, now)

    def cut_off(self, now: float) -> list[Action]:
        """The session cuts the phase off: have its ranks end it, in bounded time.

        A rank with the terminal is killed: its clock stands still.
        """
        at_prompt = [rank for rank in self.busy if self.states[rank] in HAS_TERMINAL]
        text = f"stopped in {self.phase}, in a debugger"
        killed = [a for rank in at_prompt for a in self._kill(rank, "blocked", text, now)]
        self._timers.cut_off(self.phase, now)
        return [*killed, *self._interrupt(now)]

    def see_work(self, rank: int, now: float) -> None:
        """The rank is working: if the phase is cut off, it may still receive the interrupt."""
        self._timers.interruption.see_work(rank, now)

    def _interrupt(self, now: float) -> list[Action]:
        if not self._timers.interruption.take_due(now):
            return []
        return [Interrupt(rank) for rank in self.busy]

    def interrupt(self, now: float) -> list[Action]:
        """Kill everything now: the session is being stopped."""
        return [a for rank in self.states for a in self._kill(rank, "blocked", "stopped", now)]

    def abandon(self, text: str, now: float) -> None:
        """The launcher has ended, and the ranks with it."""
        for rank, state in self.states.items():
            if state is not S.GONE:
                self.states[rank] = S.GONE
                self.failures.append(RankFailure(rank, "lost", self.phase, now, text))
        self._meeting.clear()
        self.deaths = Deaths(self.size, lost=self.deaths.lost)
        self._timers.stop()

    def tick(self, now: float) -> list[Action]:
        """Actions due by now."""
        timers = self._timers
        # A user reads at the prompt: meanwhile no rank may be killed.
        if timers.paused:
            return []
        actions = self._interrupt(now)
        for rank in timers.closed_due(now):
            text = f"closed its report socket in {self.phase}, and lives"
            actions += self._kill(rank, "closed", text, now)
        timers.check_limits(now, busy=bool(self.busy))
        if timers.take_stacks_due(now):
            # A stopped rank cannot write its stacks, and its peers are about to be killed.
            actions += [*self.dismiss(now), *self._ask_for_stacks(now)]
        if timers.take_kill_due(now):
            actions += self._reap(now)
        for rank in self.deaths.overdue(now):
            wish = self.deaths.wishes[rank]
            text = f"lives on after its end was asked for: {wish.why}"
            actions += self._kill(rank, "spared", text, now)
        if timers.take_lost_due(now):
            self._give_up_killed(now)
        return actions

    # Inside.

    def _take_answer(self, rank: int, result: Done, now: float) -> None:
        """A rank has ended the phase."""
        self._timers.leave_place(rank, now)
        self._meeting.pop(rank, None)
        self.deaths.silence(rank)
        self.results[rank] = result
        if result.outcome == "failed":
            echo = result.is_echo
            failure = RankFailure(rank, "failed", self.phase, result.at_s, result.text, "", echo)
            self._fail(failure, now)
        # No failure, but peers may wait in a collective for this rank, which has left it.
        elif result.outcome in ("exit", "interrupt"):
            self._timers.end_soon(now)

    def _ask_for_stacks(self, now: float) -> list[Action]:
        spared_until = self._timers.spared_until
        return [Dump(rank) for rank in self.busy if now >= spared_until(rank, self.states[rank])]

    def _give_up_killed(self, now: float) -> None:
        """Give up the ranks that were killed and have not ended in time."""
        for rank, state in self.states.items():
            if state is S.KILLED:
                self.states[rank] = S.GONE
                # Even if its end was requested: a process that outlives SIGKILL is a failure.
                self.deaths.forgive(rank)
                text = f"did not go away within {LOST_S:g} s of SIGKILL"
                self._fail(RankFailure(rank, "lost", self.phase, now, text), now)

    def _reap(self, now: float) -> list[Action]:
        timers, actions = self._timers, list[Action]()
        for rank in self.busy:
            kind: FailureKind = "timeout" if timers.timed_out else "blocked"
            raised = timers.places.error_of(rank)
            if now < (until := timers.spared_until(rank, self.states[rank])):
                # It writes its report, or ends its phase after an interrupt: look again then.
                timers.spare(until)
            elif raised is not None and self.states[rank] in (S.RUNNING, S.MEETING):
                # The error that it was about to report is the failure; the kill is a detail of it.
                did = timers.describe_report(failing=raised.place == "failing")
                text = f"{raised.text} (killed: {did})"
                actions += self._kill(rank, "failed", text, now, raised)
            else:
                where = timers.places.describe(rank, self.phase)
                text = f"still {where}{timers.interruption.describe(now)}"
                actions += self._kill(rank, kind, text, now)
        return actions

    def _fail(self, failure: RankFailure, now: float) -> None:
        self.failures.append(failure)
        self._timers.end_soon(now)

    def _kill(
        self, rank: int, kind: FailureKind, text: str, now: float, raised: At | None = None
    ) -> list[Action]:
        if self.states[rank] in (S.KILLED, S.GONE):
            return []
        # From here on we end it, not the test's request.
        self.deaths.forgive(rank)
        actions = self._end(rank, now)
        at_s, detail = (now, "") if raised is None else (raised.at_s, raised.detail)
        self._fail(RankFailure(rank, kind, self.phase, at_s, text, detail), now)
        return [*actions, *self._meet()]

    def _end(self, rank: int, now: float) -> list[Action]:
        # Before anything is timed: while a rank has the terminal the clocks stand still.
        if self.states[rank] in HAS_TERMINAL:
            self._resume(now)
        self._timers.leave_place(rank, now)
        self._timers.forget_closed(rank)
        self._meeting.pop(rank, None)
        self.deaths.silence(rank)
        self.states[rank] = S.KILLED
        self._timers.await_death(now)
        return [KillRank(rank)]

    def _answer_debug_request(self, rank: int, now: float) -> list[Action]:
        answer = self.terminal.answer(rank)
        if answer.granted:
            self._timers.pause(now)
        else:
            # Refused; the answer says why, and the rank goes on without a prompt.
            self.states[rank] = S.RUNNING
        return [Send(rank, answer)]

    def _resume(self, now: float) -> None:
        if self._timers.paused:
            self.deaths.postpone(self._timers.resume(now))

    def _meet(self) -> list[Action]:
        """Answer the ranks at an exchange, once all have come or one will never come."""
        if not self._meeting:
            return []
        # An exchange goes on without the ranks that the test ended: the test expects that.
        excused = self.deaths.wishes.keys() | self.deaths.lost.keys()
        how = {failure.rank: failure.summary for failure in self.failures}
        # Ranks that will never come to this exchange.
        absent = {
            rank: how.get(rank, f"ended {self.phase}")
            for rank, state in self.states.items()
            if state in (S.IDLE, S.GONE, S.KILLED, S.LEAVING) and rank not in excused
        }
        answer = exchange.answer(self._meeting, self.size, excused, absent)
        if answer is None:
            return []
        present, self._meeting = list(self._meeting), {}
        for rank in present:
            self.states[rank] = TRANSITIONS[self.states[rank], Met]
        return [Send(rank, answer) for rank in present]

    def _answer_requests(self) -> list[Action]:
        """Answers to the ranks whose requested fault has happened."""
        return [Send(rank, answer) for rank, answer in self.deaths.answers(self.gone_ranks)]
