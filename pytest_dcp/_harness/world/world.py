"""One world in the controller: joins a launcher, the supervisor and the ranks' sockets.

Enters: a `WorldSpec` and orders for a phase. Leaves: an `Outcome` for each phase. The loop in
`rank_loop` carries out the decisions of `supervisor`; every wait in it is bounded by the
supervisor's own clock, and the end of a world (`close`, `kill`) leaves no process, descriptor or
file behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import pytest

from pytest_dcp._harness.protocol.launcher import RankLaunch
from pytest_dcp._harness.protocol.messages import Done, Down, FaultAct, FaultAsk, Leave, Phase
from pytest_dcp._harness.protocol.places import PREPARE_S
from pytest_dcp._harness.protocol.world_spec import WorldSpec
from pytest_dcp._harness.world.cut_off import CutOff, combine_without_interrupts, end_phase
from pytest_dcp._harness.world.explained_failures import explain_failure
from pytest_dcp._harness.world.outcome import Outcome, combine
from pytest_dcp._harness.world.rank_loop import RankLoop
from pytest_dcp._harness.world.supervisor import Supervisor
from pytest_dcp._harness.world.world_settings import WorldSettings
from pytest_dcp.errors import LostRank, RankFailure, WorldError

BOOT_S = 120.0
"""For starting processes and joining the process group, when torch was imported."""
LEAVE_S = 20.0
"""For a rank's exit once it was ordered to leave."""
BRIEF_LOOK_S = 0.02
"""How often `run_until` calls `is_decided`."""

Results = Mapping[int, Done]
"""The ranks' answers, by rank."""
Failures = Sequence[RankFailure]

_numbers = itertools.count()


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
        self.exited: Results = {}
        """Output and errors of ranks during their exit."""
        self.is_over = False
        self.cut_off: CutOff | None = None
        """Set when an interrupt came while this process waited for a phase's end."""
        self._is_awaited = False
        """Whether a phase has begun whose outcome was not returned yet."""
        self._settings = settings
        self._gpus = gpus
        terminal = replace(settings.terminal)
        self._supervisor = Supervisor(spec.size, grace_s=settings.grace_s, terminal=terminal)
        self._launcher = settings.launcher()
        self._loop = RankLoop(
            self.number,
            self._supervisor,
            self._launcher,
            output_limit_bytes=settings.output_limit_bytes,
        )
        # A name that no earlier test can have taken.
        self._store = settings.folder / f"store-{uuid.uuid4().hex}"
        self._port = socket.socket()
        self._on_end = on_end
        self._limit_s = BOOT_S
        self._deadline = float("inf")

    # Life.

    def start(self) -> Outcome:
        """Launch the ranks and wait until all joined the process group."""
        try:
            self._make_folder()
            # Bound, not listening: the number stays ours, and a rank may still listen on it.
            self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._port.bind(("127.0.0.1", 0))
            self._loop.open(self.spec.size)
            now = time.monotonic()
            self._supervisor.boot(now + BOOT_S, now, self._launcher.first_place)
            self._loop.launch([self._order(rank) for rank in range(self.spec.size)])
            outcome = self._settle()
        except BaseException:
            self.kill()
            raise
        self.restart_clock(self.spec.timeout_s)
        return outcome

    def _make_folder(self) -> None:
        """Make the session's folder anew when a test has removed it.

        Not its parents: other users could create one of those first.
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

    def take_sub_reports(self) -> list[tuple[int, dict[str, object]]]:
        """(rank, report) of the subtests that ranks have reported since the last call."""
        reports, self._loop.sub_reports = self._loop.sub_reports, []
        return reports

    @property
    def leaked_processes(self) -> Sequence[tuple[int, str]]:
        """(rank, `pid (command)`) of processes that ranks left behind; they were killed."""
        return self._loop.leaked_processes

    @property
    def root(self) -> str:
        """The folder that files are named from."""
        return self._settings.root

    @property
    def all_ranks_idle(self) -> bool:
        """Whether all ranks are alive, idle and unharmed."""
        return not self.is_over and len(self._supervisor.idle) == self.spec.size

    @property
    def survivors_idle(self) -> bool:
        """Whether all ranks except those lost on request are alive, idle and unharmed."""
        idle, lost = len(self._supervisor.idle), len(self.lost)
        return not self.is_over and 0 < idle == self.spec.size - lost

    @property
    def lost(self) -> Mapping[int, LostRank]:
        """Ranks that ended because the test asked for it."""
        return self._supervisor.deaths.lost

    @property
    def survivors(self) -> tuple[int, ...]:
        """Ranks that are there and not stopped as asked, ascending."""
        return self._supervisor.deaths.survivors(self._supervisor.gone_ranks)

    def run(self, phase: Phase, order: Down) -> Outcome:
        """One phase on every rank; fails at once when a rank has died since the last."""
        with self._guarded():  # an interrupt may come between the two
            self._begin(phase, order)
            return self._finish()

    def begin(self, phase: Phase, order: Down) -> None:
        """Have every rank except those lost on request start a phase; `finish` follows."""
        with self._guarded():
            self._begin(phase, order)

    def finish(self) -> Outcome:
        """Wait until every rank has answered, died or been killed; returns the phase's outcome."""
        with self._guarded():
            return self._finish()

    def run_until(
        self, phase: Phase, order: Down, is_decided: Callable[[Results, Failures], bool]
    ) -> Outcome:
        """Like `run`, but ends early when `is_decided` accepts the verdicts and failures so far.

        It is called at every event, and periodically. A world that ended early cannot be used
        again: it is not `survivors_idle`.
        """
        with self._guarded():
            self.begin(phase, order)
            while not self._supervisor.settled:
                self._loop.step(BRIEF_LOOK_S)
                if is_decided(self._supervisor.results, self._supervisor.failures):
                    break
            else:
                return self.finish()
            self._is_awaited = False
            return combine(
                self.spec.size, self._supervisor.results, self._explain_failures(), self.lost
            )

    def apply_fault(self, act: FaultAct, rank: int, why: str) -> None:
        """Have a rank killed, stopped or continued; returns when that has happened.

        Raises `WorldError` when a rank that is to be stopped or continued is gone.
        """
        with self._guarded():
            self._loop.drain()
            gone_ranks = self._supervisor.gone_ranks
            if act != "kill" and rank in gone_ranks:
                raise WorldError(f"rank {rank} is gone: there is nothing to {act}")
            self._loop.act(self._supervisor.apply_fault(act, rank, why, time.monotonic()))
            ask = FaultAsk(act, rank)
            while not self._supervisor.deaths.is_done(ask, self._supervisor.gone_ranks):
                self._loop.step()

    def find_deaths(self) -> Sequence[RankFailure]:
        """Failures since the last phase ended: of ranks that died while they had no order."""
        if self.is_over:
            return ()
        with self._guarded():
            known_count = len(self._supervisor.failures)
            self._loop.drain()
            return self._explain_failures()[known_count:]

    def tear_down_survivors(self, order: Down, within_s: float) -> Outcome:
        """Run a last phase on the ranks that outlived a failure, then end the world; returns the
        phase's outcome.

        Their fixtures may hold things outside this machine, and so may handlers of an exiting
        interpreter; their peers are dead, so they get only `within_s` for each. Ranks that are
        still at work then are killed.
        """
        with self._guarded():
            self._loop.drain()
            self._loop.act(self._supervisor.give_up(time.monotonic()))
            orders = dict.fromkeys(self._supervisor.idle, order)
            deadline = time.monotonic() + within_s
            self._loop.act(self._supervisor.begin("teardown", orders, deadline))
            self._loop.run_until_settled()
            outcome = combine(0, self._supervisor.results, self._explain_failures())
            leaving: dict[int, Down] = dict.fromkeys(self._supervisor.idle, Leave())
            deadline = time.monotonic() + within_s
            self._loop.act(self._supervisor.begin("finish", leaving, deadline))
            self._loop.run_until_settled()
            self.kill()
            return outcome

    def close(self) -> Outcome:
        """Have every rank leave; an outcome other than passed names the ranks that did not exit
        with 0.

        Failures reported by an earlier phase are not repeated. See also `exited`.
        """
        with self._guarded():
            if self.is_over:
                return combine(0, {}, ())
            reported_count = len(self._supervisor.failures)
            self._loop.drain()
            self._loop.run_until_settled()
            if self.survivors_idle:
                orders: dict[int, Down] = dict.fromkeys(self._supervisor.idle, Leave())
                deadline = time.monotonic() + LEAVE_S
                self._loop.act(self._supervisor.begin("finish", orders, deadline))
                reported_count = 0
                self._loop.run_until_settled()
                self.exited = dict(self._supervisor.results)
            outcome = combine(0, {}, self._explain_failures()[reported_count:])
            self.kill()
            return outcome

    def kill(self) -> None:
        """End everything now."""
        if self.is_over:
            return
        try:
            self._loop.drain()
        finally:
            self._kill_all()

    def _kill_all(self) -> None:
        try:
            self._loop.act(self._supervisor.interrupt(time.monotonic()))
            while not self._supervisor.settled:
                self._loop.step()
        finally:
            self._release()

    def output(self, rank: int) -> list[tuple[str, str]]:
        """(stdout | stderr, text) that a rank wrote and did not live to report. Until `close`."""
        end = self._loop.ranks[rank]
        texts = (("stdout", end.read(end.out)), ("stderr", end.read(end.err)))
        return [(name, text) for name, text in texts if text]

    def trace(self, rank: int) -> str:
        """The stacks that a rank wrote, on request or when it crashed."""
        return self._loop.ranks[rank].read(self._loop.ranks[rank].trace)

    def draws(self, rank: int) -> bytes:
        """A rank's record of its draws for the last example."""
        return self._loop.ranks[rank].read_draws()

    def at_work(self, rank: int) -> bool:
        """Whether a rank does something, polls, or would if it had a processor."""
        return self._loop.at_work(rank)

    def forget_draws(self) -> None:
        """A new example begins."""
        for end in self._loop.ranks:
            os.ftruncate(end.draws, 0)

    # Inside.

    def _begin(self, phase: Phase, order: Down) -> None:
        self._loop.drain()
        self._is_awaited = True
        with self._loop.interrupts.held():
            if not self._supervisor.failures or self.survivors_idle:
                orders = dict.fromkeys(self._supervisor.idle, order)
                self._loop.act(self._supervisor.begin(phase, orders, self._deadline))

    def _finish(self) -> Outcome:
        outcome = self._settle()
        self._deadline = self._supervisor.deadline
        self._is_awaited = False
        return outcome

    def _order(self, rank: int) -> RankLaunch:
        spec = self.spec
        device = spec.device
        if device == "cuda" and self._gpus:
            device = f"cuda:{self._gpus[rank % len(self._gpus)]}"
        return RankLaunch(
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
            fake_view=spec.fake_view,
            threads=spec.threads,
        )

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """An error ends the world; an interrupt such as Ctrl-C ends only the phase, so that ranks
        tear down.
        """
        with self._loop.interrupts.relayed(), self._ending_on_error():
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
        if self.is_over:
            return
        try:
            end_phase(self._loop, self._supervisor)
            if self._is_awaited:
                self._is_awaited = False
                outcome = combine_without_interrupts(
                    self._supervisor.results, self._explain_failures(), self.lost
                )
                self.cut_off = CutOff(self._supervisor.phase, outcome)
        except BaseException:
            self.kill()
            raise

    def _settle(self) -> Outcome:
        """Loop until every rank has answered, died or been killed."""
        self._loop.run_until_settled()
        return combine(
            self.spec.size, self._supervisor.results, self._explain_failures(), self.lost
        )

    def _explain_failures(self) -> list[RankFailure]:
        """The supervisor's failures, with tracebacks and stacks from the ranks."""
        return [self._explain_failure(failure) for failure in self._supervisor.failures]

    def _explain_failure(self, failure: RankFailure) -> RankFailure:
        result = self._supervisor.results.get(failure.rank)
        limit_s = PREPARE_S if self._supervisor.prepared_too_long else self._limit_s
        return explain_failure(
            failure, result, lambda: self.trace(failure.rank), limit_s=limit_s, root=self.root
        )

    def _release(self) -> None:
        self.is_over = True
        self._loop.close()
        self._port.close()
        self._store.unlink(missing_ok=True)
        self._on_end()
