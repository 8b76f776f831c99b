"""Puts the process's state back after each test of a warm rank; a plugin of the rank's session.

Enters: pytest's hooks. Leaves: the state that the test's fixtures of wider scope had made, and the
names of what could not be put back.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

from pytest_dcp._harness.rank.process_facets import ALL_FACETS
from pytest_dcp._harness.rank.process_state import ProcessState
from pytest_dcp._harness.rank.state_of_names import watch_suite
from pytest_dcp._pytest_internals import Node, setup_state


class StateKeeper:
    """The plugin."""

    def __init__(self, session: pytest.Session) -> None:
        watch_suite(session.config.rootpath)
        self._setup = setup_state(session)
        self._state = ProcessState(ALL_FACETS)
        self._scopes: list[Node] = []
        """The fixtures that were set up around the last test."""
        self.leftovers: tuple[str, ...] = ()
        """Permanent changes by the last test."""

    def open(self) -> None:
        """Fixtures of wider scope are torn down: their changes are to last."""
        self._state.open()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        """Let fixtures of wider scope make the state that the test finds."""
        stack = self._setup.stack
        self.leftovers = ()
        if [*stack] == self._scopes:
            self._state.wait()
        else:  # some were torn down since
            self._state.open()
        try:
            return (yield)
        finally:
            self._state.settle()
            self._scopes = [node for node in stack if node is not item]
            if item in stack:
                # The last of the test's own finalizers, before those of wider scope.
                stack[item][0].insert(0, self._put_back)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[object]
    ) -> Generator[None, object, object]:
        """Tell a fixture of the test from one that outlasts it."""
        if fixturedef.scope == "function":
            self._state.settle()
            return (yield)
        with self._state.lasting():
            return (yield)

    def _put_back(self) -> None:
        self.leftovers = self._state.put_back()
