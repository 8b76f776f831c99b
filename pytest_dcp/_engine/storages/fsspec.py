"""Checkpoints wherever fsspec reaches: `s3://bucket/folder`, `gs://`, `memory://`, `file://` ...

Files and guarantees are the same as for local folders. A store that cannot rename commits by one
put of `.metadata`, which happens whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from io import IOBase
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, SerializationFormat

from pytest_dcp._engine.io.checked_ranges import Verify
from pytest_dcp._engine.io.object_disk import ObjectDisk, is_there
from pytest_dcp._engine.storages import local_filesystem
from pytest_dcp._engine.storages.folder_reader import FileSystemReader
from pytest_dcp._engine.storages.folder_writer import FileSystemWriter
from pytest_dcp._torch_internals.checkpoint_classes import (
    ExtensionRegistry,
    StreamTransformExtension,
)

Id = str | os.PathLike[str]

READERS = 8
"""Threads of a load: they wait for the network, not for a processor."""


class FileSystem(FileSystemBase):
    """The fsspec file system of a path."""

    def __init__(self) -> None:
        self.fs: Any = None
        self.options: dict[str, Any] = {}
        self.path_of: dict[str, str] = {}
        """The file system's own name of a path: without protocols."""

    @property
    def disk(self) -> ObjectDisk:
        """How the engine accesses it."""
        return ObjectDisk(self.fs, self.path_of)

    @contextmanager
    def create_stream(self, path: Id, mode: str) -> Generator[IOBase, None, None]:
        """A stream that leaves no file behind if writing fails."""
        with self.fs.open(os.fspath(path), mode) as stream:
            try:
                yield stream
            except BaseException:
                if "r" not in mode:
                    stream.close()
                    self.fs.rm_file(os.fspath(path))
                raise

    def concat_path(self, path: Id, suffix: str) -> Id:
        return f"{os.fspath(path).rstrip('/')}/{suffix}"

    def init_path(self, path: Id, **options: Any) -> Id:
        """The path; from now on this is its file system.

        options: for that file system, kept for later paths.

        Raises ImportError naming the package that a protocol needs, ValueError for an unknown one
        or for options that the file system refuses.
        """
        from fsspec.core import url_to_fs

        self.options |= options
        try:
            self.fs, self.path_of[os.fspath(path)] = url_to_fs(os.fspath(path), **self.options)
        except ImportError as error:
            raise ImportError(f"{os.fspath(path)!r} cannot be reached: {error}") from error
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"the file system of {os.fspath(path)!r} cannot be opened with the options "
                f"{', '.join(self.options) or 'that it was given (none)'}: {error}"
            ) from error
        return path

    def rename(self, path: Id, new_path: Id) -> None:
        self.fs.mv(os.fspath(path), os.fspath(new_path))

    def mkdir(self, path: Id) -> None:
        self.fs.makedirs(os.fspath(path), exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Id) -> bool:
        """Whether the id is a URL of a protocol that fsspec knows."""
        from fsspec import available_protocols
        from fsspec.core import split_protocol
        from fsspec.registry import registry

        if isinstance(checkpoint_id, Path):
            return False
        outermost = os.fspath(checkpoint_id).split("::")[0]
        protocol = split_protocol(outermost)[0] or outermost
        # The registry also has classes that a program has registered.
        return protocol in registry or protocol in available_protocols()

    def exists(self, path: Id) -> bool:
        self.fs.invalidate_cache(os.fspath(path))
        return is_there(self.fs, os.fspath(path))

    def rm_file(self, path: Id) -> None:
        self.fs.rm_file(os.fspath(path))

    def ls(self, path: Id) -> list[str]:
        self.fs.invalidate_cache(os.fspath(path))
        names: list[str] = self.fs.ls(os.fspath(path), detail=False)
        return names


def open_filesystem(
    path: Id, options: dict[str, Any], *, follow_links: bool = False
) -> tuple[FileSystemBase, Id]:
    """The file system of a path, and its own form of the path; local paths use the engine's own."""
    from fsspec.implementations.local import LocalFileSystem

    remote = FileSystem()
    remote.init_path(path, **options)
    if type(remote.fs) is not LocalFileSystem:
        return remote, path
    local = local_filesystem.FileSystem(follow_links=follow_links)
    return local, local.init_path(remote.path_of[os.fspath(path)])


class FsspecWriter(FileSystemWriter):
    """Writes a checkpoint to wherever fsspec reaches."""

    def __init__(
        self,
        path: Id,
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        overwrite: bool = True,
        _extensions: Sequence[StreamTransformExtension] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
        *,
        storage_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As FileSystemWriter's. kwargs and storage_options: of the file system, such as keys and
        endpoints; in the latter an option may have the name of another parameter."""
        super().__init__(
            path,
            single_file_per_rank,
            sync_files,
            thread_count,
            per_thread_copy_ahead,
            overwrite=overwrite,
            _extensions=_extensions,
            serialization_format=serialization_format,
        )
        self.options = kwargs | dict(storage_options or {})
        self.fs, self.path = open_filesystem(path, self.options)

    def _point_at(self, checkpoint_id: Id) -> None:
        self.fs, self.path = open_filesystem(checkpoint_id, self.options)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Id) -> bool:
        """Whether the id is a URL of a protocol that fsspec knows."""
        return FileSystem.validate_checkpoint_id(checkpoint_id)


class FsspecReader(FileSystemReader):
    """Reads checkpoints from wherever fsspec reaches."""

    def __init__(
        self,
        path: Id,
        _extension_registry: ExtensionRegistry | None = None,
        *,
        verify: Verify = "auto",
        thread_count: int | None = None,
        max_decoded_bytes: int | None = None,
        follow_links: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As FileSystemReader's, but for 8 threads. kwargs and storage_options: as the writer's."""
        super().__init__(
            path,
            _extension_registry,
            verify=verify,
            thread_count=thread_count,
            max_decoded_bytes=max_decoded_bytes,
            follow_links=follow_links,
        )
        self.options = kwargs | dict(storage_options or {})
        self.fs, self.path = open_filesystem(path, self.options, follow_links=follow_links)
        if thread_count is None and isinstance(self.fs, FileSystem):
            self.thread_count = READERS

    def _point_at(self, checkpoint_id: Id) -> None:
        self.fs, self.path = open_filesystem(
            checkpoint_id, self.options, follow_links=self.follow_links
        )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Id) -> bool:
        """Whether the id is a URL of a protocol that fsspec knows."""
        return FileSystem.validate_checkpoint_id(checkpoint_id)
