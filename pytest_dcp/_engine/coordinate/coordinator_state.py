"""Decides what the coordinator of one operation does: (state, event, now) -> actions.

Pure (no I/O): time is an argument, ranks identify connections, and actions are values
(`coordinator_actions`) that `CoordinatorSide` carries out. The peers' half is `peer_state`. The
tests run both in a simulator of ranks, with random delays, deaths and stops.

Theory of operation. A step is one exchange, and every rank is in the same one.

    peer                                    coordinator
    HELLO        which operation  ------->  joins it, keeps it for later, or turns it away
                                  <-------  WELCOME
    local work                              local work
    VALUE, FAILED or ABORTED      ------->  collects one local result of each rank
                                  <-------  ALERT, at the first failure: busy ranks may stop
                                            combines the values
                                  <-------  RESULT, or the VERDICT that is the same for all
    BYE                           <------>  BYE, and the connection waits for the next operation

The coordinator's phases:

    WORKING      its local work runs. Messages of peers stay in their connections; `overhear` looks
                 at them so that the work can be given up.
    COLLECTING   it waits for the ranks in `missing`. Each of them sends a result or becomes stuck.
    COMBINING    every rank has sent a result and none has failed.
    DELIVERING   the answer is on its way. A peer that does not take it in time is stuck.
    LEAVING      this rank gave the operation up. Peers that join get the verdict.

Rules:

- A step succeeds only when every rank has sent a value in it. Silence is not consent.
- The verdict waits until each rank has sent its result or is stuck, so no rank still writes when
  the others learn that the step failed.
- A rank is stuck when its connection ended, it left, it was silent for the timeout, or it is out of
  step. No further step is then possible: the verdict is final and names the stuck ranks.
- A plain failure is not final. Ranks that only gave up their work for it (an echo) are not named.
- Every wait is bounded: for a missing rank by the timeout since its last message, for a delivery by
  its patience, for a rank that leaves by `PARTING_S`.
- If some rank has not joined, a final verdict is also published in the store: it may join late.
- Ranks whose numbers of the operation differ get a final verdict that begins an epoch. They restart
  their numbers there, so later operations match again.

After a death (`liveness` lists the signs by which ranks notice it):

    of a peer before it joined   noticed by `unjoined_ranks`, else the timeout ends the wait
    of a peer in its work        its connection ends: stuck, the others are alerted, final verdict
    of a peer after its result   the step may still succeed; the next one finds the peer stuck
    of a peer in the delivery    as before: the answer does not change
    of the coordinator           peers see it end, and each of them names it. If it had begun to
                                 send results, some peers may have theirs; they learn of the death
                                 in the next step.

Assumes that each connection keeps its order and loses nothing while it lasts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto

from pytest_dcp._engine.coordinate.admission import Admission, admit, difference
from pytest_dcp._engine.coordinate.coordinator_actions import (
    CombineValues,
    Conclude,
    CoordinatorAction,
    PublishVerdict,
    ReadOn,
    SendAlert,
    SendPing,
    SendResult,
    SendVerdict,
)
from pytest_dcp._engine.coordinate.failure import Cause
from pytest_dcp._engine.coordinate.frame import START, FrameKind, Head
from pytest_dcp._engine.coordinate.hello import Hello
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.operation_order import CallOrder
from pytest_dcp._engine.coordinate.side import PARTING_S
from pytest_dcp._engine.coordinate.step_values import LocalResult, Reduced, Result, StepVerdict

FINAL_S = 2.0
"""How long to wait for peers to take a final verdict; it stays in their sockets anyway."""


class Phase(Enum):
    """Where the coordinator is in a step; see the module."""

    WORKING = auto()
    COLLECTING = auto()
    COMBINING = auto()
    DELIVERING = auto()
    LEAVING = auto()


class CoordinatorState:
    """The coordinator's state of one operation. See the module's docstring for the rules."""

    def __init__(self, context: OperationContext, order: CallOrder) -> None:
        self.context = context
        self.phase = Phase.WORKING
        self.missing: set[int] = set()
        """Ranks that have not sent this step's result, and still can."""
        self.joined: dict[int, None] = {}
        """Peers that are in this operation, in the order in which they joined."""
        self._order = order
        self._head = START
        self._since_s = 0.0
        """When this step's collection began."""
        self._stuck: dict[int, Cause] = {}
        """Ranks with which no further step is possible."""
        self._local_results: dict[int, LocalResult] = {}
        self._alert_text: str | None = None
        """The failure in this step's alert."""
        self._garbled: set[int] = set()
        """Peers whose connections ended because of garbage: they may not know that they joined."""
        self._epochs: set[int] = set()
        """The epochs of peers whose numbers do not match."""
        self._parting: tuple[StepVerdict, float] | None = None
        """The verdict of a rank that leaves, and until when peers may join to get it."""

    @property
    def is_complete(self) -> bool:
        """Whether every peer has joined."""
        return len(self.joined) + 1 == self.context.size

    @property
    def absent(self) -> list[int]:
        """Missing ranks that have not joined."""
        return sorted(self.missing - self.joined.keys())

    # Peers arrive.

    def receive_hello(
        self, hello: Hello, *, has_left: bool, waited_s: float
    ) -> Admission | StepVerdict | None:
        """What to do with a peer that says hello: the verdict on an operation that is over, or None
        to turn away a rank outside of the group.

        has_left: it has left already. waited_s: since it arrived.
        """
        rank, context = hello.rank, self.context
        if not 0 <= rank < context.size or rank == context.rank:
            return None
        late: StepVerdict | None = self._order.find_verdict(hello.epoch, hello.number)
        if late is not None:
            return late
        admission = admit(hello, context.place, self._order, has_left=has_left, waited_s=waited_s)
        # A rank's second connection is never for this operation, which already has one.
        is_second = rank in self.joined and admission is not Admission.STALE
        return Admission.LATER if is_second else admission

    def join(self, hello: Hello, admission: Admission) -> list[CoordinatorAction]:
        """Take a peer into the operation."""
        rank = hello.rank
        self.joined[rank] = None
        actions: list[CoordinatorAction] = []
        # The failure came before this peer did.
        if self._alert_text is not None:
            actions.append(SendAlert((rank,), self._alert_text))
        if admission is Admission.OUT_OF_COUNT:
            self._epochs |= {hello.epoch, self.context.place.epoch}
        if (text := difference(hello, self.context, admission)) is not None:
            actions += self._give_up(self.context.out_of_step(rank, text))
        if self._parting is not None:
            actions.append(SendVerdict((rank,), self._parting[0]))
        return actions

    # A step.

    def begin_step(self, head: Head) -> None:
        """This rank's local work begins."""
        self._head, self.phase = head, Phase.WORKING
        self._alert_text = None

    def collect(self, own: LocalResult, now: float) -> list[CoordinatorAction]:
        """This rank's local work has ended: wait for the others."""
        context = self.context
        self.phase, self._since_s = Phase.COLLECTING, now
        self._local_results = {context.rank: own}
        # A stuck rank has failed every later step already, so no step waits for it.
        self.missing = set(range(context.size)) - {context.rank} - self._stuck.keys()
        return self._alert(own.cause) if own.cause is not None and not own.echo else []

    def hear(
        self, rank: int, kind: FrameKind, head: Head, result: LocalResult | ValueError
    ) -> list[CoordinatorAction]:
        """A peer sends its result, or a ValueError says why that cannot be read."""
        # A failure counts in any step: its sender has given up, wherever it was.
        if kind is not FrameKind.FAILED and head != self._head:
            text = f"is in step {head} where the coordinator is in {self._head}"
            return self._give_up(self.context.out_of_step(rank, text))
        if isinstance(result, ValueError):
            return self._give_up(self.context.out_of_step(rank, f"sent garbage: {result}"))
        self._local_results[rank] = result
        self.missing.discard(rank)
        if result.cause is None:
            return []
        # An echo repeats a failure of which the others have an alert.
        alert = [] if result.echo else self._alert(result.cause)
        return [ReadOn(rank), *alert]

    def lose(
        self, rank: int, *, has_left: bool, end_reason: str | None, garbled: bool = False
    ) -> list[CoordinatorAction]:
        """No more messages will come from a peer: it left, or its connection ended. May be
        repeated.
        """
        if garbled:
            self._garbled.add(rank)
        if rank in self._stuck:
            return []
        result = self._local_results.get(rank)
        # It failed first and ended then: its own failure is the cause, not the lost connection.
        if result is not None and result.cause is not None and not result.echo:
            return self._give_up(result.cause)
        if self.phase is not Phase.COLLECTING:
            return []  # It has sent a value: this step may still succeed, but not the next one.
        step = self._head.name
        if has_left:
            return self._give_up(self.context.left(rank, step))
        return self._give_up(self.context.ended(rank, step, end_reason or ""))

    def look_around(
        self,
        now: float,
        heard_s: Mapping[int, float],
        *,
        end_reasons: Mapping[int, str] | None = None,
        refusal: Cause | None = None,
    ) -> list[CoordinatorAction]:
        """Give up missing ranks that cannot answer any more; called every half second or so.

        heard_s: when each peer last sent something. end_reasons: how absent ranks ended. refusal:
        why a rank takes no part, from the store.
        """
        actions: list[CoordinatorAction] = []
        for rank, how in (end_reasons or {}).items():
            actions += self._give_up(self.context.ended(rank, self._head.name, how))
        if refusal is not None:
            actions += self._give_up(refusal)
        signs = self.context.signs
        for rank in sorted(self.missing):
            if signs.is_silent(now, heard_s=heard_s.get(rank, 0.0), since_s=self._since_s):
                actions += self._give_up(self.context.silent(rank, self._head.name))
        return [*actions, *self._drop_absent()]

    def _drop_absent(self) -> list[CoordinatorAction]:
        """Once a new epoch has begun, stop waiting for absent ranks: they dropped the operation."""
        actions: list[CoordinatorAction] = []
        if self.context.size > 1 and self._order.is_dropped(self.context.place):
            for rank in self.absent:
                text = f"went out of step before it came to {self.context.operation}"
                actions += self._give_up(self.context.out_of_step(rank, text))
        return actions

    def ping(self, now: float, said_s: Mapping[int, float]) -> list[CoordinatorAction]:
        """Show peers that this rank is alive; said_s: when it last sent something to each."""
        must_ping = self.context.signs.must_ping
        return [SendPing(rank) for rank, at_s in said_s.items() if must_ping(now, said_s=at_s)]

    def conclude(self) -> list[CoordinatorAction]:
        """All received messages are handled and no rank is missing: combine, or fail."""
        # Not only failed results: a stuck rank fails the step even if its value is here.
        if causes := self._causes():
            return self._fail_step(causes)
        self.phase = Phase.COMBINING
        results = self._local_results
        return [CombineValues([results[rank].payload for rank in range(self.context.size)])]

    def combine(self, reduced: Reduced | Cause) -> list[CoordinatorAction]:
        """The values are combined, or that failed; fail too if a peer gave up meanwhile."""
        if isinstance(reduced, Cause):
            return self._fail_step([reduced])
        if causes := self._causes():
            return self._fail_step(causes)
        self.phase = Phase.DELIVERING
        finish = Conclude(Result(value=reduced.own), self.context.timeout_s)
        # One payload for all ranks is encoded once; own payloads need one frame each.
        if not reduced.apart:
            return [SendResult(tuple(self.joined), reduced.shared), finish]
        return [*(SendResult((rank,), reduced.payload(rank)) for rank in self.joined), finish]

    def note_undelivered(self, ranks: Iterable[int]) -> None:
        """Peers have not taken the answer in time: they are stuck in the next step."""
        for rank in ranks:
            self._stuck.setdefault(rank, self.context.silent(rank, self._head.name))

    # Failures.

    def overhear(
        self, rank: int, reported_cause: Cause | None, *, over: bool, end_reason: str | None
    ) -> tuple[str | None, list[CoordinatorAction]]:
        """While this rank works: the failure of a peer, in one line, and what to do about it.

        reported_cause: the failure that the peer reported. over, end_reason: whether and how its
        connection ended.
        """
        cause = self._stuck.get(rank) or reported_cause
        if cause is None and over:
            cause = self.context.ended(rank, "its work", end_reason or "it left")
        return (None, []) if cause is None else (cause.summary(), self._alert(cause))

    def _give_up(self, cause: Cause) -> list[CoordinatorAction]:
        self._stuck.setdefault(cause.rank, cause)
        self.missing.discard(cause.rank)
        return self._alert(cause)

    def _alert(self, cause: Cause) -> list[CoordinatorAction]:
        """Tell the ranks that are still busy, once per step."""
        if self._alert_text is not None:
            return []
        self._alert_text = cause.summary()
        return [SendAlert(tuple(self.joined), self._alert_text)]

    def _causes(self) -> list[Cause]:
        """Why the step failed, one cause per rank; echoes only if there is no other cause."""
        stated = [result for result in self._local_results.values() if result.cause is not None]
        own_causes = [
            result.cause for result in stated if result.cause is not None and not result.echo
        ]
        # Peers that gave up on this rank name it in their causes.
        found = {cause.rank: cause for cause in own_causes} | self._stuck
        causes = [cause for _, cause in sorted(found.items())]
        return causes or [result.cause for result in stated if result.cause is not None]

    def _fail_step(self, causes: Sequence[Cause]) -> list[CoordinatorAction]:
        self.phase = Phase.DELIVERING
        final = bool(self._stuck)
        verdict = self._make_verdict(causes, final=final)
        if verdict.epoch:
            self._order.restart(verdict.epoch, causes)
        actions: list[CoordinatorAction] = []
        # For peers that cannot get it by a connection: absent ones, and ones whose connection broke
        # before they could see that they had joined.
        if final and (self._garbled or not self.is_complete):
            actions.append(PublishVerdict(verdict))
        # After a final verdict no step follows for which a peer must have taken it.
        patience_s = FINAL_S if final else self.context.timeout_s
        return [*actions, SendVerdict(tuple(self.joined), verdict), Conclude(verdict, patience_s)]

    def _make_verdict(self, causes: Sequence[Cause], *, final: bool) -> StepVerdict:
        """The verdict; it begins an epoch if the ranks' numbers do not match."""
        epoch = 1 + max(self._epochs) if self._epochs else 0
        return StepVerdict(self._head.name, causes, final, epoch)

    # This rank leaves.

    def leave(self, head: Head, cause: Cause, now: float) -> list[CoordinatorAction]:
        """Give the operation up. `end_parting` follows, when `is_parting` no longer holds."""
        self._head, self.phase = head, Phase.LEAVING
        verdict = self._make_verdict([cause], final=True)
        # Before the first step peers may arrive at any time: publish the verdict for them.
        self._parting = verdict, now + (PARTING_S if head.number else 0.0)
        return [SendVerdict(tuple(self.joined), verdict)]

    def is_parting(self, now: float, *, sending: bool) -> bool:
        """Whether to wait for late peers, or for bytes that peers have not taken (`sending`)."""
        if self._parting is None or now > self._parting[1]:
            return False
        return sending or not self.is_complete

    def end_parting(self) -> list[CoordinatorAction]:
        """Leave the verdict in the store for peers that have not joined."""
        if self._parting is None or self.is_complete:
            return []
        verdict = self._make_verdict(self._parting[0].causes, final=True)
        self._order.note_left(self.context.place, verdict)
        return [PublishVerdict(verdict)]
