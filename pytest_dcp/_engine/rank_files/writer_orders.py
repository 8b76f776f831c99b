"""Orders for the process that writes one rank's files; see `background.worker`, which runs them."""

from __future__ import annotations

import pickle
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

from pytest_dcp._engine.rank_files.tied_state import unpickle_tied

_writer: list[Any] = []
"""The process's writer, once it is made."""


@dataclass(frozen=True, slots=True)
class MakeWriter:
    """Run the user's initialization, and make the writer."""

    pickled: bytes
    """The initialization and its arguments, the function that makes a writer and its keywords."""

    def run(self, line: Connection) -> None:
        initialize, arguments, make, keywords = pickle.loads(self.pickled)
        initialize(*arguments)
        _writer[:] = [make(**keywords)]


@dataclass(frozen=True, slots=True)
class WriteState:
    """Let the writer write a state."""

    pickled: bytes
    """The path, the state and the keywords of `write`."""
    nbytes: int
    """Bytes of the shared memory, whose descriptor follows; 0: no memory follows."""

    def run(self, line: Connection) -> None:
        fd = recv_handle(line) if self.nbytes else None
        path, state, keywords = unpickle_tied(self.pickled, fd, self.nbytes)
        written = _writer[0].write(path=path, state_dict=state, **keywords)
        if isinstance(written, Future):
            written.result()


@dataclass(frozen=True, slots=True)
class CloseWriter:
    """Close the writer: the process is about to end."""

    def run(self, line: Connection) -> None:
        while _writer:
            _writer.pop().close()
