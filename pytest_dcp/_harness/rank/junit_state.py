"""Tests' records for the junit file itself: collected in ranks, and written by the controller.

`record_testsuite_property` and `record_xml_attribute` talk to pytest's `LogXML` in their own
process. In a rank a recorder replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pytest_dcp._pytest_internals import xml_key
from pytest_dcp.rank_names import ranks_text

NAME = "pytest_dcp.junit"
FAMILY_KEY = pytest.StashKey[str]()
"""In a spawned rank: the family of the controller's junit file."""
Entry = tuple[str, str, object]
"""property or attribute, its name, its value."""


class _Recorder:
    """Stands for `LogXML`, and for the reporter of any test."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.entries: list[Entry] = []

    def add_global_property(self, name: str, value: object) -> None:
        self.entries.append(("property", name, value))

    def node_reporter(self, report: object) -> _Recorder:
        return self

    def add_attribute(self, name: str, value: object) -> None:
        self.entries.append(("attribute", name, value))


class JunitState:
    """The plugin, in the controller and in ranks."""

    def __init__(self) -> None:
        self._recorder: _Recorder | None = None

    def record(self, config: pytest.Config) -> None:
        """This process is to become ranks: record what is meant for the junit file, if any."""
        xml: Any = config.stash.get(xml_key, None)
        family = xml.family if xml is not None else config.stash.get(FAMILY_KEY, "")
        if family:
            self._recorder = _Recorder(family)
            stash: Any = config.stash  # which takes a LogXML only
            stash[xml_key] = self._recorder

    @pytest.hookimpl(tryfirst=True)
    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """A spawned rank's session ends: pytest would unregister the recorder in the stash."""
        if self._recorder is not None:
            del config.stash[xml_key]

    def pytest_dcp_rank_state(self) -> list[Entry] | None:
        """Records since the last test."""
        if self._recorder is None or not self._recorder.entries:
            return None
        entries, self._recorder.entries = self._recorder.entries, []
        return [(kind, name, _plain(value)) for kind, name, value in entries]

    def pytest_dcp_take_rank_states(
        self, item: pytest.Item, states: Sequence[list[Entry] | None]
    ) -> None:
        """Write them: equal records of all ranks once, the rest with the ranks' names."""
        xml: Any = item.config.stash.get(xml_key, None)
        if xml is None:
            return
        ranks: dict[tuple[str, str, str], list[int]] = {}
        values: dict[tuple[str, str, str], object] = {}
        for rank, entries in enumerate(states):
            for kind, name, value in entries or ():
                ranks.setdefault((kind, name, str(value)), []).append(rank)
                values[kind, name, str(value)] = value
        for (kind, name, text), recorders in ranks.items():
            alike = len(set(recorders)) == len(states)
            value = values[kind, name, text]
            if kind == "property":
                title = name if alike else f"{name} [{ranks_text(sorted(set(recorders)))}]"
                xml.add_global_property(title, value)
            else:
                # Attributes of XML have plain names: of ranks that differ the lowest one counts.
                reporter = xml.node_reporter(getattr(item, "id", item.nodeid))
                if alike or str(name) not in reporter.attrs:
                    reporter.add_attribute(name, value)


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool) else str(value)
