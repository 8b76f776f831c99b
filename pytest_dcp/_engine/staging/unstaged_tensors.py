"""The tensors of a state that were left where they are, and the caller that waits for them.

`async_save(staging_budget=)` copies as much of a state as the budget allows. The rest is written
straight from the caller's memory, before everything else, and the call returns once that is done:

    caller:      copy what fits | wait ................. | training goes on
    save thread:                | plan | write the rest  | write the copies | commit

So memory is bounded without a pipeline of buffers, and the wait is the least that the budget
allows: a buffer that is filled again as it is written would also be free only after all but
`staging_budget` bytes of the state are written.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from pytest_dcp.errors import CheckpointError


class UnstagedTensors:
    """Tensors that a save reads from their own memory, until they are written."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        """tensors: they must not change before `wait` has returned."""
        self.nbytes = sum(tensor.nbytes for tensor in tensors)
        # An address serves for any view, and for the shard that a DTensor wraps.
        self._addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}
        self._go_on = threading.Event()
        self._lock = threading.Lock()
        self._written = self._may_have_changed = False

    def hold(self, tensor: object) -> bool:
        """Whether the tensor's values are in memory that was not copied."""
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            return False
        try:
            return tensor.untyped_storage().data_ptr() in self._addresses
        except (RuntimeError, NotImplementedError):  # a wrapper, which has no storage of its own
            return False

    def finish_writing(self) -> None:
        """Let the caller go on: the values are written.

        Raises CheckpointError if the caller has stopped waiting before.
        """
        with self._lock:
            if self._may_have_changed and not self._written:
                raise CheckpointError(
                    "async_save was interrupted while it waited for tensors that did not fit into "
                    "staging_budget: they may have changed since, so they are not saved"
                )
            self._written = True
        self._go_on.set()

    def end(self) -> None:
        """Let the caller go on: the save is over, however it ended."""
        self._go_on.set()

    def wait(self) -> None:
        """Return once the values are written or the save is over.

        If an exception ends the wait (Ctrl-C), the save fails: its tensors may change now.
        """
        try:
            self._go_on.wait()
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Let the save fail unless the values are written: nothing waits for them any more."""
        with self._lock:
            self._may_have_changed = True


_current: ContextVar[tuple[UnstagedTensors | None, object]] = ContextVar(
    "unstaged_tensors", default=(None, None)
)


@contextmanager
def written_first(tensors: UnstagedTensors | None, writer: object) -> Iterator[None]:
    """Let this storage, if it is called inside, write these tensors before the others."""
    token = _current.set((tensors, writer))
    try:
        yield
    finally:
        _current.reset(token)


def unstaged_tensors(writer: object) -> UnstagedTensors | None:
    """The tensors that this storage should write first in the current save.

    None for a storage that another one calls: it need not be the last to read the tensors.
    """
    tensors, own = _current.get()
    return tensors if own is writer else None
