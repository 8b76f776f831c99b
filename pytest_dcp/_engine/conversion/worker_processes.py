"""Conversions in several processes: each opens the source, and writes its share of the target.

A thread for each process starts it, gives it one order after another, and waits for the answers.
The process and the line to it are those of `async_save` in a process, see
`background.saver_process`. Orders are taken from one list, so a process that is fast gets more.

- An order fails: its error is raised here, after the other processes have been killed.
- A process ends: its thread raises SaverProcessError, which says how.
- Ctrl-C, or another error here: the threads kill their processes within a moment.
- This process ends, however: the kernel kills the others (PR_SET_PDEATHSIG).

The caller removes unfinished files afterwards: no process writes any more.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.background.saver_process import START_S, SaverProcess
from pytest_dcp._engine.background.worker import Begin, Order
from pytest_dcp._engine.conversion.converted_contents import ConvertedTensor
from pytest_dcp._engine.huggingface.consolidate import Report
from pytest_dcp._engine.io.threads import StopFlag, run_all
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint, open_checkpoint
from pytest_dcp.errors import CheckpointReplacedError, SaverProcessError

SILENCE_S = 600.0
"""How long a process may give no sign of life: a machine that swaps may stop one for minutes."""
WORTH_BYTES = 8 << 30
"""From this size on several processes pay: each takes seconds to start."""
MOST_PROCESSES = 4
"""That are started unless more are asked for: a disk is seldom faster than these."""


class ConversionOrder(Order, Protocol):
    """A share of the work, for one process."""

    @property
    def tensors(self) -> Sequence[ConvertedTensor]:
        """The tensors that it writes, in the order in which it counts them."""


@dataclass(frozen=True, slots=True)
class SourceToOpen:
    """The source, for processes that open it themselves."""

    path: str
    opening: Mapping[str, Any]
    """The arguments of `open_checkpoint`."""
    identity: str
    """Of the save that this process has opened."""

    @classmethod
    def of(cls, checkpoint: OpenCheckpoint) -> SourceToOpen:
        """The source as it was opened here."""
        return cls(checkpoint.where, checkpoint.opening, checkpoint.identify())

    def open(self) -> OpenCheckpoint:
        """The same save. Raises CheckpointReplacedError if another one is there now."""
        checkpoint = open_checkpoint(self.path, **self.opening)
        if checkpoint.identify() == self.identity:
            return checkpoint
        checkpoint.close()
        raise CheckpointReplacedError(
            f"the checkpoint in {self.path} was replaced or written over while it was converted: "
            "convert it again"
        )


@dataclass(frozen=True, slots=True)
class OpenSource:
    """Open the source, for the orders that follow."""

    source: SourceToOpen
    threads: int
    """Of torch, in this process."""

    def run(self, line: Connection) -> None:
        torch.set_num_threads(self.threads)
        _opened[:] = [self.source.open()]


_opened: list[OpenCheckpoint] = []
"""The source, once it is open, in a process that carries out orders."""


def opened_source() -> OpenCheckpoint:
    """The source that this process has opened."""
    return _opened[0]


def choose_processes(processes: int | None, nbytes: int, jobs: int, *places: Any) -> int:
    """How many processes to use.

    processes: as asked for; None: several if the work is large. jobs: that can be shared out.
    places: paths or URLs of source and target.

    Raises ValueError for less than one, and for several where they are not possible.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be 1 or more, got {processes}")
    reason = _reason_against_several(places)
    if processes is None:
        pays = nbytes >= WORTH_BYTES and reason is None
        return min(MOST_PROCESSES, operating_system.usable_cores(), max(1, jobs)) if pays else 1
    if processes > 1 and reason is not None:
        raise ValueError(f"several processes are not possible: {reason}; leave out processes")
    return max(1, min(processes, jobs))


def _reason_against_several(places: Sequence[Any]) -> str | None:
    if not operating_system.has_saver_processes():
        return "they need Linux"
    for place in places:
        if isinstance(place, str) and place.startswith("memory:"):
            return f"{place} is in the memory of this process, which others do not see"
    return None


def run_orders(
    checkpoint: OpenCheckpoint,
    orders: Sequence[ConversionOrder],
    processes: int,
    report: Report,
) -> list[Any]:
    """Carry out the orders in several processes; returns their answers.

    checkpoint: the source, open in this process; the others open it again.
    report: called with the name of each tensor that is written, from any thread.

    Raises the first error; by then all processes have ended.
    """
    source = SourceToOpen.of(checkpoint)
    answers: list[Any] = [None] * len(orders)
    waiting = list(range(len(orders)))
    lock = threading.Lock()

    def take() -> int | None:
        with lock:
            return waiting.pop(0) if waiting else None

    def drive(stop: StopFlag) -> None:
        line = SaverProcess()
        try:
            line.ask(Begin(), stop.check, START_S)
            threads = max(1, torch.get_num_threads() // processes)
            line.ask(OpenSource(source, threads), stop.check, SILENCE_S)
            while (number := take()) is not None:
                answers[number] = _ask(line, orders[number], stop, report)
        except SaverProcessError as error:
            raise SaverProcessError(
                f"a process of the conversion ended early ({error}): it was killed, perhaps for "
                "lack of memory"
            ) from error
        finally:
            line.end()

    # At least two threads: a process ends with the thread that started it.
    run_all([drive] * processes, processes)
    return answers


def _ask(line: SaverProcess, order: ConversionOrder, stop: StopFlag, report: Report) -> Any:
    remaining = iter(order.tensors)

    def advance(count: int) -> None:
        for tensor in islice(remaining, count):
            report(tensor.name)

    answer = line.ask(order, stop.check, SILENCE_S, advance=advance)
    advance(len(order.tensors))  # the ones that it has not counted
    return answer
