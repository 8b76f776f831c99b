"""One world in the controller: joins a launcher, the supervisor and the ranks' sockets.

Enters: a `WorldSpec` and orders for a phase. Leaves: an `Outcome` for each phase. The loop in
`_settle` carries out what `supervisor` decides; every wait in it is bounded by the supervisor's
own clock, and the end of a world (`close`, `kill`) leaves no process, descriptor or file behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pytest_dcp._harness.protocol import linux
from pytest_dcp._harness.protocol.launcher import Halt, Launcher, LauncherLostError, Order
from pytest_dcp._harness.protocol.messages import (
    DebugAnswer,
    Done,
    Down,
    FaultAct,
    FaultAsk,
    Leave,
    Phase,
    SubReport,
    Up,
    WireError,
    encode,
)
from pytest_dcp._harness.protocol.places import PREPARE_S
from pytest_dcp._harness.protocol.world_spec import WorldSpec
from pytest_dcp._harness.world import stacks
from pytest_dcp._harness.world.interrupts import Interrupts
from pytest_dcp._harness.world.outcome import Outcome, combine
from pytest_dcp._harness.world.rank_handle import SEND_S, RankEnd
from pytest_dcp._harness.world.rank_states import (
    Action,
    Continue,
    Dump,
    Interrupt,
    KillRank,
    Send,
    StopRank,
)
from pytest_dcp._harness.world.supervisor import Supervisor
from pytest_dcp._harness.world.terminal import Terminal
from pytest_dcp.errors import LostRank, RankFailure, WorldError

BOOT_S = 120.0
"""For starting processes and joining the process group, when torch was imported."""
LEAVE_S = 20.0
"""For a rank's exit once it was ordered to leave."""
LOOK_S = 0.25
"""How often the captured output's size and the launcher are looked at."""
WORK_S = 0.005
"""Of processor time: a thread that hangs uses some 0.05 ms for each signal."""
BRIEF_LOOK_S = 0.02
"""How often somebody who need not wait to the end is asked whether to."""
NO_STACK = "and wrote no stack: stopped, or deep in C code"

Verdicts = Mapping[int, Done]
"""What ranks said, by rank."""
Failures = Sequence[RankFailure]

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class CutOff:
    """How a phase ended that an interrupt of this process has cut off."""

    phase: Phase
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class WorldSettings:
    """What the session says about all its worlds."""

    session: str
    """Unique among all sessions on the machine."""
    folder: Path
    """For rendezvous files and the ranks' tmp_path; on this machine."""
    grace_s: float
    output_limit_bytes: int
    terminal: Terminal
    launcher: Callable[[], Launcher]
    root: str = ""
    """The folder that files are named from."""


class World:
    """A running world. Not thread-safe: one thread drives it."""

    def __init__(
        self,
        spec: WorldSpec,
        settings: WorldSettings,
        *,
        seed: int,
        gpus: Sequence[int] = (),
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.number = next(_numbers)
        self.spec = spec
        self.seed = seed
        self.sub_reports: list[tuple[int, dict[str, object]]] = []
        self.strays: list[tuple[int, str]] = []
        """(rank, `pid (command)`) of processes that ranks left behind; they were killed."""
        self.exited: Verdicts = {}
        """What ranks printed, and what went wrong, while they exited."""
        self.ended = False
        self.cut_off: CutOff | None = None
        """Set when an interrupt came while this process waited for a phase's end."""
        self._is_awaited = False
        """Whether a phase has begun whose outcome was not returned yet."""
        self._settings = settings
        self._gpus = gpus
        self._launcher = settings.launcher()
        terminal = replace(settings.terminal)
        self._supervisor = Supervisor(spec.size, grace_s=settings.grace_s, terminal=terminal)
        self._ranks: list[RankEnd] = []
        self._selector = selectors.DefaultSelector()
        # A name that no earlier test can have taken.
        self._store = settings.folder / f"store-{uuid.uuid4().hex}"
        self._port = socket.socket()
        self._interrupts = Interrupts()
        self._on_end = on_end
        self._limit_s = BOOT_S
        self._deadline = float("inf")
        self._look_at = 0.0

    # Life.

    def start(self) -> Outcome:
        """Launch the ranks and wait until all joined the process group."""
        try:
            self._make_folder()
            # Bound, not listening: the number stays ours, and a rank may still listen on it.
            self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._port.bind(("127.0.0.1", 0))
            self._ranks = [RankEnd() for _ in range(self.spec.size)]
            for rank, one in enumerate(self._ranks):
                self._selector.register(one.socket, selectors.EVENT_READ, rank)
            self._selector.register(self._launcher.fileno(), selectors.EVENT_READ, -1)
            now = time.monotonic()
            self._supervisor.boot(now + BOOT_S, now, self._launcher.first_place)
            self._launcher.launch(
                [self._order(rank) for rank in range(self.spec.size)],
                [one.fds() for one in self._ranks],
            )
            for one in self._ranks:
                one.theirs.close()
            outcome = self._settle()
        except BaseException:
            self.kill()
            raise
        self.restart_clock(self.spec.timeout_s)
        return outcome

    def _make_folder(self) -> None:
        """Make the session's folder anew when a test has removed it.

        Not what is above it: that may lie where other users could make it first.
        """
        folder = self._settings.folder
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as exc:
            raise WorldError(
                f"the session's temporary folder {str(folder.parent)!r} is gone: a test has "
                f"removed it, and worlds need it ({exc.strerror})"
            ) from exc

    def restart_clock(self, limit_s: float) -> None:
        """The time limit counts from here."""
        self._limit_s = limit_s
        self._deadline = time.monotonic() + limit_s

    @property
    def root(self) -> str:
        """The folder that files are named from."""
        return self._settings.root

    @property
    def whole(self) -> bool:
        """Whether all ranks are alive, idle and unharmed."""
        return not self.ended and len(self._supervisor.idle) == self.spec.size

    @property
    def sound(self) -> bool:
        """Whether all ranks but those that were lost as asked are alive, idle and unharmed."""
        idle, lost = len(self._supervisor.idle), len(self.lost)
        return not self.ended and 0 < idle == self.spec.size - lost

    @property
    def lost(self) -> Mapping[int, LostRank]:
        """Ranks that ended because the test asked for it."""
        return self._supervisor.deaths.lost

    @property
    def survivors(self) -> tuple[int, ...]:
        """Ranks that are there and not stopped as asked, ascending."""
        return self._supervisor.deaths.survivors(self._supervisor.gone)

    def run(self, phase: Phase, order: Down) -> Outcome:
        """One phase on every rank; fails at once when a rank has died since the last."""
        with self._guarded():  # an interrupt may come between the two
            self.begin(phase, order)
            return self.finish()

    def begin(self, phase: Phase, order: Down) -> None:
        """Have every rank start a phase, but those that were lost as asked; `finish` follows."""
        with self._guarded():
            self._drain()
            self._is_awaited = True
            with self._interrupts.held():
                if not self._supervisor.failures or self.sound:
                    orders = dict.fromkeys(self._supervisor.idle, order)
                    self._act(self._supervisor.begin(phase, orders, self._deadline))

    def finish(self) -> Outcome:
        """Wait until every rank has answered, died or been killed; how the phase went."""
        with self._guarded():
            outcome = self._settle()
            self._deadline = self._supervisor.deadline
            self._is_awaited = False
            return outcome

    def run_until(
        self, phase: Phase, order: Down, enough: Callable[[Verdicts, Failures], bool]
    ) -> Outcome:
        """Like `run`, but what ranks said and what failed so far may be `enough`.

        It is asked at every event, and now and then. A world in which a rank was not waited
        for is of no use any more: it is not `sound`.
        """
        with self._guarded():
            self.begin(phase, order)
            while not self._supervisor.settled:
                self._step(BRIEF_LOOK_S)
                if enough(self._supervisor.done, self._supervisor.failures):
                    break
            else:
                return self.finish()
            self._is_awaited = False
            return combine(self.spec.size, self._supervisor.done, self._explained(), self.lost)

    def strike(self, act: FaultAct, rank: int, why: str) -> None:
        """Have a rank killed, stopped or continued; returns when that has happened.

        Raises `WorldError` when a rank that is to be stopped or continued is gone.
        """
        with self._guarded():
            self._drain()
            gone = self._supervisor.gone
            if act != "kill" and rank in gone:
                raise WorldError(f"rank {rank} is gone: there is nothing to {act}")
            self._act(self._supervisor.strike(act, rank, why, time.monotonic()))
            ask = FaultAsk(act, rank)
            while not self._supervisor.deaths.is_done(ask, self._supervisor.gone):
                self._step()

    def died(self) -> Sequence[RankFailure]:
        """Failures since the last phase ended: of ranks that died while they had no order."""
        if self.ended:
            return ()
        with self._guarded():
            told = len(self._supervisor.failures)
            self._drain()
            return self._explained()[told:]

    def wind_down(self, order: Down, within_s: float) -> Outcome:
        """A last phase on the ranks that outlived a failure, and the end; how the phase went.

        Their fixtures may hold things outside this machine, and so may what an exiting interpreter
        sees to; their peers are dead, so they get only `within_s` for each. Ranks that are still at
        work then are killed.
        """
        with self._guarded():
            self._drain()
            self._act(self._supervisor.give_up(time.monotonic()))
            orders = dict.fromkeys(self._supervisor.idle, order)
            deadline = time.monotonic() + within_s
            self._act(self._supervisor.begin("teardown", orders, deadline))
            self._wait()
            outcome = combine(0, self._supervisor.done, self._explained())
            leaving: dict[int, Down] = dict.fromkeys(self._supervisor.idle, Leave())
            deadline = time.monotonic() + within_s
            self._act(self._supervisor.begin("finish", leaving, deadline))
            self._wait()
            self.kill()
            return outcome

    def close(self) -> Outcome:
        """Have every rank leave; an outcome other than passed names those that did not exit with 0.

        What an earlier phase has reported is not told again. See also `exited`.
        """
        with self._guarded():
            if self.ended:
                return combine(0, {}, ())
            told = len(self._supervisor.failures)
            self._drain()
            self._wait()
            if self.sound:
                orders: dict[int, Down] = dict.fromkeys(self._supervisor.idle, Leave())
                deadline = time.monotonic() + LEAVE_S
                self._act(self._supervisor.begin("finish", orders, deadline))
                told = 0
                self._wait()
                self.exited = dict(self._supervisor.done)
            outcome = combine(0, {}, self._explained()[told:])
            self.kill()
            return outcome

    def kill(self) -> None:
        """End everything now."""
        if self.ended:
            return
        try:
            self._drain()
        finally:
            self._kill_all()

    def _kill_all(self) -> None:
        try:
            self._act(self._supervisor.interrupt(time.monotonic()))
            while not self._supervisor.settled:
                self._step()
        finally:
            self._release()

    def output(self, rank: int) -> list[tuple[str, str]]:
        """(stdout | stderr, text) that a rank wrote and did not live to report. Until `close`."""
        one = self._ranks[rank]
        texts = (("stdout", one.read(one.out)), ("stderr", one.read(one.err)))
        return [(name, text) for name, text in texts if text]

    def trace(self, rank: int) -> str:
        """The stacks that a rank wrote, on request or when it crashed."""
        return self._ranks[rank].read(self._ranks[rank].trace)

    def draws(self, rank: int) -> bytes:
        """What a rank wrote down of what it drew for the last example."""
        return self._ranks[rank].read_draws()

    def at_work(self, rank: int) -> bool:
        """Whether a rank does something, polls, or would if it had a processor."""
        return linux.at_work(self._ranks[rank].pid)

    def forget_draws(self) -> None:
        """Another example begins."""
        for one in self._ranks:
            os.ftruncate(one.draws, 0)

    # Inside.

    def _order(self, rank: int) -> Order:
        spec = self.spec
        device = spec.device
        if device == "cuda":
            device = f"cuda:{self._gpus[rank % len(self._gpus)]}"
        return Order(
            session=self._settings.session,
            world=self.number,
            rank=rank,
            size=spec.size,
            backend=spec.backend,
            device=device,
            mesh=spec.mesh,
            mesh_dim_names=spec.mesh_dim_names,
            store=str(self._store),
            master_port=self._port.getsockname()[1],
            seed=self.seed,
            isolation=spec.isolation,
            basetemp=str(self._settings.folder / f"world{self.number}-rank{rank}"),
        )

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """An error ends the world; Ctrl-C and its like only the phase, so that ranks tear down."""
        with self._interrupts.relayed(), self._ending_on_error():
            yield

    @contextlib.contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            is_interrupt = isinstance(error, pytest.exit.Exception)  # an Exception, too
            if is_interrupt or not isinstance(error, Exception):
                self._cut_phase_off()
            else:
                self.kill()
            raise

    def _cut_phase_off(self) -> None:
        """Have the ranks end their phase, in bounded time. Another interrupt kills them at once."""
        if self.ended:
            return
        try:
            with self._interrupts.held():
                self._act(self._supervisor.cut_off(time.monotonic()))
            seen_s: dict[int, float] = {}
            while not self._supervisor.settled:
                self._look_for_work(seen_s)
                self._step()
            self._wait()
            if self._is_awaited:
                self._is_awaited = False
                self.cut_off = CutOff(self._supervisor.phase, self._outcome_of_cut_off())
        except BaseException:
            self.kill()
            raise

    def _look_for_work(self, seen_s: dict[int, float]) -> None:
        """Tell the supervisor which busy ranks' main threads have worked since the last look.

        `seen_s` is the processor time that each had used then. Not their states: a thread that
        hangs wakes up for each signal.
        """
        for rank in self._supervisor.busy:
            used_s = linux.main_thread_cpu_s(self._ranks[rank].pid)
            if used_s >= seen_s.setdefault(rank, used_s) + WORK_S:
                seen_s[rank] = used_s
                self._supervisor.see_work(rank, time.monotonic())

    def _outcome_of_cut_off(self) -> Outcome:
        """What the ranks came to, but for the KeyboardInterrupt that they got from this process."""
        done = self._supervisor.done
        others = {rank: one for rank, one in done.items() if one.outcome != "interrupt"}
        outcome = combine(0, others, self._explained(), self.lost)
        return replace(outcome, done=dict(done), session_end=None)

    def _settle(self) -> Outcome:
        """Loop until every rank has answered, died or been killed."""
        self._wait()
        return combine(self.spec.size, self._supervisor.done, self._explained(), self.lost)

    def _wait(self) -> None:
        self._step_until_settled()
        self._act(self._supervisor.dismiss(time.monotonic()))
        self._step_until_settled()

    def _step_until_settled(self) -> None:
        while not self._supervisor.settled:
            self._step()

    def _explained(self) -> list[RankFailure]:
        """The supervisor's failures, with tracebacks and stacks from the ranks."""
        return [self._explain(failure) for failure in self._supervisor.failures]

    def _explain(self, failure: RankFailure) -> RankFailure:
        done = self._supervisor.done.get(failure.rank)
        if failure.kind == "failed" and done is not None:
            return replace(failure, detail=str((done.report or {}).get("text", "")))
        if failure.detail:  # the rank had said it
            return failure
        trace = self.trace(failure.rank)
        if failure.kind in ("timeout", "blocked"):
            limit_s = PREPARE_S if self._supervisor.prepared_too_long else self._limit_s
            limit = f" at the time limit of {limit_s:g} s" if failure.kind == "timeout" else ""
            where = stacks.describe_activity(trace, self._settings.root) if trace else NO_STACK
            summary = f"{failure.summary}{limit}, {where}"
            return replace(failure, summary=summary, detail=stacks.trim_runner(trace))
        return replace(failure, detail=stacks.trim_runner(trace))

    def _step(self, within_s: float = LOOK_S) -> None:
        """Wait for one thing to happen, and handle it."""
        with self._interrupts.held():
            if self._launcher.has_news(self.number) and self._hear_news():
                return
        now = time.monotonic()
        wake = min(self._supervisor.wake_at() - now, within_s)
        ready = self._selector.select(max(0.0, wake))
        with self._interrupts.held():
            self._handle(ready)

    def _handle(self, ready: Sequence[tuple[selectors.SelectorKey, int]]) -> None:
        """Handle what there is to read, and what is due."""
        for key, _ in ready:
            if key.data < 0:
                self._hear_news()
            else:
                self._hear(key.data)
        now = time.monotonic()
        self._act(self._supervisor.tick(now))
        if not self._supervisor.paused:
            self._interrupts.ignored = False
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look_at_output(now)
            self._look_at_launcher()

    def _drain(self) -> None:
        """What happened between phases: a rank that died."""
        with self._interrupts.held():
            if self._launcher.has_news(self.number):
                self._hear_news()
            for key, _ in self._selector.select(0):
                if key.data < 0:
                    self._hear_news()
                else:
                    self._hear(key.data)

    def _hear_news(self) -> bool:
        """Handle what became of processes; whether there was something.

        To be called when the launcher is readable, and when another world has read it for this one.
        """
        try:
            news = self._launcher.news(self.number)
        except LauncherLostError as lost:
            self._abandon(lost)
            return False
        for one in news:
            self._hear_last_words(one.rank)
            now = time.monotonic()
            if isinstance(one, Halt):
                self._act(self._supervisor.halted(one.rank, now, stopped=one.stopped))
                continue
            self.strays += [(one.rank, stray) for stray in one.strays]
            self._act(self._supervisor.exited(one.rank, one.status, now))
        return bool(news)

    def _abandon(self, lost: LauncherLostError) -> None:
        """Without its launcher nothing more is to be heard of the world's ranks."""
        with contextlib.suppress(KeyError, ValueError):  # it was, or it is closed
            self._selector.unregister(self._launcher.fileno())
        self._supervisor.abandon(str(lost), time.monotonic())

    def _hear_last_words(self, rank: int) -> None:
        """A rank may have answered and died before anybody looked: the answer counts."""
        with contextlib.suppress(KeyError):
            sock = self._ranks[rank].socket
            self._selector.get_key(sock)
            sock.setblocking(False)
            while self._hear(rank):
                pass
            sock.settimeout(SEND_S)

    def _hear(self, rank: int) -> bool:
        """Read what a rank sent; False when there is nothing (more)."""
        one = self._ranks[rank]
        now = time.monotonic()
        try:
            data = one.receive()
            if data:
                self._take(rank, data, now)
                return True
        except (BlockingIOError, TimeoutError):
            return False
        except WireError as error:
            one.unwatch(self._selector)
            text = f"what came on its report socket in {self._supervisor.phase} is refused: {error}"
            self._act(self._supervisor.refused(rank, text, now))
            return False
        except OSError:
            pass  # reset: as good as its end
        one.unwatch(self._selector)
        exiting = one.pid != 0 and linux.is_exiting(one.pid)
        self._act(self._supervisor.closed(rank, now, exiting=exiting))
        return False

    def _take(self, rank: int, data: bytes, now: float) -> None:
        for message in self._ranks[rank].decoder.feed(data):
            if isinstance(message, SubReport):
                self.sub_reports.append((rank, message.report))
            elif isinstance(message, Up):
                self._act(self._supervisor.heard(rank, message, now))
            else:
                raise WireError(f"a {type(message).__name__}, which only the controller sends")

    def _act(self, actions: Sequence[Action]) -> None:
        frames: dict[int, bytes] = {}  # an order to all ranks is encoded once
        for action in actions:
            match action:
                case Send(rank, message):
                    if isinstance(message, DebugAnswer) and message.granted:
                        self._interrupts.ignored = True
                    if id(message) not in frames:
                        frames[id(message)] = encode(message)
                    self._send(rank, frames[id(message)])
                case Dump(rank):
                    self._ranks[rank].empty_trace()
                    self._signal(self._launcher.stacks, rank)
                case Interrupt(rank):
                    self._signal(self._launcher.interrupt, rank)
                case KillRank(rank):
                    self._signal(self._launcher.kill, rank)
                case StopRank(rank):
                    self._signal(self._launcher.pause, rank)
                case Continue(rank):
                    self._signal(self._launcher.resume, rank)

    def _send(self, rank: int, frame: bytes) -> None:
        try:
            self._ranks[rank].socket.sendall(frame)
        except TimeoutError:
            # Ended at once: it may have said much that is yet to be answered, and each answer would
            # be waited for anew.
            text = f"took nothing from its report socket for {SEND_S:g} s"
            self._act(self._supervisor.refused(rank, text, time.monotonic()))
        except OSError:
            self._act(self._supervisor.closed(rank, time.monotonic()))

    def _signal(self, signal_rank: Callable[[int, int], None], rank: int) -> None:
        try:
            signal_rank(self.number, rank)
        except LauncherLostError as lost:
            self._abandon(lost)

    def _look_at_output(self, now: float) -> None:
        for rank, one in enumerate(self._ranks):
            size = os.fstat(one.out).st_size + os.fstat(one.err).st_size
            if size > self._settings.output_limit_bytes:
                self._act(self._supervisor.flooded(rank, size, now))

    def _look_at_launcher(self) -> None:
        try:
            self._launcher.check_running()
        except LauncherLostError as lost:
            self._abandon(lost)

    def _release(self) -> None:
        self.ended = True
        self._interrupts.ignored = False
        self._selector.close()
        self._port.close()
        for one in self._ranks:
            one.close()
        forget = getattr(self._launcher, "forget", None)
        if forget is not None:
            forget(self.number)
        self._store.unlink(missing_ok=True)
        self._on_end()
