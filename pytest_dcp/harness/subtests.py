"""The ranks' subtests -> pytest's: each once for all ranks, failed when any rank failed it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from pytest_dcp.harness.outcome import ranks_text


def log(item: pytest.Item, reports: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Log the merged reports in the controller, in the order of their first rank."""
    from _pytest.subtests import failed_subtests_key

    merged: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for rank, data in reports:
        merged.setdefault(json.dumps(data.get("_subtest.context"), default=repr), []).append(
            (rank, data)
        )
    for alike in merged.values():
        rank, data = min(alike, key=lambda pair: (_severity(pair[1]), pair[0]))
        ranks = [r for r, d in alike if d["outcome"] == data["outcome"]]
        rep = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        crash = getattr(rep.longrepr, "reprcrash", None)
        if crash is not None:
            crash.message = f"{ranks_text(ranks)}: {crash.message}"
        if rep.failed:
            item.config.stash[failed_subtests_key][item.id] += 1
        rep.context.kwargs.update(_as_said(item.config, data["_subtest.context"]["kwargs"]))
        with _capture_suspended(item.config):
            item.ihook.pytest_runtest_logreport(report=rep)


def _as_said(config: pytest.Config, kwargs: Mapping[str, str]) -> dict[str, object]:
    """A subtest's values as the rank wrote them, ready to be shown, or to be sent by xdist."""
    if hasattr(config, "workerinput"):
        return dict(kwargs)
    return {name: _Said(text) for name, text in kwargs.items()}


class _Said:
    """A value that is known only by its repr, which the rank made."""

    def __init__(self, text: object) -> None:
        self.text = str(text)

    def __repr__(self) -> str:
        return self.text


def _capture_suspended(config: pytest.Config) -> AbstractContextManager[None]:
    """Subtests are logged in the middle of a test: what that writes is not the test's output."""
    manager: Any = config.pluginmanager.getplugin("capturemanager")
    if manager is None:
        return nullcontext()
    disabled: AbstractContextManager[None] = manager.global_and_fixture_disabled()
    return disabled


def _severity(data: dict[str, Any]) -> int:
    return ("failed", "skipped", "passed").index(data["outcome"])
