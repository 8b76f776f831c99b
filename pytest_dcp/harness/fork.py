"""Joins the zygote and the rank: how a forked rank gets its session."""

from __future__ import annotations

from typing import NoReturn

import pytest

from pytest_dcp.harness import rank, rank_items
from pytest_dcp.harness.launch import Order, RankFds
from pytest_dcp.harness.zygote import RankMain, ZygoteLauncher


def start_zygote(session: pytest.Session) -> ZygoteLauncher:
    """Fork a zygote that holds this session as it is now."""

    def prepare() -> RankMain:
        plugin = rank_items.prepare(session)

        def rank_main(order: Order, fds: RankFds) -> NoReturn:
            rank.run(order, fds, lambda one: rank_items.enlist(one, plugin))

        return rank_main

    return ZygoteLauncher.start(prepare, detach=hasattr(session.config, "workerinput"))
