"""The ranks of a process group, running the steps of one operation together.

In a step each rank does its local work, then all ranks get its result, or all raise the same
`StepError`: a rank raised an exception, died, was silent for the group's timeout, or ran another
step. Messages go through the coordinator; the group itself serves only to exchange addresses (see
rendezvous), so an operation may run in a thread beside the user's collectives.

After a plain failure of a step the team can go on, and so can the next team of the group. If a rank
is missing or out of step the team is over: each further step fails with the same causes.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pytest_dcp._engine.coordinate.byte_exchange import ByteExchange
from pytest_dcp._engine.coordinate.coordinator_side import CoordinatorSide
from pytest_dcp._engine.coordinate.failure import (
    CoordinationError,
    PeerAborted,
    StepError,
    capture,
    is_echo,
    step_error,
)
from pytest_dcp._engine.coordinate.frame import START, Head, Mode
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.operation_order import (
    CallOrder,
    OperationPlace,
    wait_for_turn,
)
from pytest_dcp._engine.coordinate.payload import Payload, Segment, bundle, unbundle
from pytest_dcp._engine.coordinate.peer_side import PeerSide
from pytest_dcp._engine.coordinate.side import Side
from pytest_dcp._engine.coordinate.step_values import LocalResult, Reduced, Result, StepVerdict
from pytest_dcp._engine.coordinate.wire import pack, unpack

if TYPE_CHECKING:  # Self is in `typing` from Python 3.11 on
    from typing_extensions import Self

T = TypeVar("T")
R = TypeVar("R")

CHECK_S = 0.25
"""`check` looks at most this often: callers call it between blocks of data."""


class Team:
    """One rank's part in an operation; made by `team_of`, closed by `close` or `with`.

    All ranks run the same steps in the same order, in one thread at a time; `check` may be called
    from any thread. KeyboardInterrupt and SystemExit are sent to the peers, in bounded time, and
    then raised unchanged on the rank that got them; the team is then over.
    """

    def __init__(self, context: OperationContext, order: CallOrder) -> None:
        self._order = order
        self._context = context
        self._place = context.place
        self.rank = context.rank
        self.size = context.size
        self.view = context.rank, context.size
        """Rank and number of ranks for values that differ between ranks; a rank that loads its part
        of a fake world is alone in its team, and not in that world."""
        self.coordinator_rank = context.coordinator
        self.group = context.group
        self.operation = context.operation
        self._side: Side = (
            CoordinatorSide(context) if context.rank == context.coordinator else PeerSide(context)
        )
        self._head = START
        self._over: StepVerdict | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._checked_s = 0.0
        self._trouble: str | None = None
        self.pickles = False
        """Whether values that are not plain data may be sent as pickles; see `wire`."""
        self._working = False
        """Whether a step's local work runs: only then `check` looks for a peer's failure."""
        self._finalizer = weakref.finalize(self, _end, self._side, order, context.place)
        self._drop_if_out_of_step()

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank reduces and broadcasts."""
        return self.rank == self.coordinator_rank

    def reduce_scatter(
        self, step: str, local: Callable[[], T], reduce: Callable[[list[T]], Sequence[R]]
    ) -> R:
        """This rank's part of `reduce`, which the coordinator runs on all ranks' local values."""

        def combine(value: T, payloads: Sequence[Payload]) -> Reduced:
            replies = list(reduce(self._values(value, payloads)))
            if len(replies) != self.size:
                raise ValueError(
                    f"step {step!r}: expected one result per rank ({self.size}), got {len(replies)}"
                )
            parts = [() if rank == self.rank else self._pack(r) for rank, r in enumerate(replies)]
            return Reduced(replies[self.rank], apart=parts)

        return cast("R", self._run(Mode.REDUCE_SCATTER, step, local, combine, self._unpack))

    def all_reduce(self, step: str, local: Callable[[], T], reduce: Callable[[list[T]], R]) -> R:
        """The result of `reduce`, which the coordinator runs on all ranks' local values."""

        def combine(value: T, payloads: Sequence[Payload]) -> Reduced:
            reduced = reduce(self._values(value, payloads))
            return Reduced(reduced, self._pack(reduced) if self.size > 1 else ())

        return cast("R", self._run(Mode.ALL_REDUCE, step, local, combine, self._unpack))

    def all_gather(self, step: str, local: Callable[[], T]) -> list[T]:
        """All ranks' local values, in rank order; the coordinator passes them on unopened."""

        def combine(value: T, payloads: Sequence[Payload]) -> Reduced:
            own = self._pack(value) if self.size > 1 else ()
            rank_payloads = [
                own if rank == self.rank else payload for rank, payload in enumerate(payloads)
            ]
            return Reduced(self._values(value, payloads), bundle(rank_payloads))

        def values(payload: Payload) -> list[T]:
            return [self._unpack(part) for part in unbundle(payload)]

        return cast("list[T]", self._run(Mode.ALL_GATHER, step, local, combine, values))

    def agree(self, step: str, local: Callable[[], T]) -> T:
        """This rank's local value, once every rank's local work has succeeded. It is not sent."""
        values: list[T] = []

        def keep() -> None:
            values.append(local())

        self._run(Mode.AGREE, step, keep, lambda _, __: Reduced(None), lambda _: None, sends=False)
        return values[0]

    def broadcast(self, step: str, local: Callable[[], T]) -> T:
        """The value of `local`, which only the coordinator runs. Waits for all ranks."""

        def combine(value: T | None, payloads: Sequence[Payload]) -> Reduced:
            return Reduced(value, self._pack(value) if self.size > 1 else ())

        def only_here() -> T | None:
            return local() if self.is_coordinator else None

        result = self._run(Mode.BROADCAST, step, only_here, combine, self._unpack, sends=False)
        return cast("T", result)

    def barrier(self, step: str) -> None:
        """Return when all ranks have reached this step."""
        nothing = Reduced(None)
        self._run(
            Mode.BARRIER, step, lambda: None, lambda _, __: nothing, lambda _: None, sends=False
        )

    def open_byte_exchange(self) -> ByteExchange:
        """This rank's end of connections on which ranks send each other bytes during a step.

        For a team of several ranks. The caller closes it.
        """
        return ByteExchange(self._context, self.check)

    @property
    def is_due(self) -> bool:
        """Whether `wait_for_turn` would return at once."""
        return all(earlier.done.is_set() for earlier in self._place.waits_for)

    def refuse(self, error: BaseException) -> None:
        """Take no part in the operation: send the peers the reason, in bounded time."""
        self._leave(error)
        self.close()

    def check(self) -> None:
        """Raise PeerAborted when another rank is known to have failed this step.

        Call it during a step's long local work, between blocks: four times a second it checks the
        received messages, without waiting; otherwise, and outside of local work, it does nothing.
        It also shows that this rank is alive; a rank that calls it is never silent, however long it
        works.
        """
        recent = time.monotonic() - self._checked_s < CHECK_S
        if not self._working or (self._trouble is None and recent):
            return
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._checked_s = time.monotonic()
            if self._trouble is None:
                self._trouble = self._side.trouble()
        finally:
            self._lock.release()
        if self._trouble is not None:
            raise PeerAborted(f"{self.operation} was given up: {self._trouble}")

    def _drop_if_out_of_step(self) -> None:
        """End the team if a new epoch began after this operation was called."""
        if self.size > 1 and self._order.is_dropped(self._place):
            self._over = StepVerdict(START.name, self._order.causes, final=True)

    def wait_for_turn(self) -> Self:
        """Return this team once the earlier operations that exclude it are over."""
        with self.preparing():
            wait_for_turn(self._place)
        self._drop_if_out_of_step()
        return self

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Send the peers an exception raised inside, before the first step, in bounded time.

        On this rank the exception is raised unchanged, and the operation is over.
        """
        try:
            yield
        except BaseException as error:
            self.refuse(error)
            raise

    def close(self) -> None:
        """End the operation here and tell the ranks still in it. A second call does nothing."""
        self._closed = True
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, StepError) and not self._closed:
            self._leave(error)
        self.close()

    # One step.

    def _run(
        self,
        mode: Mode,
        step: str,
        local: Callable[[], Any],
        combine: Callable[[Any, Sequence[Payload]], Reduced],
        open_payload: Callable[[Payload], Any],
        *,
        sends: bool = True,
    ) -> Any:
        """Run one step: local work, exchange, result. `sends`: the local value leaves the rank."""
        self._begin(mode, step)
        raised: BaseException | None = None
        try:
            outcome: Result | StepVerdict | None = self._side.join(self._head)
            if outcome is None:
                value, own, raised = self._state(local, sends=sends)
                with self._lock:
                    outcome = self._side.exchange(self._head, own, lambda p: combine(value, p))
            if isinstance(outcome, Result):
                return outcome.value if self.is_coordinator else open_payload(outcome.payload)
        except BaseException as error:
            self._leave(error)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise step_error(  # noqa: B904 - it already has the right cause
                step, self.operation, self._causes(), error
            )
        if outcome.final:
            # Keep the place until the caller has cleaned up: then the next operation begins.
            self._over = outcome
            self._side.close()
        raise step_error(step, self.operation, outcome.causes, raised)

    def _begin(self, mode: Mode, step: str) -> None:
        if self._over is not None:
            raise step_error(step, self.operation, self._over.causes)
        if self._closed:
            raise CoordinationError(f"step {step!r}: this rank has closed {self.operation} before")
        self._head = Head(self._head.number + 1, mode, step)
        self._trouble = None

    def _state(
        self, local: Callable[[], T], *, sends: bool
    ) -> tuple[T | None, LocalResult, BaseException | None]:
        """The local value, the result to send, and the exception that was raised."""
        self._working = self.size > 1
        try:
            value = local()
            payload = self._pack(value) if sends and not self.is_coordinator else ()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - every rank raises it
            cause = capture(self.rank, error)
            return None, LocalResult(cause=cause, echo=is_echo(error)), error
        finally:
            self._working = False
        return value, LocalResult(payload), None

    def _leave(self, error: BaseException) -> None:
        """Send the peers the reason that this rank leaves, and end the team."""
        cause = capture(self.rank, error)
        self._over = StepVerdict(self._head.name, [cause], final=True)
        self._closed = True
        with self._lock:
            if self._head is START and self.is_coordinator:
                self._side.join(self._head)
            self._side.leave(self._head, cause)

    def _causes(self) -> Sequence[Any]:
        return self._over.causes if self._over is not None else ()

    def _pack(self, value: object) -> list[Segment]:
        return pack(value, pickles=self.pickles)

    def _unpack(self, payload: Payload) -> Any:
        try:
            return unpack(payload, pickles=self.pickles)
        except ValueError as error:
            raise CoordinationError(
                f"rank {self.rank} cannot read the coordinator's message: {error}"
            ) from error

    def _values(self, own: T, payloads: Sequence[Payload]) -> list[T]:
        """All ranks' values; this rank's own is not copied."""
        values = []
        for rank, payload in enumerate(payloads):
            try:
                own_value = rank == self.rank
                values.append(own if own_value else unpack(payload, pickles=self.pickles))
            except Exception as error:
                raise CoordinationError(
                    f"the value of rank {rank} cannot be read on the coordinator: {error}"
                ) from error
        return values


def _end(side: Side, order: CallOrder, place: OperationPlace) -> None:
    """Close a team's connections, and let the next operation begin."""
    try:
        side.close()
    finally:
        order.finish(place)
