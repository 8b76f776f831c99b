"""Mismatches between a state dict and a model or its optimizers, reported together. Pure
(no I/O).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pytest_dcp.errors import CheckpointMismatchError

SHOWN = 20
"""The most names that a message shows of each kind; the error's attributes hold all."""
SUGGESTED_FROM = 2000
"""The most names with which a name is compared for similarity, which is slow."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Everything that does not fit, in one call."""

    missing: tuple[str, ...] = ()
    """Names that the model has and the state dict lacks."""
    unexpected: tuple[str, ...] = ()
    """Names that the state dict has and the model lacks."""
    misfits: Mapping[str, str] = field(default_factory=dict)
    """Names that both have but that do not fit, and why."""
    groups: tuple[str, ...] = ()
    """Groups of parameters that have no counterpart, and why."""
    advice: tuple[str, ...] = ()
    """Advice about missing names, beside the usual advice."""

    def merge(self, others: Iterable[Mismatch]) -> Mismatch:
        """All that is in this one or in the others."""
        every = [self, *others]
        return Mismatch(
            tuple(dict.fromkeys(name for one in every for name in one.missing)),
            tuple(dict.fromkeys(name for one in every for name in one.unexpected)),
            {name: why for one in every for name, why in one.misfits.items()},
            tuple(dict.fromkeys(why for one in every for why in one.groups)),
            tuple(dict.fromkeys(line for one in every for line in one.advice)),
        )

    def require_none(self, what: str, *, strict: bool) -> None:
        """Raise CheckpointMismatchError for all mismatches; if not strict, only for misfits.

        what: the class of the model or of the optimizers, for the message.
        """
        if not self.misfits and not (strict and (self.missing or self.unexpected or self.groups)):
            return
        raise CheckpointMismatchError(
            self._text(what, strict),
            missing=self.missing,
            unexpected=self.unexpected,
            mismatched=tuple(self.misfits),
        )

    def _text(self, what: str, strict: bool) -> str:
        # The wording of torch's own strict errors, which programs look for.
        lines = [f"Error(s) in loading state_dict for {what}:"]
        if strict:
            lines += _names("Missing", self.missing)
            lines += _names("Unexpected", self.unexpected)
            lines += self.groups[:SHOWN]
        lines += list(self.misfits.values())[:SHOWN]
        if hidden := max(0, len(self.misfits) - SHOWN) + max(0, len(self.groups) - SHOWN):
            lines.append(f"... and {hidden} more, see the error's attributes")
        if strict:
            lines += _nearest(self.missing, self.unexpected)
            lines += self.advice
        if strict and not self.misfits:
            lines.append(
                "Load a state dict of this model, or only the matching entries with "
                "StateDictOptions(strict=False)."
            )
        return "\n  ".join(lines)


def _names(kind: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    text = ", ".join(f'"{name}"' for name in names[:SHOWN])
    more = f", ... and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{kind} key(s) in state_dict: {text}{more}."]


def _nearest(names: Sequence[str], pool: Sequence[str]) -> list[str]:
    """Suggestions for missing names that may be misspelt: existing similar names."""
    found = []
    for name in names[:SHOWN]:
        if nearest := difflib.get_close_matches(name, pool[:SUGGESTED_FROM], n=1):
            found.append(f'"{name}" (nearest: "{nearest[0]}")')
    return [f"Nearest unexpected key(s): {', '.join(found)}."] if found else []
