"""Watches: which watcher watches which folders, and how it observes an operation.

Enters: an operation with absolute paths, and how to do it. Every watcher whose roots hold a path of
it is asked before, and informed after. Observers are informed first, of the operation really done;
a watcher's own operations on storage are not watched; descriptors are tracked from opening to
closing, and compared with their file's identity, since the kernel reuses their numbers.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pytest_dcp.faults.tap.operation import Alternative, Operation, Replace, Shorten, Skip, Verdict


class Watcher(Protocol):
    """Called before and after each operation, in the thread that makes it."""

    def before(self, operation: Operation) -> Verdict | None:
        """The verdict on the operation; None: do it. Exceptions go to the caller."""

    def after(self, operation: Operation) -> None:
        """The operation was done, with the bytes and numbers that it really had.

        Exceptions go to the caller.
        """


@dataclass(frozen=True, slots=True)
class Watch:
    """One watcher with its roots."""

    roots: tuple[str, ...]
    """Real paths."""
    watcher: Watcher
    rank: int
    observing: bool
    """It only observes: called first, and also for operations that another watcher's verdict does.
    """

    def restrict(self, operation: Operation) -> Operation | None:
        """The operation as seen from this watch's roots; None if it touches none of them."""
        for path in (operation.to, operation.path):
            if path is not None and (root := self._root_of(path)) is not None:
                top = self.roots[root]
                to = None if operation.to is None else _relative(operation.to, top)
                path = _relative(operation.path, top)
                return replace(operation, path=path, to=to, root=root, rank=self.rank)
        return None

    def _root_of(self, path: str) -> int | None:
        inside = [n for n, root in enumerate(self.roots) if _is_below(path, root)]
        return max(inside, key=lambda n: len(self.roots[n]), default=None)


@dataclass(slots=True)
class Descriptor:
    """An open file or folder below a watched root."""

    path: str
    """Absolute and real; updated by renames."""
    handle: int
    identity: tuple[int, int]
    """Device and inode."""
    is_folder: bool
    appends: bool


class Registry:
    """The watches of this process and the descriptors that it tracks."""

    def __init__(self) -> None:
        self.watches: tuple[Watch, ...] = ()
        self.lock = threading.RLock()
        self._descriptors: dict[int, Descriptor] = {}
        self._handles = itertools.count(1)
        self._busy = threading.local()

    def add(self, watch: Watch) -> None:
        with self.lock:
            self.watches = (*self.watches, watch)

    def remove(self, watch: Watch) -> None:
        with self.lock:
            self.watches = tuple(one for one in self.watches if one is not watch)
            if not self.watches:
                self._descriptors.clear()

    def place(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The real absolute path, None if it is below no watch's root.

        If the last name is a link, it is followed only if otherwise the path is outside.
        """
        if isinstance(path, int):
            descriptor = self.descriptor(path)
            return None if descriptor is None else descriptor.path
        try:
            name = os.fsdecode(path)
        except TypeError:
            return None
        if dir_fd is not None and not os.path.isabs(name):
            above = self.descriptor(dir_fd)
            if above is None:
                return None
            name = os.path.join(above.path, name)
        if "\0" in name:
            return None
        head, last = os.path.split(name)
        spelled = os.path.join(os.path.realpath(head or "."), last)
        if last not in ("", ".", "..") and self.is_watched(spelled):
            return spelled
        followed = os.path.realpath(name)
        return followed if self.is_watched(followed) else None

    def is_watched(self, path: str) -> bool:
        """Whether a watch's root is the path or above it."""
        return any(_is_below(path, root) for watch in self.watches for root in watch.roots)

    def new_handle(self) -> int:
        return next(self._handles)

    def add_descriptor(self, fd: int, path: str, handle: int, *, appends: bool) -> None:
        """Start tracking a descriptor."""
        status = os.fstat(fd)
        identity = (status.st_dev, status.st_ino)
        folder = os.path.isdir(path)
        self._descriptors[fd] = Descriptor(path, handle, identity, folder, appends)

    def copy_descriptor(self, fd: int, copy: int) -> None:
        """Track `copy` like `fd`."""
        descriptor = self.descriptor(fd)
        if descriptor is None:
            self._descriptors.pop(copy, None)
        else:
            self._descriptors[copy] = descriptor

    def drop_descriptor(self, fd: int) -> None:
        self._descriptors.pop(fd, None)

    def descriptor(self, fd: Any) -> Descriptor | None:
        """The entry of a descriptor; None if it is not below a watched root."""
        if not isinstance(fd, int) or (descriptor := self._descriptors.get(fd)) is None:
            return None
        try:
            status = os.fstat(fd)
        except OSError:
            self.drop_descriptor(fd)
            return None
        if (status.st_dev, status.st_ino) != descriptor.identity:
            # Code that Python does not see closed it, and another file got its number.
            self.drop_descriptor(fd)
            return None
        return descriptor

    def rename_paths(self, old: str, new: str) -> None:
        """Give open files their new names."""
        for descriptor in list(self._descriptors.values()):
            if _is_below(descriptor.path, old):
                descriptor.path = new + descriptor.path[len(old) :]

    def perform(self, operation: Operation, act: Callable[[Operation], tuple[Any, int]]) -> Any:
        """Do one operation, calling all watchers that it concerns. Returns its result.

        operation: with absolute paths. act: does an operation and returns the result and the number
        of bytes; called with other data if a watcher replaces them.
        """
        mood = getattr(self._busy, "mood", "")
        watches = [] if mood == "asking" else [w for w in self.watches if w.restrict(operation)]
        deciding = [] if mood == "acting" else [w for w in watches if not w.observing]
        started = time.monotonic_ns()
        thread = threading.current_thread().name
        operation = replace(operation, thread=thread, started_ns=started)

        def do(changed: Operation = operation) -> Any:
            result, nbytes = act(changed)
            data = changed.data[:nbytes] if changed.kind == "write" and changed.data else None
            final_operation = replace(
                changed,
                nbytes=nbytes,
                data=changed.data if data is None else data,
                ended_ns=time.monotonic_ns(),
            )
            try:
                self._tell([w for w in watches if w.observing], final_operation)
                self._tell(deciding, final_operation)
            except BaseException:
                self._drop(operation, result)  # the caller will not get it
                raise
            return result

        try:
            verdict = self._ask(deciding, operation)
        except BaseException:
            if operation.kind == "close":
                do()  # a close that fails has released the descriptor all the same
            raise
        return self._apply_verdict(verdict, operation, do)

    def _drop(self, operation: Operation, result: Any) -> None:
        """Release the result of an opening or a listing."""
        if operation.kind in ("create", "open") and isinstance(result, int):
            self.drop_descriptor(result)
            os.close(result)
        elif operation.kind == "list" and hasattr(result, "close"):
            result.close()

    def _apply_verdict(
        self, verdict: Verdict | None, operation: Operation, do: Callable[..., Any]
    ) -> Any:
        if verdict is None:
            return do()
        if isinstance(verdict, Alternative):
            with self._set_mood("acting"):
                return verdict.act(operation, do)
        if isinstance(verdict, Skip) and operation.kind not in ("create", "open", "read", "list"):
            return operation.nbytes if operation.kind == "write" else None
        if isinstance(verdict, Shorten) and operation.kind in ("read", "write"):
            data = None if operation.data is None else operation.data[: verdict.nbytes]
            nbytes = min(operation.nbytes, verdict.nbytes)
            return do(replace(operation, data=data, nbytes=nbytes))
        if isinstance(verdict, Replace) and operation.kind == "write":
            do(replace(operation, data=verdict.data, nbytes=len(verdict.data)))
            return operation.nbytes
        if isinstance(verdict, Replace) and operation.kind == "read":
            do()
            return verdict.data[: operation.nbytes]
        raise TypeError(f"{verdict!r} cannot be done instead of {operation}")

    def _ask(self, watches: Sequence[Watch], operation: Operation) -> Verdict | None:
        verdict: Verdict | None = None
        with self._set_mood("asking"):
            for watch in watches:
                seen = watch.restrict(operation)
                if seen is not None:
                    verdict = watch.watcher.before(seen) or verdict
        return verdict

    def _tell(self, watches: Sequence[Watch], operation: Operation) -> None:
        first: BaseException | None = None
        with self._set_mood("asking"):
            for watch in watches:
                seen = watch.restrict(operation)
                try:
                    if seen is not None:
                        watch.watcher.after(seen)
                except BaseException as error:  # noqa: BLE001 - raised after all watchers were called
                    first = first or error
        if first is not None:
            raise first

    @contextmanager
    def _set_mood(self, mood: str) -> Iterator[None]:
        before = getattr(self._busy, "mood", "")
        self._busy.mood = mood
        try:
            yield
        finally:
            self._busy.mood = before


REGISTRY = Registry()
"""The registry of this process."""


def roots_of(paths: Sequence[Path]) -> tuple[str, ...]:
    """The real paths of folders, which need not exist yet."""
    return tuple(os.path.realpath(path) for path in paths)


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root if root.endswith("/") else root + "/")


def _relative(path: str, root: str) -> str:
    if path == root:
        return "."
    return path[len(root.rstrip("/")) + 1 :] if _is_below(path, root) else path
