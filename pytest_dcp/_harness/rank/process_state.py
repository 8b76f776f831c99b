"""Finds changes that a test leaves in its process, and undoes them for the next test or example.

Enters: `Facet`s of the process's state, from `state_of_python`, `state_of_torch` and
`state_of_names`. Leaves: the state as it was at a mark, and the names of what is still changed.

Rules that hold inside:

- A test of a warm world finds the state that it would find in a fresh world, plus the changes of
  fixtures of wider scope: the mark is set when these are set up, before the test's own.
- A wider fixture that is set up later changes the mark too, so that its changes last.
- Changes that cannot be undone are named, and the world is not used again.
- State inside objects (caches, module variables, registries) does not count as state of the
  process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

UNTOLD = ("threads", "child processes")
"""Facets that replace a world without a word: many libraries leave threads behind, and of processes
there is another warning."""


@dataclass(frozen=True, slots=True)
class Facet:
    """One part of the process's state."""

    name: str
    """As a person calls it: "the umask"."""
    read: Callable[[], Any]
    """Its value, which later changes leave alone."""
    put_back: Callable[[Any], object] | None = None
    """Makes a value that was read the current one; None where nothing can."""
    differs: Callable[[Any], bool] | None = None
    """Whether the current value differs from one that was read, where that costs less than to read
    it again."""
    is_quick: bool = True
    """Whether it is looked at after each example of a property, too."""

    def has_changed(self, then: Any) -> bool:
        """Whether the current value differs from `then`, which was read before."""
        return bool(self.read() != then) if self.differs is None else self.differs(then)


class ProcessState:
    """The state of this process at a mark."""

    def __init__(self, facets: Sequence[Facet]) -> None:
        self._facets = facets
        self._marked: list[Any] | None = None
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """Whether changes from now on are to last: the next `settle` sets the mark."""
        return self._is_open

    def open(self) -> None:
        """Keep changes from here on."""
        self._is_open, self._marked = True, None

    def wait(self) -> None:
        """A test begins: changes by its fixtures of wider scope are to last.

        The mark stays as it is unless there are any; see `lasting`.
        """
        self._is_open = True

    def settle(self) -> None:
        """Restore changes from here on."""
        self._is_open = False
        if self._marked is None:
            self._marked = self._read()

    @contextmanager
    def lasting(self) -> Iterator[None]:
        """Keep changes made in the block."""
        if self._is_open:
            self._marked = None
            yield
            return
        before = self._read()
        try:
            yield
        finally:
            self._marked = [
                merge_change(then, old, facet.read()) if facet.has_changed(old) else then
                for facet, then, old in zip(
                    self._facets, self._marked or before, before, strict=True
                )
            ]

    def put_back(self) -> tuple[str, ...]:
        """Restore the state at the mark. Returns the names of changes that could not be undone."""
        leftovers = []
        for facet, then in zip(self._facets, self._marked or (), strict=False):
            if not facet.has_changed(then):
                continue
            with suppress(Exception):  # whatever it is, the value that is left is looked at
                if facet.put_back is not None:
                    facet.put_back(then)
            if facet.has_changed(then):
                leftovers.append(facet.name)
        return tuple(leftovers)

    def _read(self) -> list[Any]:
        return [facet.read() for facet in self._facets]


def merge_change(value: Any, before: Any, after: Any) -> Any:
    """`value` with what differs between `before` and `after`: of mappings and lists the items."""
    if isinstance(value, dict):
        merged = type(value)(value)
        for key in before.keys() | after.keys():
            if key not in after:
                merged.pop(key, None)
            elif key not in before or before[key] != after[key]:
                merged[key] = after[key]
        return merged
    if isinstance(value, list) and len(value) == len(before) == len(after):
        parts = zip(value, before, after, strict=True)
        return [new if new != old else one for one, old, new in parts]
    return after
