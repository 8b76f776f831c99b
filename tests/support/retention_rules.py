"""Which steps a run keeps, restated as a user would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of a run."""

    keep_last: int | None = None
    keep_every: int | None = None
    best: int = 0
    """How many steps with the least loss."""

    def keywords(self) -> dict[str, Any]:
        """For the manager."""
        if self.keep_last is None:
            return {}
        best = {"best": ("loss", "min", self.best)} if self.best else {}
        return {"keep_last": self.keep_last, "keep_every": self.keep_every, **best}

    def keep(self, losses: Mapping[int, float]) -> set[int]:
        """The steps to keep of these whole ones."""
        if self.keep_last is None:
            return set(losses)
        kept = set(sorted(losses)[-self.keep_last :])
        if self.keep_every:
            kept |= {step for step in losses if step % self.keep_every == 0}
        by_loss = sorted(losses, key=lambda step: (losses[step], -step))
        return kept | set(by_loss[: self.best])
