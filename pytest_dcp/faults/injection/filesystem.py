"""A wrapper of torch's `FileSystemBase`: its calls and streams are storage operations.

Faults of operations thus also act on file systems that the kernel does not know: object stores,
memory. Each call is one operation, of the same kinds as on files; a path is the one passed to the
file system, relative to the watched folder if it is below one.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystemBase

from pytest_dcp.faults.crashes.trace import Tree
from pytest_dcp.faults.injection.injector import Injector
from pytest_dcp.faults.tap.operation import Operation, OperationKind
from pytest_dcp.faults.tap.watches import Registry, Watch, Watcher

Where = str | os.PathLike[str]


class FaultyFileSystem(FileSystemBase):
    """Any file system, with faults at its operations. Other attributes are the inner one's."""

    def __init__(self, inner: FileSystemBase, injector: Injector) -> None:
        self._inner = inner
        self._injector = injector
        self._registry = Registry()
        # One root above every path, whatever its scheme: see `_spell_path`.
        self._watcher = _StoreWatcher(injector)
        self._registry.add(Watch(("/",), self._watcher, injector.rank, observing=False))

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # not set yet while it is being copied or unpickled
            raise AttributeError(name)
        return getattr(self._inner, name)

    @contextmanager
    def create_stream(self, path: Where, mode: str) -> Generator[io.IOBase, None, None]:
        """The inner file system's stream, each read and write an operation."""
        kind: OperationKind = "create" if "w" in mode or "x" in mode else "open"
        opened = self._inner.create_stream(path, mode)
        stream = self._do(Operation(kind, _spell_path(path)), opened.__enter__)
        faulty = FaultyStream(stream, lambda op, act: self._perform(op, act), _spell_path(path))
        try:
            yield cast(io.IOBase, faulty)
        except BaseException as error:
            with self._injector.covered():
                if not opened.__exit__(type(error), error, error.__traceback__):
                    raise
        else:
            close = Operation("close", _spell_path(path))
            self._do(close, lambda: opened.__exit__(None, None, None))

    def concat_path(self, path: Where, suffix: str) -> Where:
        """Like the inner file system."""
        return self._inner.concat_path(path, suffix)

    def init_path(self, path: Where) -> Where:
        """Like the inner file system."""
        return self._inner.init_path(path)

    def rename(self, path: Where, new_path: Where) -> None:
        """An operation `rename`."""
        operation = Operation("rename", _spell_path(path), to=_spell_path(new_path))
        self._do(operation, lambda: self._inner.rename(path, new_path))

    def mkdir(self, path: Where) -> None:
        """An operation `make_folder`."""
        self._do(Operation("make_folder", _spell_path(path)), lambda: self._inner.mkdir(path))

    def exists(self, path: Where) -> bool:
        """Like the inner file system: not an operation."""
        with self._injector.covered():
            return self._inner.exists(path)

    def rm_file(self, path: Where) -> None:
        """An operation `remove`."""
        self._do(Operation("remove", _spell_path(path)), lambda: self._inner.rm_file(path))

    def ls(self, path: Where) -> list[str]:
        """An operation `list`; only if the inner file system has it."""
        inner: Any = self._inner

        def list_names() -> list[str]:
            names: list[str] = inner.ls(path)
            return self._watcher.note(_spell_path(path), names)

        listed: list[str] = self._do(Operation("list", _spell_path(path)), list_names)
        return listed

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Where) -> bool:
        """Accepts any id: the inner file system checks it when it is used."""
        return True

    @contextmanager
    def observed(self, folder: Where, watcher: Watcher, rank: int) -> Iterator[None]:
        """Let a watcher observe operations below the folder until the block ends."""
        watch = Watch((_spell_path(folder),), watcher, rank, observing=True)
        self._registry.add(watch)
        try:
            yield
        finally:
            self._registry.remove(watch)

    def files(self, folder: Where) -> dict[str, bytes]:
        """The bytes of the files in a folder, by their names."""
        inner: Any = self._inner
        found = {}
        with self._injector.covered():
            for path in inner.ls(folder) if inner.exists(folder) else ():
                name = os.path.basename(str(path).rstrip("/"))
                with inner.create_stream(inner.concat_path(folder, name), "rb") as stream:
                    found[name] = stream.read()
        return found

    def _do(self, operation: Operation, function: Callable[[], Any]) -> Any:
        return self._perform(operation, lambda op: (function(), op.nbytes))

    def _perform(self, operation: Operation, act: Callable[[Operation], tuple[Any, int]]) -> Any:
        def covered(changed: Operation) -> tuple[Any, int]:
            with self._injector.covered():
                return act(changed)

        return self._registry.perform(operation, covered)


Perform = Callable[[Operation, Callable[[Operation], tuple[Any, int]]], Any]


class FaultyStream(io.IOBase):
    """A stream whose reads and writes are operations. Other attributes are the inner one's."""

    def __init__(self, inner: Any, perform: Perform, path: str) -> None:
        self._stream = inner
        self._perform = perform
        self._path = path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        """Write all bytes, like a buffered stream; a raw one may take only the first bytes."""
        rest, size = memoryview(data).cast("B"), len(memoryview(data).cast("B"))
        while rest:
            count: int = self._perform(
                Operation("write", self._path, data=bytes(rest), nbytes=len(rest)),
                self._write_and_count,
            )
            rest = rest[count:]
            if isinstance(self._stream, io.RawIOBase):
                break
        return size - len(rest)

    def _write_and_count(self, operation: Operation) -> tuple[int, int]:
        data = operation.data or b""
        result = self._stream.write(data)
        count = len(data) if result is None else int(result)
        return count, count

    def read(self, size: int | None = -1) -> bytes:
        """Read at most `size` bytes, by default all remaining."""

        def act(operation: Operation) -> tuple[bytes, int]:
            data = self._stream.read(operation.nbytes or size)
            return data, len(data)

        nbytes = 0 if size is None or size < 0 else size
        data: bytes = self._perform(Operation("read", self._path, nbytes=nbytes), act)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one read does."""
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Like the inner stream."""
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        """Like the inner stream."""
        return int(self._stream.tell())

    def flush(self) -> None:
        """Like the inner stream."""
        if not self._stream.closed:
            self._stream.flush()

    def truncate(self, size: int | None = None) -> int:
        """Like the inner stream."""
        return int(self._stream.truncate(size))

    def fileno(self) -> int:
        """Like the inner stream."""
        return int(self._stream.fileno())

    def readable(self) -> bool:
        """Like the inner stream."""
        return bool(self._stream.readable())

    def writable(self) -> bool:
        """Like the inner stream."""
        return bool(self._stream.writable())

    def seekable(self) -> bool:
        """Like the inner stream."""
        return bool(self._stream.seekable())

    def close(self) -> None:
        """Does nothing: the creator of the inner stream closes it."""


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A folder of a wrapped file system, as a place to record: files only, no folders."""

    filesystem: FaultyFileSystem
    folder: Where

    def trees(self) -> list[Tree]:
        """The current contents of the folder."""
        return [self.filesystem.files(self.folder)]

    def watching(self, watcher: Watcher, rank: int) -> AbstractContextManager[None]:
        """Let the watcher observe operations on it until the block ends."""
        return self.filesystem.observed(self.folder, watcher, rank)


class _StoreWatcher:
    """The injector, as the watcher of all operations of a wrapped file system."""

    def __init__(self, injector: Injector) -> None:
        self._injector = injector
        self._listed: dict[str, frozenset[str]] = {}

    def before(self, operation: Operation) -> Any:
        """See `Injector.before`."""
        path = Path("/", operation.path)
        local = path.parent.is_dir() or path.is_dir()
        names = self._listed.get(operation.path, frozenset())
        return self._injector.before(operation, Path("/") if local else None, names)

    def after(self, operation: Operation) -> None:
        """See `Injector.after`."""
        self._injector.after(operation)

    def note(self, folder: str, paths: list[str]) -> list[str]:
        """Remember a listing."""
        names = frozenset(os.path.basename(path.rstrip("/")) for path in paths)
        self._listed[folder.lstrip("/")] = names
        return paths


def _spell_path(path: Where) -> str:
    """The path under one common root: `memory://a/b` becomes `/memory://a/b`."""
    text = os.fspath(path).rstrip("/")
    return text if text.startswith("/") else f"/{text}"
