"""The ranks' subtests -> pytest's: each once for all ranks, failed when any rank failed it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from pytest_dcp._pytest_internals import count_failed_subtest
from pytest_dcp.errors import WorldError
from pytest_dcp.rank_names import ranks_text

OUTCOMES = ("failed", "skipped", "passed")
"""The worst first."""


def log(item: pytest.Item, reports: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Log the merged reports in the controller, in the order of their first rank.

    Raises `WorldError` when a rank sent one that is no report of a subtest of this item.
    """
    refused: list[int] = []
    merged: dict[str, list[tuple[int, dict[str, Any], Any]]] = {}
    for rank, data in reports:
        if (rep := _restore_report(item, data)) is None:
            refused.append(rank)
            continue
        key = json.dumps(data["_subtest.context"], default=repr)
        merged.setdefault(key, []).append((rank, data, rep))
    for alike in merged.values():
        _log_merged(item, alike)
    if refused:
        who = ranks_text(sorted(set(refused)))
        raise WorldError(f"{who} sent something other than a report of a subtest of this test")


def _restore_report(item: pytest.Item, data: Mapping[str, Any]) -> Any:
    """The report that a rank sent, or None when it is none of this item's subtests."""
    with contextlib.suppress(Exception):  # pytest's own reader trusts its input
        rep: Any = item.config.hook.pytest_report_from_serializable(
            config=item.config, data=dict(data)
        )
        is_subtest = isinstance(rep.context.kwargs, dict) and isinstance(rep.when, str)
        if is_subtest and rep.nodeid == item.nodeid and rep.outcome in OUTCOMES:
            return rep
    return None


def _log_merged(item: pytest.Item, alike: Sequence[tuple[int, dict[str, Any], Any]]) -> None:
    _, data, rep = min(alike, key=lambda one: (OUTCOMES.index(one[2].outcome), one[0]))
    ranks = [rank for rank, _, other in alike if other.outcome == rep.outcome]
    crash = getattr(rep.longrepr, "reprcrash", None)
    if crash is not None:
        crash.message = f"{ranks_text(ranks)}: {crash.message}"
    if rep.failed:
        count_failed_subtest(item)
    rep.context.kwargs.update(_wrap_reprs(item.config, data["_subtest.context"]["kwargs"]))
    with _capture_suspended(item.config):
        item.ihook.pytest_runtest_logreport(report=rep)


def _wrap_reprs(config: pytest.Config, kwargs: Mapping[str, str]) -> dict[str, object]:
    """A subtest's values as the rank wrote them, ready to be shown, or to be sent by xdist."""
    if hasattr(config, "workerinput"):
        return dict(kwargs)
    return {name: _ReprText(text) for name, text in kwargs.items()}


class _ReprText:
    """A value that is known only by its repr, which the rank made."""

    def __init__(self, text: object) -> None:
        self.text = str(text)

    def __repr__(self) -> str:
        return self.text


def _capture_suspended(config: pytest.Config) -> AbstractContextManager[None]:
    """Suspend capturing: subtests are logged during a test, but this output is not the test's."""
    manager: Any = config.pluginmanager.getplugin("capturemanager")
    if manager is None:
        return nullcontext()
    disabled: AbstractContextManager[None] = manager.global_and_fixture_disabled()
    return disabled
