"""Decides what a peer of one operation does: (state, event, now) -> actions.

Pure (no I/O), as `coordinator_state`, whose docstring lists the messages of a step. `PeerSide`
carries the actions out.

Theory of operation. A peer says HELLO before its first step's work, so that the coordinator sees it
end from then on. In each step it sends its local result once over its connection and waits:

- Nothing counts before the WELCOME, which proves that the coordinator is on the other end.
- If the connection ends before the WELCOME, strangers crowded it out: the peer says HELLO again on
  a new one, with its local result, until the time limit for a silent coordinator.
- If the connection ends after the WELCOME, or a BYE arrives, no further step is possible. The peer
  names the coordinator, and sends it that cause, in case it goes on.
- The peer gives up a coordinator that is silent for the timeout and a margin. The margin lets the
  coordinator's verdict arrive first: it says more.
- A peer without a WELCOME looks in the store for a verdict that the coordinator left for late
  peers, and checks whether this process began a new epoch.

Received messages are always handled before any of these decisions: an answer that waits in the
connection counts, however late this rank looks.
"""

from __future__ import annotations

from dataclasses import dataclass

from pytest_dcp._engine.coordinate.failure import Cause
from pytest_dcp._engine.coordinate.frame import START, FrameKind, Head, alert_text
from pytest_dcp._engine.coordinate.hello import Hello
from pytest_dcp._engine.coordinate.liveness import SignsOfLife
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.operation_order import CallOrder
from pytest_dcp._engine.coordinate.payload import Payload
from pytest_dcp._engine.coordinate.step_values import LocalResult, Result, StepVerdict

AGAIN_S = 0.2
"""Pause between two attempts to join a coordinator that strangers crowd."""
WORD_S = 0.5
"""How often a peer without a WELCOME looks for a verdict that the coordinator left."""


@dataclass(frozen=True, slots=True)
class LinkState:
    """The state of the connection to the coordinator."""

    heard_s: float
    """When bytes last came."""
    has_left: bool = False
    """Whether the coordinator has left the operation."""
    end_reason: str | None = None
    """How the connection ended."""
    garbled: bool = False
    """Whether it ended because the other end misbehaves."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The step ends with an outcome."""

    outcome: Result | StepVerdict
    farewell: LocalResult | None = None
    """A message to the coordinator in case it goes on."""
    distrust: str | None = None
    """Why the connection must not be used again."""


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Say HELLO on a new connection, not before a time; `note_reconnect` follows."""

    not_before_s: float


@dataclass(frozen=True, slots=True)
class LookForVerdict:
    """Look in the store for the verdict that the coordinator left."""


@dataclass(frozen=True, slots=True)
class ExplainEnd:
    """The connection has ended: find out how the process did; `end_step` follows."""

    how: str


PeerAction = Finish | Reconnect | LookForVerdict | ExplainEnd


class PeerState:
    """A peer's state of one operation. See the module's docstring for the rules."""

    def __init__(self, context: OperationContext, order: CallOrder, now: float) -> None:
        self.context = context
        self.is_welcome = False
        """Whether the coordinator has proved its identity, and let this rank join."""
        self._order = order
        self._head = START
        self._since_s = now
        """When this step's wait began."""
        self._met_s = now
        """When this rank last tried to say hello."""
        self._looked_s = now
        """When it last looked for a verdict in the store."""
        self._reconnects = True
        """Whether a new connection may help."""

    def make_hello(self, group_key: str, now: float) -> Hello:
        """The HELLO for a new connection."""
        self._met_s = now
        context, place = self.context, self.context.place
        return Hello(
            group_key,
            context.operation,
            place.number,
            context.rank,
            place.epoch,
            self._order.finished_up_to(),
            place.unordered,
            None if place.subject is None else (place.subject.name, place.subject.real),
        )

    def begin_wait(self, head: Head, now: float) -> None:
        """The local result of a step is on its way."""
        self._head, self._since_s = head, now
        self._reconnects = True

    @property
    def _patience_s(self) -> float:
        return self.context.timeout_s + self.context.signs.margin_s

    # Messages.

    def hear_welcome(self, *, is_proof: bool) -> None:
        """The coordinator's first message arrived; is_proof: only the coordinator can send it."""
        self.is_welcome = is_proof

    def hear(
        self, kind: FrameKind, head: Head, body: Payload | StepVerdict | ValueError
    ) -> Finish | None:
        """A message of the coordinator, or the ValueError that says why it cannot be read."""
        context = self.context
        if not self.is_welcome:
            text = "did not show that it is the coordinator"
            verdict = self._verdict(context.out_of_step(context.coordinator, text))
            return Finish(verdict, distrust=f"it {text}")
        if isinstance(body, StepVerdict):
            return Finish(self.accept_verdict(body))
        if isinstance(body, ValueError):
            text = f"sent garbage: {body}"
            return Finish(self._verdict(context.out_of_step(context.coordinator, text)))
        if kind is FrameKind.RESULT and head == self._head:
            return Finish(Result(body))
        if kind is FrameKind.ALERT:
            return None
        text = f"answered step {head} with {kind.name} where {self._head} was run"
        return Finish(self._verdict(context.out_of_step(context.coordinator, text)))

    def overhear(self, kind: FrameKind, body: Payload | StepVerdict | ValueError) -> str | None:
        """While this rank works: the failure that a message reports, in one line."""
        if not self.is_welcome:
            return None
        if isinstance(body, StepVerdict):
            return body.summary()
        if kind is not FrameKind.ALERT or isinstance(body, ValueError):
            return None
        return alert_text(body)

    def accept_verdict(self, verdict: StepVerdict) -> StepVerdict:
        """Take the coordinator's verdict; it may begin an epoch."""
        if verdict.epoch:
            self._order.restart(verdict.epoch, verdict.causes)
        return verdict

    # Waiting.

    @property
    def can_reconnect(self) -> bool:
        """Whether a new connection was made, or may still be made."""
        return self._reconnects

    def decide(self, now: float, link: LinkState) -> PeerAction | None:
        """What to do when no message is left to handle; None: wait."""
        if (reconnect := self._find_reconnect(now, link, self._since_s)) is not None:
            return reconnect
        context, step = self.context, self._head.name
        if link.has_left:
            return self._lose(context.left(context.coordinator, step))
        if link.end_reason is not None:
            return ExplainEnd(link.end_reason)
        signs = SignsOfLife(self._patience_s)
        if signs.is_silent(now, heard_s=link.heard_s, since_s=self._since_s):
            return self._lose(context.silent(context.coordinator, step))
        if self._must_look(now):
            return LookForVerdict()
        # Another operation's verdict began an epoch: this one, not yet begun, fails with its
        # causes.
        if not self.is_welcome and self._order.is_dropped(context.place):
            return Finish(StepVerdict(step, self._order.causes, final=True))
        return None

    def decide_at_work(self, now: float, link: LinkState) -> PeerAction | None:
        """As `decide`, while the local work runs. An end is only explained: the step handles it."""
        if self._must_look(now):
            return LookForVerdict()
        return self._find_reconnect(now, link, now)

    def note_reconnect(self, now: float, *, is_of_use: bool) -> None:
        """A new connection was tried; is_of_use: it was made, or another attempt may make it."""
        self._met_s, self._reconnects = now, is_of_use

    def end_step(self, how: str) -> Finish:
        """The coordinator's process ended."""
        context = self.context
        return self._lose(context.ended(context.coordinator, self._head.name, how))

    def _find_reconnect(self, now: float, link: LinkState, since_s: float) -> Reconnect | None:
        if self.is_welcome or link.end_reason is None or link.garbled or not self._reconnects:
            return None
        late = now - since_s > self._patience_s
        return None if late else Reconnect(self._met_s + AGAIN_S)

    def _must_look(self, now: float) -> bool:
        if self.is_welcome or now - self._looked_s < WORD_S:
            return False
        # Only before the welcome: afterwards verdicts come over the connection.
        self._looked_s = now
        return True

    def _lose(self, lost: Cause) -> Finish:
        # All peers report the same about the coordinator, and send it the cause, should it go on.
        return Finish(self._verdict(lost), farewell=LocalResult(cause=lost))

    def _verdict(self, cause: Cause) -> StepVerdict:
        return StepVerdict(self._head.name, [cause], final=True)
