"""pytest's report of a marked item: shows the ranks' own failure instead of the controller's."""

from __future__ import annotations

import os

import pytest

from pytest_dcp._harness.controller import headings, report
from pytest_dcp._harness.controller.marked_item import MarkedItem
from pytest_dcp._harness.world.outcome import Outcome


def amend_report(marked: MarkedItem, call: pytest.CallInfo[None], rep: pytest.TestReport) -> None:
    """Show the ranks' own failure instead of the controller's."""
    outcome = marked.outcome
    if call.when == "call" and rep.passed and marked.unexpectedly is not None:
        rep.wasxfail = marked.unexpectedly
    if call.excinfo is None or call.excinfo.value is not marked.raised or outcome is None:
        return
    if outcome.kind == "skipped":
        rep.longrepr = _skip_location(marked.item, outcome)
    elif outcome.kind == "xfailed":
        rep.longrepr = report.own_longrepr(outcome, marked.item.config)
    elif outcome.first is not None:
        options = marked.harness.options
        seed = marked.harness.seed_of(marked.item.nodeid)
        override = options.defaults.world_size is not None
        rerun = report.rerun_line(_nodeid_here(marked.item), seed, marked.spec.size, override)
        # A report's attribute, since it goes along between xdist's processes.
        setattr(rep, report.HEADING, report.heading_marks(outcome))
        path, line, _ = marked.item.reportinfo()
        location = (str(path), (line or 0) + 1)
        if marked.found is not None and call.when == "call":
            from pytest_dcp._harness.controller import property_item

            rep.longrepr = property_item.longrepr_for(
                marked.found, marked.item.config, location, rerun
            )
        else:
            # By default the nodeid alone says all of it: the seed is made from it.
            is_default = options.seed is None and not override
            rep.longrepr = report.longrepr_for(
                outcome, outcome.first, marked.item.config, location, "" if is_default else rerun
            )
        if not hasattr(marked.item.config, "workerinput"):
            headings.colour_headings(rep)


def _nodeid_here(item: pytest.Item) -> str:
    """The nodeid as the command line takes it in the folder where pytest was started."""
    config = item.config
    path, separator, rest = item.nodeid.partition("::")
    here = os.path.relpath(config.rootpath / path, config.invocation_params.dir)
    return f"{here}{separator}{rest}"


def _skip_location(item: pytest.Item, outcome: Outcome) -> tuple[str, int, str]:
    for result in outcome.results.values():
        longrepr = (result.report or {}).get("longrepr")
        if isinstance(longrepr, list | tuple) and len(longrepr) == 3:
            return str(longrepr[0]), int(longrepr[1]), str(longrepr[2])
    path, line, _ = item.reportinfo()
    return str(path), (line or 0) + 1, outcome.reason
