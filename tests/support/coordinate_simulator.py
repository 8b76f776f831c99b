"""The decisions of `coordinate` against whole histories: fake ranks, a fake network, a fake clock.

Each rank runs the real `CoordinatorState` or `PeerState` in a generator that stands in for the
socket modules: it hands over messages, carries out actions, and yields the time until which it
waits. Everything random comes from one seed: how long each rank works, which ranks fail, die, stop,
leave, skip an operation or run another step; how long messages take; which connections strangers
crowd out.

`check_history` runs a history and checks the promises that hold for any of them.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from pytest_dcp._engine.coordinate.admission import Admission
from pytest_dcp._engine.coordinate.coordinator_actions import (
    CombineValues,
    Conclude,
    CoordinatorAction,
    PublishVerdict,
    SendAlert,
    SendPing,
    SendResult,
    SendVerdict,
)
from pytest_dcp._engine.coordinate.coordinator_state import CoordinatorState
from pytest_dcp._engine.coordinate.failure import Cause
from pytest_dcp._engine.coordinate.frame import START, FrameKind, Head, Mode
from pytest_dcp._engine.coordinate.hello import Hello
from pytest_dcp._engine.coordinate.operation_context import OperationContext
from pytest_dcp._engine.coordinate.operation_order import CallOrder
from pytest_dcp._engine.coordinate.peer_state import (
    ExplainEnd,
    Finish,
    LinkState,
    LookForVerdict,
    PeerState,
    Reconnect,
)
from pytest_dcp._engine.coordinate.step_values import LocalResult, Reduced, Result, StepVerdict

TIMEOUT_S = 4.0
TICK_S = 0.5
MOST_S = 30.0
"""Longer than the longest work and stop, two silences and two margins: no step may take more."""
HORIZON_S = 300.0
"""When every rank has ended, however often it had to wait."""
BYE, EOF, PING, WELCOME = "bye", "eof", "ping", "welcome"
Outcome = Result | StepVerdict
Place = tuple[int, int]
"""Epoch and number of an operation: equal numbers meet."""
Waits = Generator[tuple[float, bool], None, None]
"""Until when, and whether a message ends the wait."""


class Violated(AssertionError):
    """A promise was broken."""


@dataclass(slots=True)
class Work:
    """One rank's local work in one step."""

    lasts_s: float = 0.01
    end: str = "value"
    """value, fails, dies or leaves."""
    stops_s: float = 0.0
    """For how long the process is stopped at the end of the work."""
    checks: bool = True
    """Whether it looks for failures of others meanwhile, and shows that it is alive."""
    other_step: bool = False
    combines_s: float = 0.0
    """For how long the coordinator combines."""


@dataclass(slots=True)
class History:
    """The actions of all ranks in one run."""

    size: int
    work: list[list[list[Work]]]
    """By operation, step and rank."""
    skips: set[tuple[int, int]] = field(default_factory=set)
    """Operations and ranks that do not call them."""
    crowded: float = 0.0
    """The share of connections that are closed before they are read."""
    slow: float = 0.0
    """The share of messages that take long."""

    @property
    def troubled(self) -> set[int]:
        """Ranks that a verdict may name."""
        found = {rank for _, rank in self.skips}
        for steps in self.work:
            for works in steps:
                for rank, work in enumerate(works):
                    odd = work.end != "value" or work.stops_s or work.other_step or work.combines_s
                    if odd or work.lasts_s > TIMEOUT_S / 2:
                        found.add(rank)
        return found


def draw_history(random: Random) -> History:
    """A history of two to four ranks; half of them with nothing but delays and one trouble."""
    size = random.choice((2, 2, 3, 3, 4))
    work = [
        [[draw_work(random) for _ in range(size)] for _ in range(random.choice((1, 1, 2)))]
        for _ in range(random.choice((1, 2, 2, 3)))
    ]
    history = History(size, work)
    if random.random() < 0.08:
        history.skips.add((random.randrange(len(work)), random.randrange(size)))
    history.crowded = 0.3 if random.random() < 0.1 else 0.0
    history.slow = 0.1 if random.random() < 0.3 else 0.0
    return history


def draw_work(random: Random) -> Work:
    """Mostly short work that succeeds."""
    chance = random.random()
    work = Work(lasts_s=chance * 0.05)
    kind = random.random()
    if kind > 0.2:
        return work
    if kind < 0.06:
        work.end = "fails"
    elif kind < 0.085:
        work.end = "dies"
    elif kind < 0.1:
        work.end = "leaves"
    elif kind < 0.12:
        work.stops_s = random.choice((1.0, 3.0, 7.0, 12.0))
    elif kind < 0.13:
        work.other_step = True
    elif kind < 0.14:
        work.combines_s = random.choice((1.0, 7.0))
    else:
        work.lasts_s = random.choice((0.5, 1.5, 3.0, 6.0))
        work.checks = chance < 0.7
    return work


class End:
    """One end of a connection."""

    __slots__ = (
        "arrived",
        "end_reason",
        "frames",
        "has_left",
        "heard_s",
        "last_s",
        "owner",
        "peer",
        "said_s",
    )

    def __init__(self, owner: Rank, now: float) -> None:
        self.owner = owner
        self.peer: End = self
        self.arrived: deque[Any] = deque()
        """Delivered, and not yet read."""
        self.frames: deque[tuple[FrameKind, Head, Any]] = deque()
        self.has_left = False
        self.end_reason: str | None = None
        self.heard_s = self.said_s = self.last_s = now

    def receive(self, now: float) -> None:
        while self.arrived:
            item = self.arrived.popleft()
            if item == EOF:
                self.end_reason = self.end_reason or "connection closed"
                return
            self.heard_s = now
            if item == BYE:
                self.has_left = True
            elif item != PING:
                self.frames.append(item)

    @property
    def over(self) -> bool:
        return self.has_left or self.end_reason is not None


class Rank:
    """One process, over all its operations."""

    def __init__(self, world: Simulation, rank: int) -> None:
        self.world, self.rank = world, rank
        self.order = CallOrder()
        self.ends: list[End] = []
        self.dead_s: float | None = None
        self.stopped_until_s = 0.0
        self.token = 0
        self.interruptible = False
        self.working: tuple[Place, int] | None = None
        """The operation and step whose local work runs."""
        self.waits: Waits = self.run()
        self.done = False

    def run(self) -> Waits:
        for op, steps in enumerate(self.world.history.work):
            if (op, self.rank) in self.world.history.skips:
                continue
            place = self.order.take("save", None)
            size = self.world.history.size
            context = OperationContext(self.rank, size, 0, "save", TIMEOUT_S, None, place)
            runner = coordinate if self.rank == 0 else follow
            yield from runner(self, context, steps)
            self.order.finish(place)

    def work(
        self, work: Work, look: Callable[[], str | None], head: Head, op: Place
    ) -> Generator[tuple[float, bool], None, LocalResult | None]:
        """The local work: its result, or None when this rank leaves."""
        world, self.working = self.world, (op, head.number)
        until_s, trouble = world.now + work.lasts_s, None
        while world.now < until_s and trouble is None:
            yield (min(until_s, world.now + TICK_S) if work.checks else until_s), False
            if work.checks:
                trouble = look()
        if work.end == "dies":
            world.kill(self)
            yield world.now, False
        if work.stops_s:
            self.stopped_until_s = world.now + work.stops_s
            yield self.stopped_until_s, False
        self.working = None
        if work.end == "leaves":
            return None
        if work.end == "fails":
            return LocalResult(cause=Cause(self.rank, "E", f"E: {self.rank} failed", ()))
        if trouble is not None:
            return LocalResult(cause=Cause(self.rank, "PeerAborted", "gave up", ()), echo=True)
        world.valued[op, head.number].add(self.rank)
        return LocalResult((value_of(self.rank, op, head),))


class Simulation:
    """The ranks of one history, their network and their clock."""

    def __init__(
        self,
        history: History,
        random: Random,
        make: type[CoordinatorState] = CoordinatorState,
        make_peer: type[PeerState] = PeerState,
    ) -> None:
        self.history, self.random = history, random
        self.make, self.make_peer = make, make_peer
        self.now = 0.0
        self.heap: list[tuple[float, int, Any, Any]] = []
        self.count = 0
        self.arrivals: list[tuple[Hello, End, float]] = []
        """At the coordinator's listener, in no operation."""
        self.address = False
        self.verdicts: dict[tuple[int, int], StepVerdict] = {}
        self.outcomes: dict[tuple[Place, int], dict[int, Outcome]] = defaultdict(dict)
        self.valued: dict[tuple[Place, int], set[int]] = defaultdict(set)
        """Ranks whose local work succeeded, by operation and step."""
        self.ranks = [Rank(self, rank) for rank in range(history.size)]

    def push(self, at_s: float, target: Any, item: Any) -> None:
        self.count += 1
        heapq.heappush(self.heap, (at_s, self.count, target, item))

    def delay(self) -> float:
        random = self.random.random
        return (
            random() * 0.5
            if self.history.slow and random() < self.history.slow
            else random() * 0.01
        )

    def send(self, end: End, item: Any) -> None:
        """To the other end, in the order of sending."""
        if end.end_reason is None:
            end.said_s = self.now
            other = end.peer
            other.last_s = max(other.last_s, self.now + self.delay())
            self.push(other.last_s, other, item)

    def kill(self, rank: Rank) -> None:
        rank.dead_s = self.now
        for end in rank.ends:
            self.send(end, EOF)
        if rank.rank == 0:
            for _, end, _ in self.arrivals:
                self.send(end, EOF)

    def connect(self, peer: Rank) -> End:
        """A connection to the coordinator's listener; strangers may crowd it out."""
        near, far = End(peer, self.now), End(self.ranks[0], self.now)
        near.peer, far.peer = far, near
        peer.ends.append(near)
        return near

    def greet(self, near: End, hello: Hello) -> None:
        if self.random.random() < self.history.crowded:
            self.send(near.peer, EOF)
            return
        near.peer.last_s = self.now + self.delay()
        self.push(near.peer.last_s, self, (hello, near.peer))

    def run(self) -> None:
        for rank in self.ranks:
            self.push(0.0, rank, 0)
        heap = self.heap
        while heap:
            at_s, _, target, item = heapq.heappop(heap)
            if at_s > HORIZON_S:
                raise Violated("some rank waits without a bound")
            self.now = at_s
            if isinstance(target, Rank):
                if item == target.token:
                    self.resume(target)
                continue
            if isinstance(target, Simulation):
                hello, end = item
                self.arrivals.append((hello, end, at_s))
                end.owner.ends.append(end)
                target = end
                if end.owner.dead_s is not None:
                    self.send(end, EOF)
            else:
                target.arrived.append(item)
            if target.owner.interruptible:
                self.resume(target.owner)

    def resume(self, rank: Rank) -> None:
        """Let a rank go on, unless it is dead or stopped."""
        if rank.dead_s is not None or rank.done:
            return
        rank.token += 1
        rank.interruptible = False
        if self.now < rank.stopped_until_s:
            self.push(rank.stopped_until_s, rank, rank.token)
            return
        try:
            at_s, rank.interruptible = next(rank.waits)
        except StopIteration:
            rank.done = True
            return
        if rank.dead_s is None:
            self.push(at_s, rank, rank.token)


def coordinate(me: Rank, context: OperationContext, steps: Sequence[Sequence[Work]]) -> Waits:
    """The coordinator's side; plays the part of `CoordinatorSide`."""
    world, op = me.world, (context.place.epoch, context.place.number)
    state = world.make(context, me.order)
    ends: dict[int, End] = {}
    head = START

    def perform(actions: Sequence[CoordinatorAction]) -> None:
        for action in actions:
            match action:
                case SendAlert(ranks, text):
                    for rank in ranks:
                        world.send(ends[rank], (FrameKind.ALERT, START, [text.encode()]))
                case SendResult(ranks, payload):
                    for rank in ranks:
                        world.send(ends[rank], (FrameKind.RESULT, head, payload))
                case SendVerdict(ranks, verdict):
                    for rank in ranks:
                        world.send(ends[rank], (FrameKind.VERDICT, head, verdict))
                case SendPing(rank):
                    world.send(ends[rank], PING)
                case PublishVerdict(verdict):
                    world.verdicts[context.place.epoch, context.place.number] = verdict

    def let_in() -> None:
        for arrival in list(world.arrivals):
            hello, end, came_s = arrival
            end.receive(world.now)
            answer = state.receive_hello(hello, has_left=end.has_left, waited_s=world.now - came_s)
            if answer is Admission.LATER:
                continue
            world.arrivals.remove(arrival)
            if isinstance(answer, StepVerdict):
                world.send(end, WELCOME)
                world.send(end, (FrameKind.VERDICT, START, answer))
                world.send(end, BYE)
            elif isinstance(answer, Admission) and answer is not Admission.STALE:
                ends[hello.rank] = end
                world.send(end, WELCOME)
                perform(state.join(hello, answer))

    def hand_over() -> None:
        for rank, end in ends.items():
            end.receive(world.now)
            while end.frames:
                kind, said, body = end.frames.popleft()
                perform(state.hear(rank, kind, said, body))
            if end.over:
                perform(state.lose(rank, has_left=end.has_left, end_reason=end.end_reason))

    def look() -> str | None:
        let_in()
        for rank, end in ends.items():
            end.receive(world.now)
            failed = [body.cause for kind, _, body in end.frames if kind is FrameKind.FAILED]
            said = failed[0] if failed else None
            text, actions = state.overhear(rank, said, over=end.over, end_reason=end.end_reason)
            perform(actions)
            if text is not None:
                return text
        perform(state.ping(world.now, {rank: end.said_s for rank, end in ends.items()}))
        return None

    world.address = True
    outcome: Outcome | None = None
    for number, works in enumerate(steps, 1):
        work = works[0]
        head = Head(number, Mode.ALL_REDUCE, "odd" if work.other_step else "step")
        state.begin_step(head)
        own = yield from me.work(work, look, head, op)
        if own is None:
            cause = Cause(0, "E", "E: 0 left", ())
            perform(state.leave(head, cause, world.now))
            while state.is_parting(world.now, sending=False):
                yield world.now + 0.05, True
                let_in()
            perform(state.end_parting())
            break
        since_s = looked_s = world.now
        perform(state.collect(own, world.now))
        let_in()
        hand_over()
        while state.missing:
            yield world.now + TICK_S, True
            let_in()
            hand_over()
            if world.now - looked_s > TICK_S / 2:
                looked_s = world.now
                dead = {r: "killed" for r in state.absent if world.ranks[r].dead_s is not None}
                heard_s = {rank: end.heard_s for rank, end in ends.items()}
                perform(
                    state.look_around(world.now, heard_s, end_reasons=dead if op[1] % 2 else {})
                )
                perform(state.ping(world.now, {rank: end.said_s for rank, end in ends.items()}))
        actions = state.conclude()
        if isinstance(combine := actions[-1], CombineValues):
            yield world.now + work.combines_s, False
            hand_over()
            payloads = [own.payload, *combine.payloads[1:]]
            shared = [bytes(payload[0]) if payload else b"" for payload in payloads]
            actions = state.combine(Reduced(shared, shared))
        perform(actions)
        assert isinstance(actions[-1], Conclude)
        outcome = actions[-1].outcome
        check_at_rest(world, op, number, outcome)
        note(me, op, head, outcome, since_s)
        if isinstance(outcome, StepVerdict):
            break
    for end in ends.values():
        world.send(end, BYE)


def follow(me: Rank, context: OperationContext, steps: Sequence[Sequence[Work]]) -> Waits:
    """A peer's side; plays the part of `PeerSide`."""
    world, coordinator = me.world, me.world.ranks[0]
    op = context.place.epoch, context.place.number
    until_s = world.now + TIMEOUT_S + context.signs.margin_s
    while not world.address:
        yield world.now + 0.1, False
        if coordinator.dead_s is not None or world.now > until_s:
            return
    if coordinator.dead_s is not None:
        return
    state = world.make_peer(context, me.order, world.now)
    end = world.connect(me)
    world.greet(end, state.make_hello("group", world.now))

    def look() -> str | None:
        end.receive(world.now)
        world.send(end, PING)
        for frame in end.frames:
            if frame == WELCOME:
                state.hear_welcome(is_proof=True)
            elif (text := state.overhear(frame[0], frame[2])) is not None:
                return text
        return "ended" if end.over and state.is_welcome else None

    for number, works in enumerate(steps, 1):
        work = works[me.rank]
        head = Head(number, Mode.ALL_REDUCE, "odd" if work.other_step else "step")
        own = yield from me.work(work, look, head, op)
        if own is None:
            cause = Cause(me.rank, "E", f"E: {me.rank} left", ())
            world.send(end, (FrameKind.FAILED, head, LocalResult(cause=cause)))
            break
        since_s, sent = world.now, None
        state.begin_wait(head, world.now)
        step: Any = None
        while not isinstance(step, Finish):
            if sent is not end:
                sent = end
                world.send(end, stated(head, own))
            end.receive(world.now)
            step = hear(state, end) or state.decide(
                world.now, LinkState(end.heard_s, end.has_left, end.end_reason)
            )
            if isinstance(step, ExplainEnd):
                step = state.end_step(step.how)
            elif isinstance(step, Reconnect):
                yield max(world.now, step.not_before_s), False
                state.note_reconnect(world.now, is_of_use=coordinator.dead_s is None)
                if coordinator.dead_s is None:
                    end = world.connect(me)
                    world.greet(end, state.make_hello("group", world.now))
            elif isinstance(step, LookForVerdict):
                verdict = world.verdicts.get((context.place.epoch, context.place.number))
                step = None if verdict is None else Finish(state.accept_verdict(verdict))
            elif step is None:
                yield world.now + TICK_S, True
        if step.farewell is not None:
            world.send(end, stated(head, step.farewell))
        note(me, op, head, step.outcome, since_s)
        if isinstance(step.outcome, StepVerdict):
            break
    world.send(end, BYE)


def stated(head: Head, result: LocalResult) -> tuple[FrameKind, Head, LocalResult]:
    """The message of a local result."""
    if result.cause is None:
        return FrameKind.VALUE, head, result
    return (FrameKind.ABORTED if result.echo else FrameKind.FAILED), head, result


def hear(state: PeerState, end: End) -> Finish | None:
    """Hand over the received frames."""
    while end.frames:
        frame = end.frames.popleft()
        if frame == WELCOME:
            state.hear_welcome(is_proof=True)
        elif (finish := state.hear(*frame)) is not None:
            return finish
    return None


def value_of(rank: int, op: Place, head: Head) -> bytes:
    """The value of a rank in a step of one operation."""
    return b"%d.%d.%d.%d" % (rank, *op, head.number)


def note(me: Rank, op: Place, head: Head, outcome: Outcome, since_s: float) -> None:
    """A step has ended on a rank: check what one rank alone can."""
    world = me.world
    world.outcomes[op, head.number][me.rank] = outcome
    if world.now - since_s > MOST_S:
        raise Violated(f"rank {me.rank} waited for {world.now - since_s:g} s")
    if isinstance(outcome, StepVerdict):
        return
    size = world.history.size
    if world.valued[op, head.number] != set(range(size)):
        raise Violated(f"rank {me.rank} succeeds in operation {op}, not every rank's work has")
    got = list(outcome.value if me.rank == 0 else outcome.payload)
    if got != [value_of(rank, op, head) for rank in range(size)]:
        raise Violated(f"rank {me.rank} got values of other steps: {got}")


def check_history(
    history: History,
    random: Random,
    make: type[CoordinatorState] = CoordinatorState,
    make_peer: type[PeerState] = PeerState,
) -> Simulation:
    """Run a history. Raises Violated where ranks do not do as they promise."""
    world = Simulation(history, random, make, make_peer)
    world.run()
    for rank in world.ranks:
        if not rank.done and rank.dead_s is None:
            raise Violated(f"rank {rank.rank} never ends")
    check_verdicts(world)
    return world


def check_at_rest(world: Simulation, op: Place, number: int, outcome: Outcome) -> None:
    """When a step has ended, no rank still works on it, except the ranks that its outcome names."""
    named = {cause.rank for cause in outcome.causes} if isinstance(outcome, StepVerdict) else set()
    for rank in world.ranks:
        if rank.working == (op, number) and rank.rank not in named and rank.dead_s is None:
            raise Violated(f"rank {rank.rank} works on in {op} when step {number} is over")


def check_verdicts(world: Simulation) -> None:
    """Survivors agree on each step, and name only ranks that did something to be named for."""
    troubled = world.history.troubled
    counts_anew = any(
        isinstance(one, StepVerdict) and one.epoch
        for outcomes in world.outcomes.values()
        for one in outcomes.values()
    )
    for (op, number), outcomes in world.outcomes.items():
        verdicts = [one for one in outcomes.values() if isinstance(one, StepVerdict)]
        named = {cause.rank for verdict in verdicts for cause in verdict.causes}
        if 0 in troubled or world.history.skips:
            continue  # Peers cannot agree where some did not hear the coordinator any more.
        if counts_anew:
            if 0 < len(verdicts) < len(outcomes):
                raise Violated(f"step {number} of {op} fails for some ranks only")
            continue  # Late ranks get the verdict of the operation that met them.
        if not named <= troubled:
            raise Violated(f"step {number} of {op} names {named}, {troubled} had trouble")
        texts = {
            (*((cause.rank, cause.text) for cause in one.causes), one.final)
            if isinstance(one, StepVerdict)
            else "success"
            for one in outcomes.values()
        }
        if len(texts) > 1:
            raise Violated(f"step {number} of operation {op} ends as {texts}")


def check_seeds(seeds: Sequence[int], **states: Any) -> int:
    """Check the histories of some seeds; how many steps ended."""
    steps = 0
    for seed in seeds:
        random = Random(seed)
        history = draw_history(random)
        try:
            steps += len(check_history(history, random, **states).outcomes)
        except AssertionError as error:
            raise Violated(f"seed {seed}: {error}") from error
    return steps
