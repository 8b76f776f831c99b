"""Errors during ranks' exits -> warnings, which `-W error` turns into errors of the test.

An interpreter prints such errors and exits with code 0 all the same. Here they are warnings as
pytest gives them for exceptions that cannot be caught.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping

import pytest

from pytest_dcp._harness.protocol.launcher import HELPERS
from pytest_dcp._harness.protocol.messages import Done
from pytest_dcp._harness.world.world import World
from pytest_dcp.rank_names import ranks_text


class LeftBehindWarning(pytest.PytestWarning):
    """A rank left processes behind, which were killed, or threads, which ended with it."""


def warn_of_end(nodeid: str, world: World) -> None:
    """Warn of what was wrong at the end of a world, each thing once for all ranks.

    Raises the first warning where warnings are errors.
    """
    __tracebackhide__ = True
    for text in _describe_leaked_processes(world):
        warnings.warn(LeftBehindWarning(f"{nodeid}: {text}"), stacklevel=2)
    for text in _describe_running_threads(world.exited):
        warnings.warn(LeftBehindWarning(f"{nodeid}: {text}"), stacklevel=2)
    for text in _describe_exit_errors(world.exited):
        warnings.warn(pytest.PytestUnraisableExceptionWarning(f"{nodeid}: {text}"), stacklevel=2)


def _describe_leaked_processes(world: World) -> Iterator[str]:
    for rank, leaked in world.leaked_processes:
        if rank not in world.lost and not any(helper in leaked for helper in HELPERS):
            yield (
                f"rank {rank} left process {leaked} behind; it was killed. Wait for it in the "
                "test, or end it."
            )


def _describe_running_threads(exited: Mapping[int, Done]) -> Iterator[str]:
    names_and_ranks = [(name, rank) for rank, one in exited.items() for name in one.threads]
    for name, ranks in _by_text(names_and_ranks).items():
        yield (
            f"{ranks_text(ranks)} left thread {name!r} running; it ended with the process. Join it "
            "in the test."
        )


def _describe_exit_errors(exited: Mapping[int, Done]) -> Iterator[str]:
    texts_and_ranks = [
        (str(error["text"]), rank) for rank, one in exited.items() for error in one.warnings
    ]
    for text, ranks in _by_text(texts_and_ranks).items():
        yield f"{ranks_text(ranks)}: {text}"


def _by_text(texts_and_ranks: list[tuple[str, int]]) -> dict[str, list[int]]:
    ranks: dict[str, list[int]] = {}
    for text, rank in sorted(texts_and_ranks):
        ranks.setdefault(text, []).append(rank)
    return ranks
