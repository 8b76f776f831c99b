"""Joins the zygote and the rank: passes the session on to a forked rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import pytest

from pytest_dcp._harness.launchers import preloading
from pytest_dcp._harness.launchers.zygote import RankMain
from pytest_dcp._harness.launchers.zygote_launcher import ZygoteLauncher
from pytest_dcp._harness.protocol.launcher import RankFds, RankLaunch
from pytest_dcp._harness.rank import coverage, log_capture, session_preparation
from pytest_dcp._harness.rank import main as rank


def start_zygote(session: pytest.Session, folder: Path) -> ZygoteLauncher:
    """Fork a zygote that holds this session as it is now; its ranks may keep files in `folder`."""

    def prepare() -> RankMain:
        coverage.detach(folder)
        log_capture.SteadyLogs(session.config).install()
        plugin = session_preparation.prepare(session)

        def rank_main(order: RankLaunch, fds: RankFds) -> NoReturn:
            rank.run(order, fds, lambda one: session_preparation.enlist(one, plugin))

        return rank_main

    modules = preloading.modules_to_import(sys.modules, session.config.rootpath)
    detach = hasattr(session.config, "workerinput")
    return ZygoteLauncher.start(prepare, modules=modules, detach=detach)
