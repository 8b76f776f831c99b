"""Classes whose objects ranks may send each other, and how to take apart and rebuild objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

SHOWN = 80
"""Characters of a value that an error shows."""


class SentKind:
    """How the objects of one class are sent."""

    def __init__(self, cls: type, names: tuple[str, ...]) -> None:
        self.cls, self.names = cls, names
        self.has_dict = cls.__dictoffset__ != 0

    def parts(self, value: Any) -> list[Any]:
        """The fields, and other attributes set on the object."""
        found = [getattr(value, name) for name in self.names]
        if self.has_dict and len(vars(value)) != len(self.names):
            more = {name: v for name, v in vars(value).items() if name not in self.names}
            return [*found, more] if more else found
        return found

    def make(self, parts: list[Any]) -> Any:
        """The object of these parts."""
        instance: Any = object.__new__(self.cls)
        count = len(self.names)
        more = parts[count] if len(parts) == count + 1 and self.has_dict else {}
        if len(parts) not in (count, count + bool(more)):
            raise ValueError(f"expected {count} fields of a {self.cls.__name__}, got {len(parts)}")
        for name, part in zip(self.names, parts, strict=False):
            object.__setattr__(instance, name, part)
        for name, part in more.items():
            if type(name) is not str or name.startswith("__"):
                raise ValueError(f"expected an attribute's name, got {name!r:.{SHOWN}}")
            object.__setattr__(instance, name, part)
        return instance


SENT_KINDS: dict[type, tuple[str, SentKind]] = {}
KINDS_BY_NAME: dict[str, SentKind] = {}
CONVERSIONS: dict[type, tuple[str, Callable[[Any], Any]]] = {}
MAKERS: dict[str, Callable[[Any], Any]] = {}


def record(*classes: type) -> None:
    """Allow sending dataclasses: field by field, and rebuilt without their `__init__`."""
    for cls in classes:
        names = tuple(field.name for field in fields(cls))
        SENT_KINDS[cls] = cls.__name__, SentKind(cls, names)
        if KINDS_BY_NAME.setdefault(cls.__name__, SENT_KINDS[cls][1]).cls is not cls:
            raise ValueError(f"two classes are called {cls.__name__}")


def convert(
    cls: type, to: Callable[[Any], Any], back: Callable[[Any], Any] | None = None, name: str = ""
) -> None:
    """Allow sending objects of a class: `to` converts each for the wire, and `back` converts it
    back.

    Without `back` the receiver gets the result of `to`.
    """
    name = name or cls.__name__
    CONVERSIONS[cls] = name if back is not None else "", to
    if back is not None and MAKERS.setdefault(name, back) is not back:
        raise ValueError(f"two classes are called {name}")
