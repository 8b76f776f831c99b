"""Wrappers of storages, planners and stagers: the same object, with faults at its hooks.

Enters: any implementation. Leaves: an object of a subclass of its own class that shares its
attributes, so its type, attributes and signatures look unchanged. Only the hooks with an injected
fault are overridden: the engine sees that the others are untouched and takes its usual paths. A
hook that an object calls on itself is not an event.
"""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pytest_dcp.faults.injection.injection import HOOKS

T = TypeVar("T")
Around = Callable[[str, Callable[[], Any]], Any]
"""Called with a hook as `role.hook` and a function that runs it; returns the hook's result."""


class Wrappers:
    """The wrapped objects of one process."""

    def __init__(self, around: Around) -> None:
        self._around = around
        self._wrapped: list[tuple[str, type]] = []
        self._targets: set[str] = set()
        self._inside = _Inside()

    def wrap(self, inner: T, role: str) -> T:
        """The object with faults at its hooks.

        It shares the inner one's attributes; those of `__slots__` are copied.
        """
        kind = type(inner)
        faulty: type = types.new_class(
            f"Faulty{kind.__name__}",
            (kind,),
            exec_body=lambda space: space.update(_hooks_by_name(kind)),
        )
        outer: T = copy.copy(inner) if not hasattr(inner, "__dict__") else object.__new__(faulty)
        if hasattr(inner, "__dict__"):
            # Bypass __setattr__, which a class may override.
            object.__setattr__(outer, "__dict__", inner.__dict__)
            for slot in _slots(kind):
                if hasattr(inner, slot):
                    object.__setattr__(outer, slot, getattr(inner, slot))
        else:
            object.__setattr__(outer, "__class__", faulty)
        self._wrapped.append((role, faulty))
        self._override(role, faulty)
        return outer

    def target(self, hooks: Iterable[str]) -> None:
        """Allow these hooks, as `role.hook`, to be overridden in all wrapped objects."""
        self._targets |= set(hooks)
        for role, faulty in self._wrapped:
            self._override(role, faulty)

    def _override(self, role: str, faulty: type) -> None:
        for hook in HOOKS[role]:
            name = f"{role}.{hook}"
            if name in self._targets and hook not in vars(faulty) and hasattr(faulty, hook):
                setattr(faulty, hook, self._overridden(faulty, hook, name))

    def _overridden(self, faulty: type, hook: str, name: str) -> Any:
        original = getattr(faulty, hook)
        around, inside = self._around, self._inside

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            def work() -> Any:
                return getattr(super(faulty, self), hook)(*args, **kwargs)

            return inside.once(self, work, lambda: around(name, work))

        if callable(original):
            return functools.wraps(original)(call)

        def value(self: Any) -> Any:
            def work() -> Any:
                # An attribute set on the object itself shadows that of the class.
                own = vars(self) if hasattr(self, "__dict__") else {}
                return own[hook] if hook in own else getattr(super(faulty, self), hook)

            return inside.once(self, work, lambda: around(name, work))

        return property(value, lambda self, new: vars(self).__setitem__(hook, new))


class _Inside(threading.local):
    """The objects that are running one of their hooks in this thread."""

    def __init__(self) -> None:
        self.objects: set[int] = set()

    def once(self, owner: Any, plain: Callable[[], Any], faulty: Callable[[], Any]) -> Any:
        """The faulty call, or the plain one if the object calls itself."""
        if id(owner) in self.objects:
            return plain()
        self.objects.add(id(owner))
        try:
            return faulty()
        finally:
            self.objects.discard(id(owner))


def _hooks_by_name(kind: type) -> dict[str, Any]:
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return names if "__dict__" in dir(kind) else names | {"__slots__": ()}


def _slots(kind: type) -> Iterable[str]:
    for cls in kind.__mro__:
        slots = vars(cls).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__"):
                yield slot
