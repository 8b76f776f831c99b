"""Every part of a process's state that is looked at between tests, and between examples."""

from __future__ import annotations

from pytest_dcp._harness.rank import state_of_names, state_of_python, state_of_torch
from pytest_dcp._harness.rank.process_state import Facet

ALL_FACETS: tuple[Facet, ...] = (
    *state_of_python.FACETS,
    *state_of_torch.FACETS,
    *state_of_names.FACETS,
)
QUICK_FACETS = tuple(facet for facet in ALL_FACETS if facet.is_quick)
"""The facets checked after each example of a property."""
