"""A rank's background process for `async_save`: started, kept for later saves, replaced, ended.

Orders and answers go over a pair of sockets; the other end is `worker`. The ranks' processes form
their own process group, with the same ranks and size, in which they save like any ranks. Each rank
has one thread for this, which starts the process and makes the rank's saves one after another.

A rank gives its process these orders; each gets one answer, a value or an error:

    Begin                imports done?           after the start
    Host                 the port of a store     to the coordinator's process, where all will meet
    Join                 nothing                 form the process group
    Upload, + memory     packed metadata         save this state; its tensors are in shared memory

While the process carries out an order it also sends a `Beat` every quarter of a second, with the
progress of its save.

The ranks' own team runs the steps of one save; all ranks raise a failure in any step:

1. "prepare": each rank stages its state into shared memory and pickles the rest. It reports which
   meeting its process has joined, or nothing if the process is gone.
2. Unless all processes live and have joined one meeting, each rank ends its process and they begin
   anew. "start": each rank starts another. "meet": the coordinator's process opens a store, and the
   meeting gets a name. "join": all join. Later saves skip these until a process is lost.
3. "save": each rank sends its `Upload` and waits. The processes plan, write and commit among
   themselves. The ranks' futures get the metadata.

After a death or a silence:

- A process ends, for any reason: its line breaks, and its rank raises SaverProcessError. The
  others' saves fail through the processes' own group. The next save finds one missing in step 1.
- A process is silent for the group's timeout: its rank kills it, which is the case above.
- The caller's `progress` raises: its rank kills the process, and raises that exception.
- Another rank's save fails: this rank's process must fail too, and has `saver_process.GRACE_S` to
  report it; then the rank kills it, as it may hang in a collective with a process that is gone.
- The rank ends: the kernel kills the process with the thread that started it (PR_SET_PDEATHSIG); so
  that thread lives as long as the saver. The old checkpoint remains unless the save was committed.
- The rank forks: the child has neither thread nor process, and begins without them.

Assumes that storage writer and planner can be pickled, and that the background processes reach each
other over TCP. Guarantees that saves of a group are made in the order of their calls, and that no
process outlives its rank.
"""

from __future__ import annotations

import os
import threading
import uuid
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from pytest_dcp._engine import operating_system
from pytest_dcp._engine.background.saver_process import LOOK_S, START_S, SaverProcess
from pytest_dcp._engine.background.state_transfer import Shipment, pickle_state, ship_state
from pytest_dcp._engine.background.worker import (
    Begin,
    Host,
    Join,
    Upload,
)
from pytest_dcp._engine.coordinate import StepError, Team
from pytest_dcp._engine.coordinate.machines import machine
from pytest_dcp._engine.coordinate.peer_listener import peer_listener
from pytest_dcp._engine.coordinate.rendezvous import timeout_of
from pytest_dcp._engine.io.progress_observer import Progress, shown_while_working
from pytest_dcp._engine.verbs.save_messages import decode_metadata
from pytest_dcp.errors import SaverProcessError
from pytest_dcp.tracebacks import forget_frames, forget_locals

State = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """One save."""

    team: Team
    """Of the rank's own side of the save."""
    state: State
    """Returns the staged state, or raises the error that prevented staging."""
    how: bytes
    """The storage writer and the planner, pickled."""
    checkpoint_id: str | os.PathLike[str] | None
    """The id to set the writer to; None: it is already set."""
    use_collectives: bool
    progress: Callable[[Progress], None] | None = None
    """Called in this rank with the progress of its process; its exception ends the save."""


def save_in_process(job: Job) -> Future[Metadata]:
    """A future of the metadata; the save goes on in this rank's background process."""
    return _saver_of(job.team.group).submit(job)


def pickle_for_process(writer: StorageWriter, planner: SavePlanner | None) -> bytes:
    """The writer and the planner for the background process.

    Raises a TypeError that names the object that cannot be sent.
    """
    for name, value in (("storage_writer", writer), ("planner", planner)):
        try:
            pickle_state(value)
        except Exception as error:
            raise TypeError(
                f"the {name}, a {type(value).__name__}, cannot be pickled, which a save in a "
                f"process needs: {error}. Save in a thread, or leave attributes that cannot be "
                "pickled out of its __getstate__"
            ) from error
    return pickle_state((writer, planner))


class Saver:
    """The saves of one group in this rank's background process, one after another."""

    def __init__(self) -> None:
        # The thread lives as long as this: the kernel ends the process with the thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dcp-async-process")
        self._jobs: list[tuple[Job, Future[Metadata]]] = []
        self._queued = threading.Condition()
        self._line: SaverProcess | None = None
        self._meeting = ""
        """Name of the group that the process joined, the same in all ranks; empty before."""
        self._owner = os.getpid()

    def submit(self, job: Job) -> Future[Metadata]:
        """A future of the save's metadata."""
        future: Future[Metadata] = Future()
        with self._queued:
            self._jobs.append((job, future))
            self._queued.notify_all()
        self._thread.submit(self._save_next)
        return future

    def close(self) -> None:
        """End the process."""
        if os.getpid() != self._owner:
            return  # a fork's copy
        self._thread.shutdown(wait=False)
        line, self._line = self._line, None
        if line is not None:
            line.end()

    def _save_next(self) -> None:
        """Make one save: the first whose turn has come, which need not be the first submitted."""
        job, future = self._take_due()
        if not future.set_running_or_notify_cancel():
            job.team.refuse(CancelledError("the future of this save was cancelled"))
            return
        try:
            metadata = self._save(job)
        except BaseException as error:  # noqa: BLE001 - the future's, whatever it is
            del job  # with the copy of the state: its memory is free for the next one now
            forget_locals(error)
            forget_frames(error)
            future.set_exception(error)
        else:
            del job
            future.set_result(metadata)

    def _take_due(self) -> tuple[Job, Future[Metadata]]:
        with self._queued:
            while True:
                for entry in self._jobs:
                    if entry[0].team.is_due:
                        self._jobs.remove(entry)
                        return entry
                self._queued.wait(LOOK_S)

    def _save(self, job: Job) -> Metadata:
        group = job.team.group
        default_s = dist.constants.default_pg_timeout.total_seconds()
        silence_s = default_s if group is None else timeout_of(group)
        progress = job.progress  # the function below must not hold the job, and so the state
        with job.team.wait_for_turn() as team:
            try:
                shipment, line = self._prepare_process(team, job, silence_s)
                upload = Upload(
                    shipment.pickled,
                    job.how,
                    shipment.memory.nbytes if shipment.memory else 0,
                    group is None,
                    job.use_collectives,
                    job.checkpoint_id,
                )
                fd = shipment.memory.fd if shipment.memory else None
                with shown_while_working(progress):
                    encoded_metadata = team.agree(
                        "save",
                        lambda: line.ask(upload, team.check, silence_s, fd, progress=progress),
                    )
            except StepError as error:
                # Its text says all that this one says; this one stays the context, for debuggers.
                raise _without_passed_on_errors(error) from None
        return decode_metadata(encoded_metadata)

    def _prepare_process(
        self, team: Team, job: Job, silence_s: float
    ) -> tuple[Shipment, SaverProcess]:
        """The state to send, and a process that has joined the others'."""
        shipments: list[Shipment] = []

        def prepare() -> tuple[str, str]:
            shipments.append(ship_state(job.state()))
            alive = self._line is not None and self._line.is_alive()
            return self._meeting if alive else "", machine()

        rank_values = team.all_gather("prepare", prepare)
        meetings, machines = (
            {meeting for meeting, _ in rank_values},
            {where for _, where in rank_values},
        )
        if len(meetings) != 1 or "" in meetings:
            self._begin(team, silence_s, one_machine=len(machines) == 1)
        if self._line is None:
            raise SaverProcessError("there is no background process: the group was destroyed")
        return shipments[0], self._line

    def _begin(self, team: Team, silence_s: float, *, one_machine: bool) -> None:
        """Start the ranks' processes anew, and let them meet."""
        if self._line is not None:
            self._line.end()
        self._meeting = ""
        line = self._line = team.agree("start", lambda: _start_process(team))
        if team.group is not None:

            def meet() -> tuple[str, int, tuple[str, ...], str]:
                port = line.ask(Host(silence_s, one_machine), team.check, START_S)
                address = peer_listener().address
                return uuid.uuid4().hex, port, address.hosts, address.machine

            meeting, port, hosts, there = team.broadcast("meet", meet)
            join = Join(team.rank, team.size, port, hosts, there, silence_s, one_machine)
            team.agree("join", lambda: line.ask(join, team.check, START_S))
        else:
            meeting = "alone"
        self._meeting = meeting


def _start_process(team: Team) -> SaverProcess:
    line = SaverProcess()
    try:
        line.ask(Begin(), team.check, START_S)
    except BaseException:
        line.end()
        raise
    return line


def _without_passed_on_errors(error: StepError) -> StepError:
    """The failures of the processes' own save, instead of the ranks' errors that pass them on.

    The end of a process is reported by its own rank, which saw it.
    """
    failures = {}
    step = error.step
    for cause, _ in error.failures.values():
        if isinstance(cause, StepError):
            failures.update(cause.failures)
            step = cause.step
    failures.update(
        (rank, failure)
        for rank, failure in error.failures.items()
        if not isinstance(failure[0], StepError)
    )
    return StepError(step, failures, "save")


_savers: weakref.WeakKeyDictionary[dist.ProcessGroup, Saver] = weakref.WeakKeyDictionary()
_alone: list[Saver] = []
_making = threading.Lock()


def _saver_of(group: dist.ProcessGroup | None) -> Saver:
    """This process's saver of a group, or of this rank alone."""
    with _making:
        if group is None:
            if not _alone:
                _alone.append(Saver())
                weakref.finalize(_alone[0], _alone[0].close)
            return _alone[0]
        saver = _savers.get(group)
        if saver is None:
            saver = _savers[group] = Saver()
            weakref.finalize(group, saver.close)
        return saver


def _forget_in_child() -> None:
    """A forked child has neither the threads nor the processes."""
    global _making
    _making = threading.Lock()
    _alone.clear()
    _savers.clear()


operating_system.call_in_forked_children(_forget_in_child)
