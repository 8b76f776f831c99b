"""The settings of a test that `@given` wraps; needs no import of Hypothesis.

Hypothesis stores them in an attribute of the function. This module can go when a test's settings
can be read and replaced in public.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypothesis import settings as Settings

ATTRIBUTE = "_hypothesis_internal_use_settings"


def settings_of(test: Any) -> Settings | None:
    """The settings of a test's function or method; None if it is no property."""
    found: Settings | None = getattr(test, ATTRIBUTE, None)
    return found


def set_settings(test: Any, settings: Settings) -> None:
    """Replace the settings of a test's function, also of the one behind a method."""
    setattr(getattr(test, "__func__", test), ATTRIBUTE, settings)
