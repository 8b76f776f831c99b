"""The package's exceptions: standard library only, and every one survives pickling.

They are raised in ranks and in the controller and cross between them, so each keeps its facts as
plain attributes and rebuilds from them.

>>> import pickle
>>> error = CheckpointCorruptError("the checksum differs", file="__0_0.distcp", offset=512)
>>> error
CheckpointCorruptError("the checksum differs (file '__0_0.distcp', offset 512)")
>>> pickle.loads(pickle.dumps(error)).offset
512
>>> isinstance(error, CheckpointError)
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

FailureKind = Literal[
    "failed", "crashed", "closed", "flooded", "timeout", "blocked", "diverged", "lost", "spared"
]


class DcpError(Exception):
    """The base of every exception of this package."""


@dataclass(frozen=True, slots=True)
class RankFailure:
    """One rank's failure.

    `failed`: an exception; `crashed`: the process ended without its verdict; `closed`: it closed
    its report socket, or sent bytes that were not its own report; `flooded`: it printed more than
    the limit; `timeout`: it was running at the time limit; `blocked`: it was still running when the
    grace after a peer's failure ended; `diverged`: it skipped or passed where its peers did not;
    `lost`: it could not be killed; `spared`: its end was asked for, and it lives.
    """

    rank: int
    kind: FailureKind
    phase: str
    """boot, setup, call, teardown or finish."""
    at_s: float
    """CLOCK_MONOTONIC, in seconds, comparable between the processes of one machine."""
    summary: str
    """The exception's type and text, or how the process ended. Headings show its first line."""
    detail: str = ""
    """Several lines: the traceback, or the stacks of all threads."""
    is_echo: bool = False
    """Whether the rank itself reports that it only follows a peer's action."""


@dataclass(frozen=True, slots=True)
class LostRank:
    """A rank that ended because the test asked for it; takes the place of its result."""

    rank: int
    reason: str
    """How it ended, and which code asked for it."""


class ProcessExitError(DcpError):
    """A process that an unmodified test started has ended itself with an exit code other than 0."""


class WorldError(DcpError):
    """A world failed: carries every rank's failure, first cause first."""

    def __init__(self, message: str, failures: tuple[RankFailure, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.failures = failures

    def __reduce__(self) -> tuple[Callable[..., WorldError], tuple[object, ...], dict[str, object]]:
        return type(self), (self.message, self.failures), dict(self.__dict__)


class DivergedError(DcpError):
    """Ranks left lockstep: they made different calls, or a peer had already left."""

    is_echo: bool = False
    """Whether only a peer's end or call caused it: a report then begins with the peer."""


class LateMarkerError(DcpError):
    """A test got a marker for a world after its world had already been decided."""


class UnsupportedVersionError(DcpError, ImportError):
    """The installed torch, pytest or Hypothesis lacks a private name that this package needs."""

    def __init__(self, package: str, version: str, missing: str, supported: str) -> None:
        super().__init__(
            f"{package} {version} has no {missing}, which pytest_dcp needs: it supports {package} "
            f"{supported}; install one of these, or a newer pytest_dcp if there is one"
        )
        self.package = package
        """torch, pytest or hypothesis."""
        self.version = version
        """Of the package that is installed."""
        self.missing = missing
        """The name, from its package down, or a parameter of a function."""
        self.supported = supported
        """The first and the last version that have all names."""

    def __reduce__(self) -> tuple[type[UnsupportedVersionError], tuple[str, str, str, str]]:
        return type(self), (self.package, self.version, self.missing, self.supported)


class LawError(DcpError, AssertionError):
    """A law of checkpoints does not hold: names the differences, the same on every rank."""


class FaultError(DcpError, AssertionError):
    """An injected fault did not do its part: it never fired, or the operation it hung was never
    released.
    """


class RecordingError(DcpError):
    """Operations on a storage could not be recorded: some went unseen."""


class StoreResponseError(DcpError, OSError):
    """An object store's answer when it refuses a request: a status such as 503."""

    def __init__(self, status: int, reason: str, where: str) -> None:
        super().__init__(f"HTTP {status} {reason}, at {where}")
        self.status = status
        self.reason = reason
        self.where = where

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...], dict[str, object]]:
        return type(self), (self.status, self.reason, self.where), dict(self.__dict__)


class CheckpointError(DcpError):
    """The base of the checkpoint engine's exceptions.

    The exception of a save or load of several ranks is also torch's `CheckpointException`, with one
    entry for each failed rank, and of the class that the ranks' exceptions have in common.
    """


class CheckpointCorruptError(CheckpointError):
    """A checkpoint's bytes are not those of a whole, unaltered checkpoint."""

    def __init__(
        self,
        reason: str,
        *,
        file: str | None = None,
        entry: str | None = None,
        offset: int | None = None,
    ) -> None:
        where = [
            *([f"file {file!r}"] if file is not None else []),
            *([f"entry {entry!r}"] if entry is not None else []),
            *([f"offset {offset}"] if offset is not None else []),
        ]
        super().__init__(f"{reason} ({', '.join(where)})" if where else reason)
        self.reason = reason
        self.file = file
        self.entry = entry
        self.offset = offset
        """In bytes from the start of the file, or of the entry if `file` is None."""

    def at(
        self, *, file: str | None = None, entry: str | None = None, offset: int = 0
    ) -> CheckpointCorruptError:
        """The same error plus the caller's facts: file, entry, offset of the entry."""
        moved = None if self.offset is None else self.offset + offset
        return type(self)(
            self.reason, file=self.file or file, entry=self.entry or entry, offset=moved
        )

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...], dict[str, object]]:
        return (
            _rebuild_corrupt,
            (type(self), self.reason),
            dict(self.__dict__) | {"args": self.args},
        )


class UntrustedPickleError(CheckpointCorruptError):
    """A pickle requests something no checkpoint needs: a class, a function, endless memory."""


class CheckpointFileMissingError(CheckpointCorruptError):
    """A data file named by the metadata is missing."""


class CheckpointReplacedError(CheckpointError):
    """Another save replaced the checkpoint while it was being loaded: load again."""


class NotACheckpointError(CheckpointError, ValueError):
    """A path to open has no checkpoint: an unfinished save, another format, or other files."""


class UnknownNameError(CheckpointError, KeyError):
    """An opened checkpoint has no tensor or value of this name; the text gives the nearest names.

    Also a KeyError, as of any mapping.
    """

    def __init__(self, message: str, name: str = "", nearest: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.name = name
        self.nearest = nearest
        """Names of the checkpoint that are spelled alike, the nearest first."""

    def __str__(self) -> str:
        return self.message  # a KeyError's own is the text in quotes

    def __reduce__(
        self,
    ) -> tuple[Callable[..., UnknownNameError], tuple[str, str, tuple[str, ...]]]:
        return type(self), (self.message, self.name, self.nearest)


class CheckpointMismatchError(CheckpointError, RuntimeError, ValueError):
    """The state to load does not fit the checkpoint: keys, shapes or types differ.

    Also a RuntimeError and a ValueError, which torch raises for a missing key and for another size.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.missing = missing
        """Keys that were requested and are not in the checkpoint."""
        self.unexpected = unexpected
        """Keys that are in the checkpoint and were not requested."""
        self.mismatched = mismatched
        """Keys whose shape, dtype or kind differs."""

    def with_lines(self, lines: Iterable[str]) -> CheckpointMismatchError:
        """The same error with these lines added to its text."""
        text = "\n".join([self.message, *lines])
        return type(self)(
            text, missing=self.missing, unexpected=self.unexpected, mismatched=self.mismatched
        )

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...], dict[str, object]]:
        return type(self), (self.message,), dict(self.__dict__)


class PlanError(CheckpointError, ValueError):
    """The ranks' plans do not make one whole checkpoint: gaps, overlaps, out of bounds."""


class ReplicaMismatchError(PlanError):
    """Ranks hold different copies of the same tensor or value, of which only one would be saved."""

    def __init__(self, message: str, *, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.keys = keys
        """The flat names of the differing tensors and values."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...], dict[str, object]]:
        return type(self), (self.message,), dict(self.__dict__)


class CheckpointExistsError(CheckpointError, RuntimeError):
    """A checkpoint is already there and `overwrite=False` forbids replacing it."""


class SaveAbandonedError(CheckpointError):
    """A save was given up, since the time that a signal to stop has left was over."""


class SaverProcessError(CheckpointError):
    """A process that saves or converts failed to start, ended, or stopped answering."""


def _rebuild_corrupt(kind: type[CheckpointCorruptError], reason: str) -> CheckpointCorruptError:
    return kind(reason)
