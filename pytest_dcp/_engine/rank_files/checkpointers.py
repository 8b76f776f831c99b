"""Saves and loads of one rank's files: torch's `SyncCheckpointer` and `AsyncCheckpointer`."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from pytest_dcp._engine.background.futures import wrap_future
from pytest_dcp._engine.rank_files.reader import CheckpointReader
from pytest_dcp._engine.rank_files.writer import CheckpointWriter
from pytest_dcp._engine.rank_files.writer_process import CheckpointProcess
from pytest_dcp._torch_internals.rank_files import (
    Checkpointer,
    CheckpointStager,
    checkpointers_of_torch,
)


class _LoadingCheckpointer(Checkpointer):
    """The half that both checkpointers share: a load is done when it returns."""

    _reader: CheckpointReader

    def load(
        self,
        path: str,
        state_dict: dict[str, Any] | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """This rank's state dict in the folder `path`; see `CheckpointReader.read`.

        strict: raise RuntimeError if the checkpoint lacks keys of `state_dict`.
        """
        loaded, missing = self._reader.read(
            path=path, state_dict=state_dict, map_location=default_map_location, **kwargs
        )
        if strict and missing:
            raise RuntimeError(f"Checkpoint at {path} is missing keys: {missing}")
        return loaded


class SyncCheckpointer(_LoadingCheckpointer):
    """Saves and loads, each before it returns."""

    def __init__(self, writer: CheckpointWriter, reader: CheckpointReader) -> None:
        self._writer = writer
        self._reader = reader

    def save(self, path: str, state_dict: dict[str, Any], **kwargs: Any) -> None:
        """Write this rank's state dict to the folder `path`; kwargs are for the writer.

        Every rank calls it if there is a barrier.
        """
        self._writer.write(path, state_dict, **kwargs)

    def close(self) -> None:
        """Close the writer."""
        self._writer.close()


class AsyncCheckpointer(_LoadingCheckpointer):
    """Saves in the background, in a process; loads before it returns."""

    def __init__(
        self,
        checkpoint_stager: CheckpointStager,
        checkpoint_process: CheckpointProcess,
        reader: CheckpointReader,
    ) -> None:
        self._checkpoint_stager = checkpoint_stager
        self._checkpoint_process = checkpoint_process
        self._reader = reader
        self._write_future: Future[Any] | None = None

    def save(
        self, path: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[Future[None], Future[None]]:
        """Stage the state dict and write it: the futures of the end of each.

        First waits for the save before, and raises its error. kwargs are for stager and writer.
        """
        before, self._write_future = self._write_future, None
        if before is not None:
            before.result()
        staged = self._checkpoint_stager.stage(state_dict=state_dict, **kwargs)
        written = self._checkpoint_process.write(staged, path, **kwargs)
        self._write_future = written
        return wrap_future(staged), written

    def close(self) -> None:
        """Close the stager and the process, after the save that is under way."""
        try:
            self._checkpoint_stager.close()
        finally:
            self._checkpoint_process.close()


checkpointers_of_torch.SyncCheckpointer.register(SyncCheckpointer)
checkpointers_of_torch.AsyncCheckpointer.register(AsyncCheckpointer)
