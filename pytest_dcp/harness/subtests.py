"""The ranks' subtests -> pytest's: each subtest once for all ranks, failed when any rank failed it."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
            item.config.stash[failed_subtests_key][item.id] += 1  # type: ignore[attr-defined]  # pytest >= 9.1; keyed as pytest keys it
        item.ihook.pytest_runtest_logreport(report=rep)


def _severity(data: dict[str, Any]) -> int:
    return ("failed", "skipped", "passed").index(data["outcome"])
