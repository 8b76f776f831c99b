"""Copied as measured.py: functions that covers.py runs, each in one place."""

from __future__ import annotations


def in_the_controller() -> str:
    return "in the controller"


def in_every_rank() -> str:
    return "in every rank"


def in_one_rank(rank: int) -> str:
    if rank == 1:
        return "in rank 1"
    return "in rank 0"


def in_a_fixture() -> str:
    return "in a fixture of ranks"


def in_a_failing_rank() -> str:
    return "in a rank whose test fails"


def in_a_rank_with_waiting_peers() -> str:
    return "in a rank whose peers are killed"


def in_a_warm_world() -> str:
    return "in a world of a module"


def in_a_function_world() -> str:
    return "in worlds(...)"


def in_a_failing_function() -> str:
    return "in a function that fails in worlds(...)"


def nowhere() -> str:
    return "nowhere"
