"""The plugin's entry points for pytest: options, markers, fixtures and hooks. Thin; does not import
torch.

Everything expensive is imported at the first marked test.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest

from pytest_dcp import command_line, tracebacks
from pytest_dcp._harness.controller import decided_markers
from pytest_dcp._harness.controller import options as options_
from pytest_dcp._harness.controller.options import Options
from pytest_dcp._swap import options as swap_options
from pytest_dcp.api import current_rank
from pytest_dcp.errors import UnsupportedVersionError
from pytest_dcp.faults import options as fault_options

OUTER_VARIABLES = (
    "RANK",
    "TORCHELASTIC_RUN_ID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "SLURM_STEP_NUM_TASKS",
)
"""A process without any of these was started by no launcher of ranks."""
OPTIONS_KEY = pytest.StashKey[Options]()
NOTES_KEY = pytest.StashKey[set[str]]()
OUTER_KEY = pytest.StashKey[Any]()
"""The `OuterPlugin` of a session under torchrun and the like; None of others."""
SHOWS_GROUPS_WITHOUT_FRAMES = pytest.version_tuple[:3] >= (9, 0, 3)
"""Older versions fail with an IndexError, which ends the session. Can go with them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """--dcp-* and their ini twins."""
    command_line.add_options(
        parser, options_.OPTIONS + fault_options.OPTIONS + swap_options.OPTIONS
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Swap engines, if requested, before any conftest can import torch's."""
    if swap_options.asks_for_engine(early_config):
        from pytest_dcp._swap import session

        session.begin(early_config)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Our own hooks, which others may implement."""
    from pytest_dcp._harness.controller import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    """Read the options, register the marker and the fixtures."""
    from pytest_dcp._harness.controller import fixtures
    from pytest_dcp.faults import fixtures as fault_fixtures

    # torch.cuda.is_available() would initialise the driver, after which no rank could be forked.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    command_line.check_together(
        lambda: config.stash.setdefault(OPTIONS_KEY, options_.read_options(config)),
        lambda: fault_options.read_fault_options(config),
    )
    options = config.stash[OPTIONS_KEY]
    config.pluginmanager.register(fixtures, "pytest_dcp.fixtures")
    config.pluginmanager.register(fault_fixtures, "pytest_dcp.fault_fixtures")
    config.stash[OUTER_KEY] = None
    if any(name in os.environ for name in OUTER_VARIABLES) and not _in_a_rank():
        from pytest_dcp._harness.outer import session_plugin

        config.stash[OUTER_KEY] = session_plugin.register(config, options)
    config.addinivalue_line(
        "markers",
        "dcp_adopt(bool): whether --dcp-adopt runs the processes that the test starts as ranks.",
    )
    if options.marker:
        config.addinivalue_line(
            "markers",
            f"{options.marker}(n_or_list, backend='auto', device='auto', mesh=None, "
            "mesh_dim_names=None, timeout=None, isolation='test'): run the test in a fresh world "
            "of n ranks; a list parametrises; without n, a parametrization of world_size decides.",
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A list of sizes parametrises the test."""
    name = metafunc.config.stash[OPTIONS_KEY].marker
    if name and metafunc.definition.get_closest_marker(name) is not None:
        _require_known_pytest(pytest.Collector.CollectError)
        from pytest_dcp._harness.controller import collection

        collection.parametrize(metafunc, metafunc.config.stash[OPTIONS_KEY])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Leave out our unhelpful frames of an error at collection, too."""
    report = yield
    # pytest keeps the error there until the report is made (pytest 9.2).
    excinfo = getattr(getattr(report, "call", None), "excinfo", None)
    if report.failed and excinfo is not None and _mark_frames(excinfo.value):
        longrepr: Any = collector.repr_failure(excinfo)
        if hasattr(longrepr, "toterminal"):
            report.longrepr = longrepr
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Check every marker, also of deselected tests: report all problems at once."""
    _check_markers(session, items)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> Generator[None, object, object]:
    """Check again the markers that other plugins have added, also for --collect-only."""
    _check_markers(session, session.items)
    return (yield)


def _check_markers(session: pytest.Session, items: list[pytest.Item]) -> None:
    options = session.config.stash[OPTIONS_KEY]
    if any(decided_markers.markers_of(item, options.marker) for item in items):
        _require_known_pytest(pytest.UsageError)
        from pytest_dcp._harness.controller import collection

        collection.read_specs(items, options)


def _require_known_pytest(refusal: type[Exception]) -> None:
    """Raise `refusal` for a pytest that lacks a private name which worlds need."""
    try:
        from pytest_dcp import _pytest_internals  # noqa: F401
    except UnsupportedVersionError as error:
        raise refusal(str(error)) from None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Fork the zygote between collection and the first test, and end everything after the last.

    The markers that tests have now are final: see `decided_markers`.
    """
    options = session.config.stash[OPTIONS_KEY]
    decided_markers.decide(session.items, options.marker)
    outer = session.config.stash[OUTER_KEY]
    adopts = options.adopt and bool(session.items)
    needs_worlds = _needs_worlds(session.items) or (outer is not None and outer.is_active)
    if session.config.option.collectonly or _in_a_rank() or not (needs_worlds or adopts):
        return (yield)
    if sys.platform != "linux":
        return (yield)  # `pytest_runtest_setup` refuses each test that needs a world
    if outer is not None and outer.is_seat:
        return (yield)  # it starts ranks, and runs no test
    from pytest_dcp._harness.controller import collection

    make_harness = outer.make_harness if outer is not None and outer.is_active else None
    harness = collection.begin(session, options, make_harness)
    if adopts:
        from pytest_dcp._harness.adoption import session as adoption

        adoption.begin(harness)
    try:
        result: object = yield
    except (KeyboardInterrupt, pytest.exit.Exception):
        harness.close(hurried=True)
        raise
    except BaseException:
        harness.close()
        raise
    harness.close()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse tests that need a world where there can be none; the others run."""
    if sys.platform != "linux" and _needs_worlds([item]):
        pytest.fail(
            f"worlds need Linux (memfds, parent-death signals, /proc), and this is {sys.platform}; "
            "the checkpoint engine, pytest_dcp.checkpoint, works here without them",
            pytrace=False,
        )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Do not run a test whose marker came too late: it would have no world, or the wrong one."""
    __tracebackhide__ = True
    decided_markers.refuse_late_markers(item, item.config.stash[OPTIONS_KEY].marker)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Like `pytest_runtest_call`, for a marker that another plugin's hook of this name
    has added.
    """
    __tracebackhide__ = True
    decided_markers.refuse_late_markers(pyfuncitem, pyfuncitem.config.stash[OPTIONS_KEY].marker)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Leave out our unhelpful frames; fail the test if a marker came too late."""
    if call.excinfo is not None:
        _mark_frames(call.excinfo.value)
    report = yield
    marker = item.config.stash[OPTIONS_KEY].marker
    decided_markers.fail_for_late_markers(item, call, report, marker)
    return report


def _mark_frames(error: BaseException) -> bool:
    return tracebacks.mark_frames(
        error,
        tracebacks.hides_frames
        if SHOWS_GROUPS_WITHOUT_FRAMES
        else tracebacks.hides_frames_except_of_groups,
    )


def _in_a_rank() -> bool:
    """A spawned rank has a session of its own, which must not start worlds in turn."""
    return current_rank() is not None


def _needs_worlds(items: list[pytest.Item]) -> bool:
    return any(
        decided_markers.DECIDED_KEY in item.stash or "worlds" in getattr(item, "fixturenames", ())
        for item in items
    )


@pytest.hookimpl(wrapper=True)
def pytest_report_from_serializable(
    data: dict[str, Any],
) -> Generator[None, pytest.TestReport | None, pytest.TestReport | None]:
    """Colour a report that another process sent."""
    report = yield
    if report is not None and "dcp_heading" in data:
        from pytest_dcp._harness.controller import headings

        headings.colour_headings(report)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Print messages of xdist's workers, once. Raises `pytest.UsageError` for a wrong marker."""
    output = getattr(node, "workeroutput", {})
    if (wrong := output.get("dcp_usage_error")) is not None:
        raise pytest.UsageError(wrong)
    terminal = node.config.pluginmanager.getplugin("terminalreporter")
    printed_notes = node.config.stash.setdefault(NOTES_KEY, set())
    for note in output.get("dcp_notes", ()):
        if note not in printed_notes and terminal is not None:
            printed_notes.add(note)
            terminal.ensure_newline()
            terminal.write_line(note)
