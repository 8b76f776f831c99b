"""pytest's way in: options, markers, fixtures and hooks. Thin, and no torch at import.

Everything that costs is imported when the first marked test is met.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from pytest_dcp.harness import options as options_
from pytest_dcp.harness.options import Options

OPTIONS_KEY = pytest.StashKey[Options]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--dcp-* and their ini twins."""
    options_.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Read the options, register the marker and the fixtures."""
    from pytest_dcp.harness import fixtures

    options = options_.read_options(config)
    config.stash[OPTIONS_KEY] = options
    config.pluginmanager.register(fixtures, "pytest_dcp.fixtures")
    if options.marker:
        config.addinivalue_line(
            "markers",
            f"{options.marker}(n_or_list, backend='auto', device='auto', mesh=None, "
            "mesh_dim_names=None, timeout=None, isolation='test'): run the test in a fresh world of "
            "n ranks; a list parametrises. With no n, the size is the parametrization of world_size.",
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A list of sizes parametrises the test."""
    name = metafunc.config.stash[OPTIONS_KEY].marker
    if name and metafunc.definition.get_closest_marker(name) is not None:
        from pytest_dcp.harness import marking

        marking.parametrize(metafunc, metafunc.config.stash[OPTIONS_KEY])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Check every marker: all problems at once, before anything runs."""
    options = session.config.stash[OPTIONS_KEY]
    if options.marker and any(item.get_closest_marker(options.marker) for item in items):
        from pytest_dcp.harness import marking

        marking.check(items, options)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Fork the zygote between collection and the first test, and end everything after the last."""
    options = session.config.stash[OPTIONS_KEY]
    harness = None
    if not session.config.option.collectonly:
        from pytest_dcp.harness import marking

        if marking.needs_worlds(session.items, options):
            harness = marking.begin(session, options)
    try:
        return (yield)
    finally:
        if harness is not None:
            marking.end(harness)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Tell a marked item what comes after it."""
    from pytest_dcp.harness.items import ITEM_KEY

    marked = item.stash.get(ITEM_KEY, None)
    if marked is not None:
        marked.begin(nextitem)
    return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ranks' failure, not the controller's."""
    from pytest_dcp.harness.items import ITEM_KEY

    rep = yield
    marked = item.stash.get(ITEM_KEY, None)
    if marked is not None:
        marked.amend(call, rep)
    return rep


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool | None:
    """pytest-timeout's limit becomes the world's."""
    from pytest_dcp.harness.items import ITEM_KEY

    marked = item.stash.get(ITEM_KEY, None)
    if marked is None:
        return None
    marked.limit(settings.timeout)
    return True
