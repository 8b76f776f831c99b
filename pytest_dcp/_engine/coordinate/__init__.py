"""How ranks run the steps of a save or a load together, so that every rank learns of a failure."""

from pytest_dcp._engine.coordinate.failure import (
    CoordinationError,
    OutOfStepError,
    PeerAborted,
    RankEndedError,
    RankLeftError,
    RankSilentError,
    RemoteError,
    StepError,
)
from pytest_dcp._engine.coordinate.open_team import OperationCall, announce, team_of
from pytest_dcp._engine.coordinate.operation_order import Subject
from pytest_dcp._engine.coordinate.team import Team

__all__ = [
    "Team",
    "team_of",
    "OperationCall",
    "announce",
    "Subject",
    "StepError",
    "RemoteError",
    "CoordinationError",
    "OutOfStepError",
    "PeerAborted",
    "RankEndedError",
    "RankLeftError",
    "RankSilentError",
]
