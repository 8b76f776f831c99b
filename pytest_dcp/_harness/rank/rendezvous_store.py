"""The file store at which the ranks of a gloo world meet, with shorter waits.

torch's `FileStore` looks for a missing key every 10 ms. While a group is made, each rank waits for
the addresses of its peers, so a world of four loses 10 to 20 ms. This store keeps the same file, by
a `FileStore`, and looks more often at first.

Assumes that a backend's C++ code calls the methods of a store that Python defines, and releases the
interpreter's lock before: gloo does. NCCL also uses a store from threads of its own, so it gets
torch's. Can go when `FileStore` waits without a fixed pause.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

FIRST_PAUSE_S = 0.0002
"""Between the first two looks: a look takes a tenth of it."""
PAUSE_GROWTH = 1.5
LONGEST_PAUSE_S = 0.01
"""As `FileStore`."""


_stores_in_use: list[RendezvousStore] = []
"""A store that only C++ still has would lose the methods that Python defines."""


class RendezvousStore(dist.Store):  # type: ignore[name-defined,misc]  # public, not in __all__
    """A `FileStore` by its methods; only the waits are its own."""

    def __init__(self, path: str, size: int) -> None:
        super().__init__()
        self._path, self._size = path, size
        self._file: Any = dist.FileStore(path, size)  # type: ignore[attr-defined]  # as above
        _stores_in_use.append(self)

    def get(self, key: str) -> bytes:
        """The value of a key; waits for it. Raises `DistStoreError` after the store's timeout."""
        self._await([key], self.timeout, f"Timeout waiting for key: {key}")
        value: bytes = self._file.get(key)
        return value

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are there. Raises `DistStoreError` after the timeout."""
        self._await(keys, timeout or self.timeout, "Wait timeout")

    def _await(self, keys: Sequence[str], timeout: timedelta, text: str) -> None:
        deadline = time.monotonic() + timeout.total_seconds()
        pause_s = FIRST_PAUSE_S
        while not self._file.check(keys):
            if time.monotonic() > deadline:
                limit_ms = round(timeout.total_seconds() * 1000)
                raise dist.DistStoreError(f"{text} after {limit_ms} ms")
            time.sleep(pause_s)
            pause_s = min(pause_s * PAUSE_GROWTH, LONGEST_PAUSE_S)

    # The rest is the file's.

    def set(self, key: str, value: str | bytes) -> None:
        """Set a key's value."""
        self._file.set(key, value)

    def add(self, key: str, amount: int) -> int:
        """Add to a key's number; returns the sum."""
        total: int = self._file.add(key, amount)
        return total

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        are_there: bool = self._file.check(keys)
        return are_there

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Set a key's value where it is as expected; returns the value that the key has then."""
        value: bytes = self._file.compare_set(key, expected, desired)
        return value

    def num_keys(self) -> int:
        """The number of keys, with those of the file itself."""
        count: int = self._file.num_keys()
        return count

    def delete_key(self, key: str) -> bool:
        """Remove a key; returns whether it was there."""
        was_there: bool = self._file.delete_key(key)
        return was_there

    def list_keys(self) -> list[str]:
        """All keys."""
        keys: list[str] = self._file.list_keys()
        return keys

    def clone(self) -> RendezvousStore:
        """Another store on the same file."""
        return RendezvousStore(self._path, self._size)

    # The names by which C++ calls these two.
    getNumKeys = num_keys
    deleteKey = delete_key
