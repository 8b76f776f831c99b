"""The rank that runs this code: the requests open to tests, fixtures and faults.

The harness, the faults and the properties meet only here. A rank enters itself with `enter_rank`
when its process starts; all other code calls `current_rank()`. Outside of a world that is None, and
the functions below do nothing, so that the same code runs in a plain test:

    >>> from pytest_dcp.api import announce_death, current_rank
    >>> current_rank() is None
    True
    >>> announce_death("no world, so nothing is sent")

In a world, a library that ends its own process says so first, and the test passes:

    @pytest.mark.world_size(2)
    def test_a_peer_exits(rank):
        if rank == 1:
            announce_death("the trainer gives up")
            os._exit(1)

Imports neither torch nor pytest.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

__all__ = [
    "RenewedFixture",
    "ThisRank",
    "announce_death",
    "announce_failure",
    "current_rank",
    "enter_rank",
]


class RenewedFixture(Protocol):
    """A fixture's value that starts afresh for each example of a property."""

    def renew(self) -> None:
        """An example begins."""

    def check(self) -> None:
        """The example has ended in all ranks. Raises when something is wrong with it."""


class ThisRank(Protocol):
    """This process as a rank of its world."""

    @property
    def rank(self) -> int:
        """0 to world_size - 1."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    @property
    def scratch_dir(self) -> Path:
        """A folder that every rank sees, beside `checkpoint_dir`; emptied for each example.

        It may not exist yet. It is removed when the test has ended.
        """

    def meet(self, operation: str, payload: bytes = b"") -> list[bytes | None]:
        """Every rank's payload, in rank order; waits for all ranks. Collective.

        operation: its purpose; all ranks must say the same. No process group is used.

        The payload is None for a rank that was lost or stopped because the test asked for it.
        Raises `DivergedError` when a peer called something else or will not come.
        """

    def announce_death(self, reason: str) -> None:
        """See the function `announce_death`."""

    def announce_failure(self, error: BaseException) -> AbstractContextManager[None]:
        """See the function `announce_failure`."""

    def renew_for_examples(self, fixture: RenewedFixture) -> AbstractContextManager[None]:
        """Inside the block, call `renew` and `check` around each example of a property."""


_rank: ThisRank | None = None


def current_rank() -> ThisRank | None:
    """This process's rank; None outside of a world."""
    return _rank


def enter_rank(rank: ThisRank) -> None:
    """Let this process be `rank`, until it ends. For launchers of ranks."""
    global _rank
    _rank = rank


def announce_death(reason: str) -> None:
    """Tell the controller that this process is about to end or stop because the test wants it to.

    reason: for people: the code that asked for it, and where.

    Call it right before `os._exit`, or `os.kill` with SIGKILL or SIGSTOP, from any thread. That end
    then fails no test, but a rank that lives on does. Does nothing outside of a world, nor in a
    process forked from a rank.
    """
    if _rank is not None:
        _rank.announce_death(reason)


def announce_failure(error: BaseException | None) -> AbstractContextManager[None]:
    """Inside the block, this rank waits for its peers in order to send them its own error.

    If they never come, because they hang, the test fails with this error and not with a timeout.
    Does nothing without an error, nor outside of a world.
    """
    if error is None or _rank is None:
        return nullcontext()
    return _rank.announce_failure(error)
