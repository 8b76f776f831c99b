"""The tap: watchers observe the calls of Python's functions that touch storage.

`watch_operations` replaces the functions of `os` and `open` by stand-ins; the last block to end
puts the functions back. Calls that touch no watched root go straight to the original. Operations of
C extensions are not seen; `mmap.mmap` of a watched file raises ENODEV, as on a storage without
mappings, so that code with a fallback reads instead.
"""

from __future__ import annotations

import builtins
import errno
import io
import mmap
import os
import pathlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytest_dcp.faults.tap import open_files, os_calls
from pytest_dcp.faults.tap.operation import Alternative, Replace, Shorten, Skip, Verdict
from pytest_dcp.faults.tap.watches import REGISTRY, Watch, Watcher, roots_of

__all__ = ["Alternative", "Replace", "Shorten", "Skip", "Verdict", "Watcher", "watch_operations"]

CAPABILITIES = (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks)
"""Sets of functions that callers look up to learn which arguments they support."""

OWN_REFERENCES: Any = getattr(pathlib, "_normal_accessor", None)
"""Functions of `os`, and `io.open`, to which pathlib of Python 3.10 has references of its own."""

_put_back: list[tuple[Any, str, Any]] = []


@contextmanager
def watch_operations(
    roots: Sequence[Path], watcher: Watcher, *, rank: int | None = None, observing: bool = False
) -> Iterator[None]:
    """Let the watcher see every operation on the roots and below, until the block ends.

    For the whole process, all threads. Blocks may nest and overlap.

    rank: recorded in the operations; by default the value of the variable RANK. observing: the
    watcher only observes; it is called before all others, and for the operations that their
    verdicts do instead.
    """
    number = int(os.environ.get("RANK", "0")) if rank is None else rank
    watch = Watch(roots_of(roots), watcher, number, observing)
    with REGISTRY.lock:
        REGISTRY.add(watch)
        if not _put_back:
            _install()
    try:
        yield
    finally:
        with REGISTRY.lock:
            REGISTRY.remove(watch)
            if not REGISTRY.watches:
                _uninstall()


def _install() -> None:
    for name in vars(os_calls.real):
        now, stand_in = getattr(os, name), getattr(os_calls, name)
        setattr(os_calls.real, name, now)
        _put(os, name, stand_in)
        for able in CAPABILITIES:
            if now in able:
                able.add(stand_in)
        if name != "open" and hasattr(OWN_REFERENCES, name):
            _put(OWN_REFERENCES, name, stand_in)
    _put(mmap, "mmap", _refusing_mmap(mmap.mmap))
    open_files.real_open = builtins.open
    _put(io, "open", open_files.open)
    _put(builtins, "open", open_files.open)
    if hasattr(OWN_REFERENCES, "open"):
        _put(OWN_REFERENCES, "open", open_files.open)


def _refusing_mmap(real: type[mmap.mmap]) -> type[mmap.mmap]:
    """The class, which refuses files of watched roots."""

    class Refusing(real):  # type: ignore[misc,valid-type]  # a class made on the way
        def __new__(cls, fileno: int, *args: Any, **kwargs: Any) -> Any:
            if REGISTRY.descriptor(fileno) is not None:
                raise OSError(errno.ENODEV, "a watched file is not mapped")
            return super().__new__(cls, fileno, *args, **kwargs)

    return Refusing


def _put(module: Any, name: str, stand_in: Any) -> None:
    _put_back.append((module, name, getattr(module, name)))
    setattr(module, name, stand_in)


def _uninstall() -> None:
    while _put_back:
        module, name, original = _put_back.pop()
        for able in CAPABILITIES:
            able.discard(getattr(module, name))
        setattr(module, name, original)
