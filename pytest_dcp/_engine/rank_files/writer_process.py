"""A process that writes one rank's files while the rank goes on: torch's `CheckpointProcess`.

One thread of the rank starts the process and speaks to it: the kernel kills the process when the
thread ends, so the process never outlives its rank. The line, the signs of life and the shared
memory are those of `background`. An error of the writer is the write's; the process goes on.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pytest_dcp._engine.background.saver_process import START_S, SaverProcess
from pytest_dcp._engine.background.state_transfer import pickle_state
from pytest_dcp._engine.background.worker import Begin
from pytest_dcp._engine.rank_files.tied_state import ship_tied
from pytest_dcp._engine.rank_files.writer_orders import CloseWriter, MakeWriter, WriteState
from pytest_dcp._torch_internals.rank_files import (
    CheckpointProcessConfig,
    CheckpointProcessOfTorch,
    RankInfo,
)
from pytest_dcp.errors import SaverProcessError

logger = logging.getLogger("pytest_dcp.checkpoint")

SILENCE_S = 300.0
"""How long a process may give no sign of life while it writes: as long as it may take to start."""


class CheckpointProcess(CheckpointProcessOfTorch):
    """Writes state dicts in a process of its own, one after another.

    torch's class of this name is a base for the sake of `isinstance`; its methods are not used.
    """

    def __init__(
        self,
        rank_info: RankInfo,
        config: CheckpointProcessConfig,
        subprocess_init_fn: Callable[..., Any],
        subprocess_init_args: tuple[Any, ...],
        checkpoint_writer_init_fn: Callable[..., Any],
        checkpoint_writer_init_args: dict[str, Any],
    ) -> None:
        """Start the process in the background; `process_creation_future` is done when it is ready.

        config: how long the two functions may take in the process, once it has imported torch, and
            how long the writer may take to close.
        subprocess_init_fn, subprocess_init_args: called in the process first.
        checkpoint_writer_init_fn, checkpoint_writer_init_args: make the writer there, with
            `rank_info` among the keywords.

        Functions and arguments are sent as pickles; those of `__main__` by value.
        """
        keywords = {"rank_info": rank_info, **checkpoint_writer_init_args}
        writer_recipe = (
            subprocess_init_fn,
            subprocess_init_args,
            checkpoint_writer_init_fn,
            keywords,
        )
        self._config = config
        self._rank_info = rank_info
        self.process: SaverProcess | None = None  # type: ignore[assignment]  # another than torch's
        self._owner = os.getpid()
        self._pending: list[Future[None]] = []
        self._closed = False
        self._end_at_exit: weakref.finalize[..., Any] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="dcp-checkpoint-process")
        self.process_creation_future = self._executor.submit(self._start, writer_recipe)

    def write(
        self, state_dict: dict[str, Any] | Future[dict[str, Any]], path: str, **kwargs: Any
    ) -> Future[None]:
        """Write a state dict to the folder `path`; a future of the end of the write.

        state_dict: staged, or the future of that; it must not change before the write's end.
        kwargs: for the writer's `write`.

        Waits until the process is ready, and raises the error that prevented it. The future gets a
        RuntimeError if the writer raised, with its exception as the cause, or if the process ended.
        """
        if self._closed:
            raise RuntimeError("the CheckpointProcess is closed: make another to go on")
        self.process_creation_future.result()
        future = self._executor.submit(self._write_state, state_dict, path, kwargs)
        self._pending = [one for one in self._pending if not one.done()]
        self._pending.append(future)
        return future

    def close(self) -> None:
        """End the process after the write that is under way; cancel those that have not begun.

        Kills the process if its writer takes longer to close than the configuration allows. May be
        called twice.
        """
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        try:
            ending = self._executor.submit(self._end)  # First: an interrupt may come any moment.
            for future in self._pending:
                future.cancel()
            ending.result()
        finally:  # Also after an interrupt: what has begun ends first.
            self._executor.shutdown(wait=True)
            if self.process is not None:
                self.process.end()

    # ---- in the thread

    def _start(self, writer_recipe: tuple[Any, ...]) -> None:
        line = SaverProcess()
        timeout_s = self._config.subprocess_init_timeout_secs
        try:
            line.ask(Begin(), _nothing, START_S)
            line.ask(MakeWriter(pickle_state(writer_recipe)), _deadline(timeout_s), SILENCE_S)
        except BaseException as error:
            line.end()
            if isinstance(error, _TooLate):
                raise TimeoutError(
                    f"Timed out after {timeout_s}s waiting for checkpoint subprocess to initialize"
                ) from None
            raise _as_torchs(error) from error
        self.process = line
        self._end_at_exit = weakref.finalize(self, line.end)

    def _write_state(
        self,
        state_dict: dict[str, Any] | Future[dict[str, Any]],
        path: str,
        keywords: dict[str, Any],
    ) -> None:
        state = state_dict.result() if isinstance(state_dict, Future) else state_dict
        line = self.process
        if line is None or not line.is_alive():
            raise RuntimeError("Child process terminated unexpectedly: there is none to write")
        shipment = ship_tied((os.fspath(path), state, keywords))
        memory = shipment.memory
        order = WriteState(shipment.pickled, memory.nbytes if memory else 0)
        try:
            line.ask(order, _nothing, SILENCE_S, memory.fd if memory else None)
        except Exception as error:
            raise _as_torchs(error) from error

    def _end(self) -> None:
        line, self.process = self.process, None
        if line is None:
            return
        timeout_s = self._config.subprocess_shutdown_timeout_secs
        try:
            if line.is_alive():
                line.ask(CloseWriter(), _deadline(timeout_s), SILENCE_S)
        except _TooLate:
            logger.warning("a writer has not closed after %s s: its process is killed", timeout_s)
        except SaverProcessError as error:
            logger.warning("the checkpoint process did not close its writer: %s", error)
        except Exception as error:
            raise _as_torchs(error) from error
        finally:
            line.end()
            if self._end_at_exit is not None:
                self._end_at_exit.detach()


class _TooLate(Exception):
    """The time of an order is over. Not an OSError, which would stand for a broken line."""


def _as_torchs(error: BaseException) -> BaseException:
    """The error for the caller: of torch's class, and with torch's beginning."""
    if not isinstance(error, Exception):
        return error
    if isinstance(error, SaverProcessError):
        return RuntimeError(f"Child process terminated unexpectedly: {error}")
    return RuntimeError(f"Unexpected response from worker process: {type(error).__name__}: {error}")


def _nothing() -> None:
    """No reason to stop waiting."""


def _deadline(timeout_s: float) -> Callable[[], None]:
    """A check that raises `_TooLate` once the time is over."""
    until_s = time.monotonic() + timeout_s

    def check() -> None:
        if time.monotonic() > until_s:
            raise _TooLate

    return check
