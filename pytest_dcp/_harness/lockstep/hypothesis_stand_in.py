"""Hypothesis' internals in the controller: its engine runs a stand-in for a property of the ranks.

The engine decides on each example; `attempt_of` describes it to the ranks, and `mirror` gives their
draws to the engine. See `hypothesis_internals` for the ranks' end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, NoReturn

from hypothesis import Phase, core, given, settings
from hypothesis import strategies as st
from hypothesis.control import current_build_context
from hypothesis.internal.conjecture.data import ConjectureData
from hypothesis.reporting import report as say

from pytest_dcp._harness.lockstep.example_messages import (
    CASES,
    Attempt,
    Choice,
    Entry,
    Property,
    Reply,
    SpanEnd,
    SpanStart,
)
from pytest_dcp._harness.lockstep.hypothesis_internals import begin_examples_with, mark_rejected

DEFAULT_DEADLINE = timedelta(milliseconds=200)
"""Hypothesis' default, per example. Too short for a first collective across processes."""
STAND_IN_LINES = {case + end for case in CASES for end in ("", " <state machine>")}
"""The engine's messages about a stand-in, whose arguments it does not print, in all versions."""
EXPECTED = "Failed to reproduce exception. Expected:"
"""The engine's message, with our traceback, about a failure that did not reproduce."""

__all__ = [
    "attempt_of",
    "hide_stand_in",
    "mirror",
    "reject",
    "say",
    "seed_of",
    "seeding_nothing",
    "stand_in",
]


def stand_in(prop: Property, play: Callable[[ConjectureData, bool], None]) -> Callable[[], None]:
    """A test that Hypothesis runs instead of a property, with its settings and database.

    `play` has ranks draw each example, and `mirror` copies the draws into its data.
    """

    def test(data: Any) -> None:
        play(data.conjecture_data, current_build_context().is_final)

    if prop.name.isidentifier():
        test.__name__ = prop.name
    its_settings = _settings_of(prop)
    wrapped: Any = its_settings(given(data=st.data())(test))
    wrapped._hypothesis_internal_print_given_args = False
    wrapped._hypothesis_internal_use_seed = prop.seed
    if prop.seed is None and its_settings.derandomize:
        wrapped._hypothesis_internal_use_seed = int.from_bytes(prop.database_key, "big")
    # With a forced seed Hypothesis uses no database.
    wrapped._hypothesis_internal_database_key = (
        prop.database_key if core.global_force_seed is None else None
    )
    run: Callable[[], None] = wrapped
    return run


def seeding_nothing() -> AbstractContextManager[None]:
    """Leave random generators alone in this block: no example runs in this process."""
    return begin_examples_with(lambda: None)


def _settings_of(prop: Property) -> settings:
    """The test's settings, except for the ones that cannot work across ranks.

    The explain phase traces lines, which ranks execute and the engine does not see.
    """
    values = dict(prop.settings)
    if values["deadline"] == DEFAULT_DEADLINE:
        values["deadline"] = None
    values["phases"] = [phase for phase in values["phases"] if phase is not Phase.explain]
    return settings(**values, print_blob=True, backend="hypothesis")


def hide_stand_in(error: Exception) -> Exception:
    """Hypothesis' exception, without its notes on the stand-in and the engine's frames."""
    notes: list[str] = getattr(error, "__notes__", [])
    notes[:] = [
        note for note in notes if note not in STAND_IN_LINES and not note.startswith(EXPECTED)
    ]
    for one in getattr(error, "exceptions", ()):
        one.__traceback__ = None
    return error.with_traceback(None)


def seed_of(run: Any) -> int | str | None:
    """The seed with which `--hypothesis-seed` repeats a stand-in's run, once it has run."""
    generated: int | None = getattr(run, "_hypothesis_internal_use_generated_seed", None)
    forced: Any = core.global_force_seed
    return generated if generated is not None else forced


def attempt_of(data: ConjectureData, *, final: bool) -> Attempt:
    """The attempt from which ranks draw the engine's next example."""
    seed = None if data._random is None else data._random.getrandbits(64)
    return Attempt(tuple(data.prefix or ()), data.max_choices, seed, final)


def mirror(data: ConjectureData, entries: Sequence[Entry]) -> None:
    """Copy a rank's draws into the engine's data. Raises `StopTest` if the engine has enough."""
    data.prefix = tuple(entry.value for entry in entries if isinstance(entry, Choice))
    outermost = data.depth
    for entry in entries[1:]:  # the first opens the whole example, as it is open here
        match entry:
            case Choice():
                draw = getattr(data, f"draw_{entry.kind}")
                draw(**entry.constraints, forced=entry.value if entry.forced else None)
            case SpanStart():
                data.start_span(entry.label)
            case SpanEnd() if data.depth > outermost:
                data.stop_span(discard=entry.discard)
    while data.depth > outermost:
        data.stop_span()


def reject(data: ConjectureData, reply: Reply) -> NoReturn:
    """Mark the engine's data as rejected by a rank."""
    if reply.status == "overrun":
        data.mark_overrun()
    mark_rejected(data, reply.reason or None, reply.location)
