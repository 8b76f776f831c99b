"""Regions between two collectives, which no rank may leave alone.

A rank that raises there still goes on to the next collective, and reports there that it failed;
then all ranks raise: this rank its own exception, the others an exception that names this rank. So
no rank waits for a peer that has left. Collective over the default process group.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

from pytest_dcp.errors import CheckpointError

T = TypeVar("T")


class Agreement:
    """This rank's work in a region: its first exception skips the rest."""

    def __init__(self, doing: str) -> None:
        """doing: for the message, as in "while rank 0's model was received"."""
        self.doing = doing
        self.failure: Exception | None = None

    def run(self, work: Callable[[], T]) -> T | None:
        """The result of the work; None if it, or work before it, failed."""
        if self.failure is None:
            try:
                return work()
            except Exception as error:  # noqa: BLE001 - raised by `settle`, when all ranks are there
                self.failure = error
        return None

    def settle(self) -> None:
        """Raise on every rank if any rank has failed. Collective."""
        failure_text = None if self.failure is None else _text_of(self.failure)
        every: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(every, failure_text)
        if self.failure is not None:
            raise self.failure
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(every) if text is not None]
        if failed:
            raise CheckpointError(f"{self.doing}: {'; '.join(failed)}")


@contextmanager
def raise_on_all_ranks(doing: str) -> Iterator[None]:
    """Raise on every rank if the block raises on any rank. Collective at its end."""
    agreement = Agreement(doing)
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised by `settle`
        agreement.failure = error
    agreement.settle()


def _text_of(error: Exception) -> str:
    return "".join(traceback.format_exception_only(error)).strip()
