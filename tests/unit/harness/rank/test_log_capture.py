"""pytest's handlers hang on the loggers that pytest would choose, whatever code did to loggers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from pytest_dcp._harness.rank.log_capture import HandlerPlaces

NAME = "pytest_dcp.a logger of this test"


@pytest.fixture
def handler() -> logging.Handler:
    """The handler that is to hang."""
    return logging.NullHandler()


@pytest.fixture
def places(handler: logging.Handler) -> Iterator[HandlerPlaces]:
    """The handler's loggers, with it on them."""
    places = HandlerPlaces([handler])
    places.hang()
    yield places
    places.take_off()
    assert handler not in logging.root.handlers


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger that propagates."""
    logger = logging.getLogger(NAME)
    yield logger
    logger.propagate = True
    logger.handlers.clear()


def test_a_logger_that_stops_to_propagate_gets_the_handler(
    places: HandlerPlaces, logger: logging.Logger, handler: logging.Handler
) -> None:
    assert handler not in logger.handlers
    logger.propagate = False
    places.hang()
    assert logger.handlers == [handler]
    logger.propagate = True
    places.hang()
    assert logger.handlers == []


@pytest.mark.parametrize(
    "take",
    [logging.root.removeHandler, lambda handler: logging.root.handlers.remove(handler)],
    ids=["by a call", "from the list"],
)
def test_a_handler_that_was_taken_off_is_put_back(
    places: HandlerPlaces, handler: logging.Handler, take: Callable[[logging.Handler], object]
) -> None:
    take(handler)
    places.hang()
    assert handler in logging.root.handlers


def test_without_a_change_the_loggers_are_not_looked_at(places: HandlerPlaces) -> None:
    """A look copies the page of every logger in a process that was just forked."""
    places.hang()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.Logger.manager, "loggerDict", None)
        places.hang()
