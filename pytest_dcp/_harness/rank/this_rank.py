"""This process as a rank: its state, and its requests to peers and the controller."""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_dcp import api
from pytest_dcp._harness.lockstep.fresh_folders import scratch_beside
from pytest_dcp._harness.protocol.launcher import RankFds, RankLaunch
from pytest_dcp._harness.protocol.messages import Announce, At, Exchange, Met
from pytest_dcp._harness.rank.channel import Channel
from pytest_dcp._harness.rank.exception_facts import lines_of, traceback_text
from pytest_dcp._harness.rank.group_counter import GroupCounter
from pytest_dcp._harness.rank.rank_interrupts import RankInterrupts
from pytest_dcp.errors import DivergedError, WorldError


@dataclass(frozen=True, slots=True)
class WarmMesh:
    """The mesh that the tests of a warm world share."""

    group: object
    """The default process group that it was made of."""
    mesh: Any
    forget: Callable[[], None]
    """Tears down the fixture and the fixtures that use it."""


@dataclass(slots=True)
class Rank:
    """This process, as a rank of its world."""

    order: RankLaunch
    channel: Channel
    fds: RankFds
    interrupts: RankInterrupts
    seed: int = 0
    checkpoint_dir: str = ""
    modules: int = 0
    """How many modules were imported before the first test."""
    mesh: WarmMesh | None = None
    counter: GroupCounter | None = None
    """Counts uses of process groups, if this rank runs more than one test."""
    renewed: list[api.RenewedFixture] = field(default_factory=list)
    """The running test's fixtures that start afresh for each of Hypothesis' examples."""
    unmet: list[Callable[[], list[str]]] = field(default_factory=list)
    """Called when a test is torn down; they return the events that did not happen, which
    fails it.
    """
    capture: Callable[[], contextlib.AbstractContextManager[list[tuple[str, str, str]]]] = field(
        default=contextlib.nullcontext  # type: ignore[assignment]  # set at once by the capturing plugin
    )
    """Captures output around work that is no item's phase; yields sections to fill."""

    @property
    def rank(self) -> int:
        """0 to world_size - 1."""
        return self.order.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.order.size

    @property
    def scratch_dir(self) -> Path:
        """A folder that every rank sees; see `api.ThisRank`."""
        self.require_shared_folder()
        return scratch_beside(Path(self.checkpoint_dir))

    def require_shared_folder(self) -> None:
        """Raise `WorldError` if not all ranks see `checkpoint_dir`, since they are on nodes
        without a common file system.
        """
        if self.order.place is not None and not self.order.place.shares_folder:
            raise WorldError(
                f"not all nodes see {self.checkpoint_dir!r}, the folder that all ranks share: give "
                "--basetemp a folder on a shared file system"
            )

    def count_groups(self) -> GroupCounter:
        """The counter of this process, at work from the first call on."""
        if self.counter is None:
            self.counter = GroupCounter()
            self.counter.install()
        return self.counter

    def meet(self, operation: str, payload: bytes = b"") -> list[bytes | None]:
        """Every rank's payload, in rank order; waits for all ranks. Collective.

        None for a rank that was lost or stopped because the test asked for it.
        Raises `DivergedError` when a peer asked for something else or will not come.
        """
        __tracebackhide__ = True
        reply = self.channel.ask(Exchange(operation, payload), Met)
        if reply.error:
            error = DivergedError(reply.error)
            error.is_echo = True
            raise error
        return reply.values()

    def say_raised(self, error: BaseException, at_s: float) -> None:
        """Tell the controller which exception this rank is about to report.

        Its class at once, then its text, which the exception's own `__str__` may take long to make.
        """
        self.channel.send(At("reporting", type(error).__name__, at_s))
        self.channel.send(At("reporting", lines_of(error), at_s))

    def say_failing(self, error: BaseException) -> None:
        """Tell the controller that this rank waits for its peers with an error of its own."""
        now = time.monotonic()
        self.channel.send(At("failing", type(error).__name__, now))
        self.channel.send(At("failing", lines_of(error), now, traceback_text(error)))

    def announce_death(self, reason: str) -> None:
        """Tell the controller that the test wants this process to end or stop, and that it will."""
        if self.channel.is_ours:
            self.channel.send(Announce(reason))

    @contextlib.contextmanager
    def announce_failure(self, error: BaseException) -> Iterator[None]:
        """Inside the block, the controller knows the error that this rank wants to send its peers.

        Does nothing in a process that was forked from the rank.
        """
        if not self.channel.is_ours:
            yield
            return
        self.say_failing(error)
        try:
            yield
        finally:
            self.channel.send(At("agreed"))

    @contextlib.contextmanager
    def renew_for_examples(self, fixture: api.RenewedFixture) -> Iterator[None]:
        """Inside the block, `example_runner` renews the fixture for each example."""
        self.renewed.append(fixture)
        try:
            yield
        finally:
            self.renewed.remove(fixture)

    def reseed(self, seed: int) -> None:
        """Seed random, numpy and torch alike on every rank."""
        self.seed = seed
        random.seed(seed)
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None:
            numpy_random.seed(seed % 2**32)
        self.reseed_torch(seed)

    def reseed_torch(self, seed: int) -> None:
        """Seed torch alone: Hypothesis seeds the others for each example."""
        import torch

        # Not torch.manual_seed: for each kind of accelerator it formats a stack trace, 3 ms in all.
        torch.default_generator.manual_seed(seed)
        if self.order.device != "cpu":
            torch.cuda.manual_seed(seed)


def current() -> Rank | None:
    """This process's rank, with what only the harness may know; None outside of a world."""
    rank = api.current_rank()
    return rank if isinstance(rank, Rank) else None
