"""Markers -> marked items: parametrization, checks, and the start and end of the harness."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import pytest

from pytest_dcp._harness.controller import losing_fixtures, marked_item
from pytest_dcp._harness.controller.decided_markers import markers_of
from pytest_dcp._harness.controller.item_hooks import ItemHooks
from pytest_dcp._harness.controller.options import Options
from pytest_dcp._harness.controller.session import HARNESS_KEY, Harness
from pytest_dcp._harness.protocol.world_spec import (
    FAKE,
    THREADED,
    MarkerValues,
    WorldSpec,
    largest_size,
    read_marker,
    resolve,
)
from pytest_dcp._harness.rank import junit_state
from pytest_dcp._harness.rank.junit_state import JunitState
from pytest_dcp._harness.rank.log_capture import SteadyLogs

USAGE_ERROR = "dcp_usage_error"
"""The key under which an xdist worker sends its controller the suite's errors."""
STARTS_RANKS = frozenset(
    (
        "MultiProcessTestCase",
        "MultiThreadedTestCase",
        "MultiProcContinuousTest",
        "MultiProcContinousTest",  # as torch spelled it until 2.7
    )
)
"""Classes of torch whose methods run in processes or threads that they start for that."""
MakeHarness = Callable[[pytest.Session, Options], Harness]
MAX_PROBLEMS = 50
"""Lines that one usage error shows."""


def parametrize(metafunc: pytest.Metafunc, options: Options) -> None:
    """One test per size when the marker holds a list, and per view of a fake world.

    Wrong lists are left to `read_specs`.
    """
    mark = metafunc.definition.get_closest_marker(options.marker)
    if mark is None:
        return
    values = read_marker(mark.args, mark.kwargs)
    if values.problems:
        return
    views: Any = values.keywords.get("ranks")
    if views is not None and not _parametrizes(metafunc.definition, "rank"):
        if "rank" not in metafunc.fixturenames:
            metafunc.fixturenames.append("rank")
        metafunc.parametrize("rank", views, ids=[f"rank={n}" for n in views])
    if not values.is_list or _parametrizes(metafunc.definition, "world_size"):
        return
    override = options.defaults.world_size
    sizes = values.sizes if override is None else (override,)
    if "world_size" not in metafunc.fixturenames:
        metafunc.fixturenames.append("world_size")
    metafunc.parametrize("world_size", sizes, ids=[f"world_size={n}" for n in sizes])


def _parametrizes(definition: pytest.Item, name: str) -> bool:
    for mark in definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs.get("argnames", "")
        listed = names.split(",") if isinstance(names, str) else names
        if name in [one.strip() for one in listed]:
            return True
    return False


def read_specs(items: Sequence[pytest.Item], options: Options) -> list[WorldSpec | None]:
    """The world of each item; None for ordinary tests.

    Raises one `pytest.UsageError` that names every test whose marker is wrong, and why.
    """
    specs, problems = [], []
    for item in items:
        spec, wrong = spec_of(item, options)
        specs.append(spec)
        problems += [f"{item.nodeid}: @pytest.mark.{options.marker} {text}" for text in wrong]
        if spec is not None:
            problems += [f"{item.nodeid}: {text}" for text in losing_fixtures.problems_of(item)]
    if problems:
        refuse_suite(items[0].config, problems)
    return specs


def refuse_suite(config: pytest.Config, problems: Sequence[str]) -> NoReturn:
    """Raise one `pytest.UsageError` with the problems, in the controller of an xdist worker too."""
    lines = [*problems[:MAX_PROBLEMS]]
    if len(problems) > len(lines):
        lines.append(f"... and {len(problems) - len(lines)} more")
    text = "\n".join(lines)
    if (output := getattr(config, "workeroutput", None)) is not None:
        output[USAGE_ERROR] = text  # xdist would call it a crash, and not say why
    raise pytest.UsageError(text)


def spec_of(item: pytest.Item, options: Options) -> tuple[WorldSpec | None, tuple[str, ...]]:
    """The world that an item asks for and what is wrong; (None, ()) without a marker."""
    marks = markers_of(item, options.marker)
    if not marks:
        return None, ()
    values = read_marker(marks[0].args, marks[0].kwargs)
    if values.problems:
        return None, values.problems
    if not isinstance(item, pytest.Function):
        return None, (f"cannot run a {type(item).__name__} in a world, only a test function",)
    if problem := _own_ranks_problem(item):
        return None, (problem,)
    if problem := _threads_problem(item, values):
        return None, (problem,)
    size, problem = _size_of(item, values)
    if problem:
        return None, (problem,)
    defaults = options.defaults
    if _parametrized_size(item) is not None:
        # The test sees this size: an override went into the parametrization, or is not ours.
        defaults = replace(defaults, world_size=None)
    view = _parameter(item, "rank") if values.keywords.get("backend") == FAKE else None
    return resolve(values, size, defaults, view if isinstance(view, int) else 0)


def _threads_problem(item: pytest.Function, values: MarkerValues) -> str:
    """Why a test cannot be called in threads; empty if it can."""
    if values.keywords.get("backend") != THREADED:
        return ""
    if item.cls is not None and issubclass(item.cls, unittest.TestCase):
        return "with backend='threaded' is for test functions, not for methods of a TestCase"
    if hasattr(item.obj, "hypothesis"):
        return "with backend='threaded' cannot run a property: Hypothesis draws in one thread"
    return ""


def _own_ranks_problem(item: pytest.Function) -> str:
    """Why a method of torch's multi-process test classes takes no marker; empty for others."""
    bases = [*getattr(item.cls, "__mro__", ())]
    if not any(_is_torchs(base) and base.__name__ in STARTS_RANKS for base in bases):
        return ""
    name = next(base.__name__ for base in bases if _is_torchs(base))
    return (
        f"is on a test of {name}, which starts ranks of its own. To run it in a world, have "
        f"{item.cls.__name__ if item.cls is not None else 'its class'} inherit from "
        f"pytest_dcp.WorldTestMixin and TestCase instead of {name}, and start no "
        "processes and no process group in setUp; to leave it to torch, take the marker off"
    )


def _is_torchs(base: type) -> bool:
    return base.__module__.startswith("torch.testing.")


def _parametrized_size(item: pytest.Function) -> int | None:
    """The whole number that a parametrization of `world_size` gives this test, if it does."""
    size = _parameter(item)
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _parameter(item: pytest.Function, name: str = "world_size") -> object:
    """The value that a parametrization of this name gives this test; None without one."""
    return item.callspec.params.get(name) if hasattr(item, "callspec") else None


def _size_of(item: pytest.Function, values: MarkerValues) -> tuple[int, str]:
    size = _parametrized_size(item)
    if size is not None:
        most = largest_size(values.keywords)
        if not 1 <= size <= most:
            return 0, f"takes a size from 1 to {most}; the parametrization gave {size!r}"
        return size, ""
    if (value := _parameter(item)) is not None:
        return 0, f"takes an int; the parametrization of world_size gave {value!r}"
    if not values.sizes:
        return 0, "takes a size, as in world_size(4), or a parametrization of `world_size`"
    if values.is_list:
        return 0, (
            "holds a list of sizes in a place that cannot be parametrised by it "
            "(pytest.param, a unittest.TestCase, or a marker that was added to the collected "
            "test): give one size"
        )
    return values.sizes[0], ""


def begin(
    session: pytest.Session, options: Options, make_harness: MakeHarness | None = None
) -> Harness:
    """The session's harness, its launcher started, its items attached.

    make_harness: another class of harness.

    Raises `pytest.UsageError` when a marker is wrong: until now any plugin may have added one.
    """
    specs = read_specs(session.items, options)
    harness = (make_harness or Harness)(session, options)
    session.config.stash[HARNESS_KEY] = harness
    manager = session.config.pluginmanager
    manager.register(JunitState(), junit_state.NAME)
    harness.launcher()
    pdb_invoke = manager.unregister(name="pdbinvoke")
    hooks = ItemHooks(harness, pdb_invoke, SteadyLogs(session.config))
    manager.register(hooks, "pytest_dcp.items")
    for note in harness.notes:
        tell(session.config, note)
    for index, (item, spec) in enumerate(zip(session.items, specs, strict=True)):
        if spec is not None:
            mark = markers_of(item, options.marker)[0]
            explicit = mark.kwargs.get("timeout") is not None
            marked_item.attach(item, marked_item.MarkedItem(item, index, spec, explicit, harness))
    return harness


def tell(config: pytest.Config, line: str) -> None:
    """One line for the user: on the terminal, or through xdist to the one that has it."""
    if hasattr(config, "workeroutput"):
        config.workeroutput.setdefault("dcp_notes", []).append(line)
        return
    terminal = config.pluginmanager.getplugin("terminalreporter")
    if terminal is not None:
        terminal.ensure_newline()
        terminal.write_line(line)
