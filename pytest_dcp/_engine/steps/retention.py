"""Which whole steps to keep. Pure (no I/O).

A step is kept if any rule names it. The newest whole step is kept by every policy, so that a run
always has a checkpoint to go on from.

>>> policy = RetentionPolicy(keep_last=2, keep_every=100)
>>> policy.steps_to_remove({100: {}, 150: {}, 160: {}, 170: {}})
[150]
>>> policy = RetentionPolicy(keep_last=1, best=BestSteps("loss", "min", 1))
>>> policy.steps_to_remove({1: {"loss": 0.5}, 2: {"loss": 0.3}, 3: {"loss": 0.4}, 4: {}})
[1, 3]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Metrics = Mapping[str, float]
Direction = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class BestSteps:
    """The steps with the best values of one metric."""

    metric: str
    direction: Direction
    count: int

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(f"best= takes 'min' or 'max' as its second item, got {self.direction}")
        if not isinstance(self.metric, str) or not self.metric:
            raise TypeError(f"best= takes the name of a metric first, got {self.metric!r}")
        require_count("best=", self.count, least=1)

    def choose(self, steps: Mapping[int, Metrics]) -> set[int]:
        """The best of these steps; a step without a finite value of the metric is none of them.

        Of equal values the later step is better: it has trained longer.
        """
        sign = 1.0 if self.direction == "min" else -1.0
        found = [
            (sign * metrics[self.metric], -step)
            for step, metrics in steps.items()
            if math.isfinite(metrics.get(self.metric, math.nan))
        ]
        return {-negative for _, negative in sorted(found)[: self.count]}


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """The rules of one run."""

    keep_last: int | None = None
    """None: every step is kept."""
    keep_every: int | None = None
    best: BestSteps | None = None

    def __post_init__(self) -> None:
        if self.keep_last is not None:
            require_count("keep_last=", self.keep_last, least=1)
        if self.keep_every is not None:
            require_count("keep_every=", self.keep_every, least=1)

    def keeps_for_good(self, step: int) -> bool:
        """Whether the step is kept whatever it is; with `best` its metrics matter to others."""
        return self.best is None and self.keep_every is not None and step % self.keep_every == 0

    def steps_to_remove(self, whole: Mapping[int, Metrics]) -> list[int]:
        """The whole steps, given with their metrics, that no rule keeps; the oldest first."""
        if self.keep_last is None or not whole:
            return []
        in_order = sorted(whole)
        steps_to_keep = set(in_order[-self.keep_last :])
        if self.keep_every is not None:
            steps_to_keep |= {step for step in in_order if step % self.keep_every == 0}
        if self.best is not None:
            steps_to_keep |= self.best.choose(whole)
        return [step for step in in_order if step not in steps_to_keep]


def require_count(name: str, value: object, *, least: int) -> None:
    """Raise unless it is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} takes a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} takes a number from {least} on, got {value}")
