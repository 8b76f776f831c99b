"""Dicts and lists whose contents are made on demand. Pure (no I/O).

In torch's objects they represent columns with many rows, and behave like the `dict` or `list` that
torch has there: they are instances of it, and every method works, including `pop` and item
assignment. Items made so far are stored in the object itself, so that looking them up again costs
nothing extra. An operation that needs all items, or changes any, makes all items first; from then
on the object is an ordinary dict or list. Copies and pickles are plain dicts and lists.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import (
    Collection,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    ValuesView,
)
from typing import Any, SupportsIndex, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class LazyDict(dict[K, V]):
    """A dict that makes its values on demand: subclasses say which keys it has, and make values.

    The same key always gives the same object, which may therefore be changed in place.
    """

    __slots__ = ("is_full",)

    def __init__(self) -> None:
        super().__init__()
        self.is_full = False
        """Whether the dict itself holds everything, so that `lazy_keys` no longer counts."""

    @abstractmethod
    def lazy_keys(self) -> Collection[K]:
        """The keys in their order; called until the dict is full."""

    @abstractmethod
    def make_value(self, key: K) -> V:
        """The value of a key. Raises KeyError if there is none."""

    def make_all(self) -> None:
        """Make everything."""
        if self.is_full:
            return
        contents = {key: self[key] for key in self.lazy_keys()}
        super().clear()
        super().update(contents)
        self.is_full = True

    def made_items(self) -> Collection[tuple[K, V]]:
        """The items made so far."""
        return super().items()

    def __missing__(self, key: K) -> V:
        if self.is_full:
            raise KeyError(key)
        return super().setdefault(key, self.make_value(key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) if self.is_full else key in self.lazy_keys()

    def __iter__(self) -> Iterator[K]:
        return super().__iter__() if self.is_full else iter(self.lazy_keys())

    def __len__(self) -> int:
        return super().__len__() if self.is_full else len(self.lazy_keys())

    def __reversed__(self) -> Iterator[K]:
        return reversed(list(self))

    def keys(self) -> Any:
        return super().keys() if self.is_full else KeysView(self)

    def values(self) -> Any:
        return super().values() if self.is_full else ValuesView(self)

    def items(self) -> Any:
        return super().items() if self.is_full else ItemsView(self)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - this is `get` itself

    def copy(self) -> dict[K, V]:
        return dict(self)

    def __eq__(self, other: object) -> bool:
        self.make_all()
        if isinstance(other, LazyDict):
            other.make_all()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # compares by content, as a dict does

    def __or__(self, other: Any) -> Any:
        return dict(self) | other if isinstance(other, dict) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        return other | dict(self) if isinstance(other, dict) else NotImplemented

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)

    def __setitem__(self, key: K, value: V) -> None:
        self.make_all()
        super().__setitem__(key, value)

    def __delitem__(self, key: K) -> None:
        self.make_all()
        super().__delitem__(key)

    def clear(self) -> None:
        self.is_full = True
        super().clear()

    def pop(self, key: Any, *default: Any) -> Any:
        self.make_all()
        return super().pop(key, *default)

    def popitem(self) -> tuple[K, V]:
        self.make_all()
        return super().popitem()

    def setdefault(self, key: Any, default: Any = None) -> Any:
        self.make_all()
        return super().setdefault(key, default)

    def update(self, *others: Any, **more: Any) -> None:
        self.make_all()
        super().update(*others, **more)


class LazyList(list[V]):
    """A list that makes its items on demand: subclasses say how many it has, and make them."""

    __slots__ = ("_item_at", "is_full")

    def __init__(self) -> None:
        super().__init__()
        self.is_full = False
        self._item_at: dict[int, V] = {}

    @abstractmethod
    def lazy_len(self) -> int:
        """How many items there are; called until the list is full."""

    @abstractmethod
    def make_item(self, at: int) -> V:
        """The item at this position, which is in range."""

    def make_all(self) -> None:
        """Make everything."""
        if not self.is_full:
            items = list(self)
            self.is_full = True
            super().extend(items)

    def made_items(self) -> Iterable[tuple[int, V]]:
        """The items made so far, with their positions."""
        return enumerate(super().__iter__()) if self.is_full else self._item_at.items()

    def _item(self, at: int) -> V:
        if at not in self._item_at:
            self._item_at.setdefault(at, self.make_item(at))
        return self._item_at[at]

    def __len__(self) -> int:
        return super().__len__() if self.is_full else self.lazy_len()

    def __getitem__(self, at: Any) -> Any:
        if self.is_full:
            return super().__getitem__(at)
        rows = range(self.lazy_len())[at]
        if isinstance(rows, range):
            return [self._item(row) for row in rows]
        return self._item(rows)

    def __iter__(self) -> Iterator[V]:
        return super().__iter__() if self.is_full else map(self._item, range(self.lazy_len()))

    def __reversed__(self) -> Iterator[V]:
        return reversed(self.copy())

    def __contains__(self, item: object) -> bool:
        return item in self[:]

    def __eq__(self, other: object) -> bool:
        return self[:] == other[:] if isinstance(other, list) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: Any) -> Any:
        return self[:] < other[:]

    def __le__(self, other: Any) -> Any:
        return self[:] <= other[:]

    def __gt__(self, other: Any) -> Any:
        return self[:] > other[:]

    def __ge__(self, other: Any) -> Any:
        return self[:] >= other[:]

    __hash__ = None  # compares by content, as a list does

    def __add__(self, other: Any) -> Any:
        return self[:] + other[:] if isinstance(other, list) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return other[:] + self[:] if isinstance(other, list) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> list[V]:
        items: list[V] = self[:]
        return items * times

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return repr(self[:])

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self[:],)

    def copy(self) -> list[V]:
        items: list[V] = self[:]
        return items

    def count(self, item: V) -> int:
        return self.copy().count(item)

    def index(self, item: V, *bounds: Any) -> int:
        return self.copy().index(item, *bounds)

    def __setitem__(self, at: Any, value: Any) -> None:
        self.make_all()
        super().__setitem__(at, value)

    def __delitem__(self, at: Any) -> None:
        self.make_all()
        super().__delitem__(at)

    def __iadd__(self, other: Any) -> Any:
        self.extend(other)
        return self

    def __imul__(self, times: SupportsIndex) -> Any:
        self.make_all()
        return super().__imul__(times)

    def append(self, item: V) -> None:
        self.make_all()
        super().append(item)

    def extend(self, items: Iterable[V]) -> None:
        self.make_all()
        super().extend(items)

    def insert(self, at: SupportsIndex, item: V) -> None:
        self.make_all()
        super().insert(at, item)

    def pop(self, at: SupportsIndex = -1) -> V:
        self.make_all()
        return super().pop(at)

    def remove(self, item: V) -> None:
        self.make_all()
        super().remove(item)

    def reverse(self) -> None:
        self.make_all()
        super().reverse()

    def sort(self, **how: Any) -> None:
        self.make_all()
        super().sort(**how)

    def clear(self) -> None:
        self.make_all()
        super().clear()
