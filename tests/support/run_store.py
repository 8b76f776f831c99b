"""An object store in memory for the runs of a test: no rename, no folders, listings of any age.

A crash is a request from which on all requests fail, as for a process that has died.
"""

from __future__ import annotations

import threading
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

PROTOCOL = "runstore"
RUN = f"{PROTOCOL}://bucket/run"


class Crashed(BaseException):
    """The process would be dead."""


class StoreState:
    """The objects of one store, and what they were before each change."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.history: list[frozenset[str]] = [frozenset()]
        """The names after each change."""
        self.lag = 0
        """By how many changes listings are late."""
        self.changes = 0
        self.crash_at: int | None = None
        """The number of the changing request, from 1 on, that kills the process."""
        self.refuse_at: int | None = None
        """The number of the changing request that is refused once."""
        self.lock = threading.Lock()

    def change(self, name: str, content: bytes | None) -> None:
        """Put an object, or remove it."""
        with self.lock:
            self.check()
            self.changes += 1
            self.check()
            if self.changes == self.refuse_at:
                raise OSError(f"503 Slow Down: {name}")
            if content is not None:
                self.objects[name] = content
            elif self.objects.pop(name, None) is None:
                raise FileNotFoundError(name)
            self.history.append(frozenset(self.objects))

    def check(self) -> None:
        """Raise Crashed if the process is dead."""
        if self.crash_at is not None and self.changes >= self.crash_at:
            raise Crashed

    def begin_anew(self, lag: int = 0) -> None:
        """An empty store."""
        self.objects.clear()
        self.history[:] = [frozenset()]
        self.restart()
        self.lag = lag

    def restart(self) -> None:
        """Another process begins."""
        self.crash_at = self.refuse_at = None
        self.changes = 0

    def listed(self) -> frozenset[str]:
        return self.history[max(len(self.history) - 1 - self.lag, 0)]


STORES: dict[str, StoreState] = {}


class RunStore(AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """runstore://bucket/name, of the store that the option `store` names."""

    protocol = PROTOCOL
    cachable = False

    def __init__(self, store: str, **options: Any) -> None:
        super().__init__(**options)
        self.state = STORES[store]

    def _name(self, path: str) -> str:
        name: str = self._strip_protocol(path)
        assert not {"", ".", ".."} & set(name.split("/")), f"a store would take {path} literally"
        return name

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self.state.change(self._name(path), bytes(value))

    def rm_file(self, path: str) -> None:
        self.state.change(self._name(path), None)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        self.state.check()
        try:
            return self.state.objects[self._name(path)][start:end]
        except KeyError:
            raise FileNotFoundError(path) from None

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.cat_file(path)), "type": "file"}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        self.state.check()
        prefix = self._name(path) + "/"
        found = {}
        for name in self.state.listed():
            if name.startswith(prefix):
                first, slash, _ = name.removeprefix(prefix).partition("/")
                found[prefix + first] = "directory" if slash else "file"
        if not found:
            raise FileNotFoundError(path)
        entries = [{"name": name, "size": 0, "type": kind} for name, kind in sorted(found.items())]
        return entries if detail else [entry["name"] for entry in entries]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""


fsspec.register_implementation(PROTOCOL, RunStore, clobber=True)
