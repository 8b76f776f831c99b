"""Functions of other packages that are replaced while a session adopts tests."""

from __future__ import annotations

from typing import Any


class Replacements:
    """Originals, put back in the reverse order."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, new: Any) -> Any:
        """Replace an attribute by `new`. Returns the attribute as its owner has it."""
        original = vars(owner)[name]
        self._originals.append((owner, name, original))
        setattr(owner, name, new)
        return original

    def has_replaced(self, owner: Any, name: str) -> bool:
        """Whether the attribute is replaced."""
        return any((one, other) == (owner, name) for one, other, _ in self._originals)

    def restore(self) -> None:
        """Put every original back."""
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)
