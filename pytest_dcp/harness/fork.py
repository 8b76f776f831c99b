"""Joins the zygote and the rank: how a forked rank gets its session."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from pytest_dcp.harness import logs, measure, rank, rank_items
from pytest_dcp.harness.launch import Order, RankFds
from pytest_dcp.harness.zygote import RankMain, ZygoteLauncher


def start_zygote(session: pytest.Session, folder: Path) -> ZygoteLauncher:
    """Fork a zygote that holds this session as it is now; its ranks may keep files in `folder`."""

    def prepare() -> RankMain:
        measure.detach(folder)
        logs.SteadyLogs(session.config).install()
        plugin = rank_items.prepare(session)

        def rank_main(order: Order, fds: RankFds) -> NoReturn:
            rank.run(order, fds, lambda one: rank_items.enlist(one, plugin))

        return rank_main

    return ZygoteLauncher.start(prepare, detach=hasattr(session.config, "workerinput"))
