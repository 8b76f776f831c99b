"""Joins the zygote and the rank: how a forked rank gets its session."""

from __future__ import annotations

from typing import NoReturn

import pytest

from pytest_dcp.harness import rank, rank_items
from pytest_dcp.harness.launch import Order, RankFds
from pytest_dcp.harness.zygote import ZygoteLauncher


def start_zygote(session: pytest.Session) -> ZygoteLauncher:
    """Fork a zygote that holds this session as it is now."""

    def rank_main(order: Order, fds: RankFds) -> NoReturn:
        rank.run(order, fds, lambda one: rank_items.enlist(one, session))

    return ZygoteLauncher.start(
        rank_main,
        lambda: rank_items.silence(session.config),
        detach=hasattr(session.config, "workerinput"),
    )
