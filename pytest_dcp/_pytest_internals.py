"""All private names of pytest and pluggy that the package uses: the one door to them.

Each has its reason beside it, and the condition under which it can go. No other module of the
package imports a private name of pytest or reads a private attribute of its objects
(`tests/unit/test_internals.py`). Where the installed pytest lacks a name, importing this module
raises `UnsupportedVersionError` in words; names that only some versions have are used where they
exist.

For sessions with worlds; the plugin's start does not import it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

import pytest

from pytest_dcp.supported_versions import SupportedVersions

PYTEST = SupportedVersions("pytest", pytest.__version__, "8.4", "9.2")

with PYTEST.explain_missing_names():
    # Has `catching_logs`, which hangs handlers on every logger for each phase; `log_capture` leaves
    # them there. Can go when pytest does.
    from _pytest import logging as pytest_logging

    # The parts of a failure's report: plugins and xdist know these classes and no others. Can go
    # when pytest exports them, or takes a report as plain values.
    from _pytest._code.code import (
        ExceptionChainRepr,
        ExceptionRepr,
        ReprEntryNative,
        ReprFileLocation,
        ReprTraceback,
    )

    # The type of the writer that an entry writes itself to. Can go when pytest exports it.
    from _pytest._io import TerminalWriter

    # A spawned rank needs a configuration before its session, to add the attributes that an xdist
    # worker's has; `pytest.main` makes both. Can go when pytest makes one in public.
    from _pytest.config import _prepareconfig

    # The one place through which every way into pytest's debugger leads. Can go when pytest has a
    # hook that may refuse a debugger.
    from _pytest.debugging import pytestPDB

    # Where the junit plugin keeps its file. Can go when it has hooks for tests' records.
    from _pytest.junitxml import xml_key

    # For annotations: a session, a folder, a module, a class or an item.
    from _pytest.nodes import Node

    # Also accepted by `xfail(raises=)`: it decides itself which errors match. Can go when pytest
    # exports the base of RaisesExc and RaisesGroup.
    from _pytest.raises import AbstractRaises

    # Evaluates an item's xfail markers, and the key of the result. Can go when pytest has a public
    # check whether an error is expected.
    from _pytest.skipping import evaluate_xfail_marks, xfailed_key

    # Warnings of an item by its filters, as pytest records them around its own protocol. Can go
    # when an item's phases can be run apart in public.
    from _pytest.warnings import catch_warnings_for_item

PYTEST.require_attributes(pytestPDB, "_init_pdb")

__all__ = [
    "AbstractRaises",
    "ExceptionChainRepr",
    "ExceptionRepr",
    "Node",
    "ReprEntryNative",
    "ReprFileLocation",
    "ReprTraceback",
    "TerminalWriter",
    "begin_request",
    "catch_warnings_for_item",
    "count_failed_subtest",
    "end_request",
    "evaluate_xfail_marks",
    "fixtures_of",
    "forget_made_ids",
    "global_capture_of",
    "has_started",
    "init_pdb",
    "make_config",
    "pytest_logging",
    "redirect_writer",
    "remove_hooks_of",
    "report_sections",
    "set_base_of_tmp_path",
    "set_init_pdb",
    "setup_state",
    "this_fixture",
    "tmp_path_factory_of",
    "toml_value",
    "widen_parametrised_fixture",
    "writer_of",
    "xfailed_key",
    "xml_key",
]

# Configuration.


def make_config(args: list[str]) -> Any:
    """A configuration of these arguments, whose plugins are loaded."""
    return _prepareconfig(args)


def toml_value(config: pytest.Config, key: str) -> object:
    """The value of a key in an ini file, of any type.

    pytest 9.0 and 9.1 refuse a TOML file's 200 where a string was registered, and have no type for
    both. Can go when they are no longer supported.
    """
    private: Any = config
    value: object = private._inicfg[key].value
    return value


# Items and fixtures.


def report_sections(item: pytest.Item) -> list[tuple[str, str, str]]:
    """The very list of an item's (when, name, text); `add_report_section` can only append.

    Can go when sections can be read and replaced in public.
    """
    return item._report_sections


def fixtures_of(item: pytest.Item) -> Any:
    """pytest's data on an item's fixtures: `argnames`, `name2fixturedefs`; None without.

    Can go when an item lists its fixtures' definitions in public.
    """
    return getattr(item, "_fixtureinfo", None)


def begin_request(item: pytest.Item) -> None:
    """As pytest's own protocol does before an item's first phase: a run again starts afresh.

    Can go, as `end_request`, when an item's phases can be run apart in public.
    """
    private: Any = item
    if hasattr(item, "_request") and not private._request:
        private._initrequest()


def end_request(item: pytest.Item) -> None:
    """As pytest's own protocol does after an item's last phase: its fixtures' values may go."""
    private: Any = item
    if hasattr(item, "_request"):
        private._request = False
        private.funcargs = None


def this_fixture(request: pytest.FixtureRequest) -> Any:
    """The definition of the fixture whose function has this request; `finish` tears it down.

    Can go when a request can do that in public.
    """
    return request._fixturedef  # type: ignore[attr-defined]  # of a fixture's request


def setup_state(session: pytest.Session) -> Any:
    """The session's setup state: `stack`, node -> its finalizers; `teardown_exact`.

    Can go when an item's phases can be run apart in public.
    """
    return session._setupstate


def widen_parametrised_fixture(definition: Any, callspec: Any, name: str) -> None:
    """Let fixtures of any scope use a parametrised argument, which pytest scopes to a function.

    Can go when a parametrization can be given its scope after collection.
    """
    from _pytest.python import get_direct_param_fixture_func
    from _pytest.scope import Scope

    if definition.func is get_direct_param_fixture_func:
        definition._scope = callspec._arg2scope[name] = Scope.Session


def forget_made_ids(mark: pytest.Mark) -> None:
    """Let pytest recreate the ids of a parametrization when a module is collected again.

    pytest stores the escaped ids in the mark, and would escape them again. Can go when it
    stores the original ids.
    """
    source = mark._param_ids_from
    if source is not None and isinstance(source.kwargs.get("ids"), list | tuple):
        object.__setattr__(source, "_param_ids_generated", None)


def count_failed_subtest(item: pytest.Item) -> None:
    """Let pytest fail the item for a subtest of it. Can go when it counts logged reports."""
    from _pytest.subtests import failed_subtests_key  # pytest 9.0 and later, as subtests are

    identity: Any = getattr(item, "id", item.nodeid)  # pytest 9.2 has identities beside names
    item.config.stash[failed_subtests_key][identity] += 1


# Folders.


def tmp_path_factory_of(config: pytest.Config) -> Any:
    """The factory that `tmp_path` uses, before any test; None without the tmpdir plugin.

    Can go when a configuration has it in public.
    """
    return getattr(config, "_tmp_path_factory", None)


def set_base_of_tmp_path(config: pytest.Config, base: Path) -> None:
    """Let the factory make its folder here, when a test first asks for one.

    Can go when the factory can be given a folder after it was made.
    """
    factory = tmp_path_factory_of(config)
    if factory is not None:
        factory._basetemp, factory._given_basetemp = None, base


# Terminal, capture, debugger.


def writer_of(config: pytest.Config) -> tuple[Any, TextIO | None]:
    """The terminal reporter's writer and its file; None without such a reporter.

    Can go when the reporter's output can be redirected in public.
    """
    writer: Any = getattr(config.pluginmanager.getplugin("terminalreporter"), "_tw", None)
    return writer, getattr(writer, "_file", None)


def redirect_writer(writer: Any, file: TextIO | None) -> None:
    """Let a terminal writer write there; nothing without a writer."""
    if writer is not None:
        writer._file = file


def global_capture_of(config: pytest.Config) -> Any:
    """The capture of the standard files, with `in_`, `out` and `err`; None without one.

    Can go when pytest has a public way to find the descriptors that it has put aside.
    """
    return getattr(config.pluginmanager.getplugin("capturemanager"), "_global_capturing", None)


def has_started(stream: Any) -> bool:
    """Whether one of the streams of `global_capture_of` replaces the standard file."""
    return bool(getattr(stream, "_state", "") == "started")


def init_pdb() -> Any:
    """pytest's own function that makes a debugger, also where `set_init_pdb` has wrapped it."""
    return getattr(pytestPDB._init_pdb, "__wrapped__", pytestPDB._init_pdb)


def set_init_pdb(function: Any) -> None:
    """Let every way into the debugger lead through a function, with `__wrapped__` for the one that
    was there."""
    pytestPDB._init_pdb = function  # type: ignore[method-assign]  # there is no hook


def remove_hooks_of(caller: Any, plugin: object) -> None:
    """Drop a plugin's implementation of one hook; unregistering it would take all its hooks.

    Can go when pluggy can drop a single one.
    """
    caller._remove_plugin(plugin)
