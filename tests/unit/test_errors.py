"""Every exception of the package crosses between processes with all its facts."""

from __future__ import annotations

import ast
import copy
import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

import pytest_dcp
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
from pytest_dcp._engine.steps.link_files import NoHardLinksError
from pytest_dcp._engine.unpickle import UnknownGlobalError
from pytest_dcp._harness.controller.lease_errors import (
    GpusUnavailable,
    LeaseError,
    LeaseFolderRejected,
    LeaseRequest,
    LeaseTimeout,
    Shortage,
)
from pytest_dcp._harness.outer.meeting import MeetingError
from pytest_dcp._harness.outer.seat import ControllerLostError
from pytest_dcp._harness.protocol.frames import WireError
from pytest_dcp._harness.protocol.launcher import LauncherLostError
from pytest_dcp._harness.rank.channel import ControllerGoneError
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointFileMissingError,
    CheckpointMismatchError,
    CheckpointReplacedError,
    DcpError,
    DivergedError,
    FailureKind,
    FaultError,
    LateMarkerError,
    LawError,
    NotACheckpointError,
    PlanError,
    ProcessExitError,
    RankFailure,
    RecordingError,
    ReplicaMismatchError,
    SaveAbandonedError,
    SaverProcessError,
    StoreResponseError,
    UnknownNameError,
    UnsupportedVersionError,
    UntrustedPickleError,
    WorldError,
)

FAILURES = (
    RankFailure(1, "crashed", "call", 12.5, "was killed by signal 9 (SIGKILL)", "  File ..."),
    RankFailure(0, "blocked", "call", 13.75, "still in call"),
)
SHORTAGE = Shortage(
    request=LeaseRequest(processes=4, gpus=1),
    waiting_for="CPU slots",
    max_processes=8,
    free_processes=3,
    visible_gpus=("0", "GPU-1234"),
    free_gpus=2,
    waited_s=1.5,
    folder=Path("/tmp/leases"),
)
SAMPLES: dict[type[DcpError], DcpError] = {
    DcpError: DcpError("rank 3: it's broken"),
    NoHardLinksError: NoHardLinksError("the file system of run makes no hard links"),
    ProcessExitError: ProcessExitError("the process ended itself by sys.exit(3)"),
    WorldError: WorldError("rank 1: was killed", FAILURES),
    DivergedError: DivergedError("ranks asked the world for different things"),
    LateMarkerError: LateMarkerError("the marker of test_it was added too late"),
    LauncherLostError: LauncherLostError("the zygote was killed by signal 9", FAILURES),
    WireError: WireError("a frame claims 9 bytes"),
    ControllerGoneError: ControllerGoneError("the controller closed the report socket"),
    LeaseError: LeaseError("the leases"),
    LeaseTimeout: LeaseTimeout(SHORTAGE),
    GpusUnavailable: GpusUnavailable(4, ("0", "1")),
    RecordingError: RecordingError("'f' was recorded as a folder and is missing"),
    FaultError: FaultError("NoSpace() never fired"),
    StoreResponseError: StoreResponseError(503, "Slow Down", "write of a/b (rank 1)"),
    UnsupportedVersionError: UnsupportedVersionError(
        "torch", "2.16.0", "torch.distributed._shard", "2.10 to 2.14"
    ),
    LawError: LawError("loading in place:\n  rank 1: w: was moved to other memory"),
    CheckpointError: CheckpointError("the checkpoint"),
    CheckpointCorruptError: CheckpointCorruptError(
        "the checksum differs", file="__0_0.distcp", entry="model.w", offset=65536
    ),
    CheckpointFileMissingError: CheckpointFileMissingError("missing", file="__0_0.distcp"),
    CheckpointReplacedError: CheckpointReplacedError("replaced: load again"),
    NotACheckpointError: NotACheckpointError("no checkpoint in x"),
    UnknownNameError: UnknownNameError("no 'w'", "w", ("weight",)),
    UntrustedPickleError: UntrustedPickleError("asks for os.system", offset=12),
    UnknownGlobalError: UnknownGlobalError("asks for foo.Bar", offset=3),
    CheckpointMismatchError: CheckpointMismatchError(
        "Missing key", missing=("a",), unexpected=("b",), mismatched=("c",)
    ),
    PlanError: PlanError("key:a has overlapping chunks"),
    ReplicaMismatchError: ReplicaMismatchError("'a' differs", keys=("a",)),
    CheckpointExistsError: CheckpointExistsError("Checkpoint already exists"),
    SaveAbandonedError: SaveAbandonedError("the save of step 3 was given up"),
    SaverProcessError: SaverProcessError("the background process 7 was killed by SIGKILL"),
    CoordinationError: CoordinationError("no process group"),
    RankEndedError: RankEndedError("rank 2 ended"),
    RankLeftError: RankLeftError("rank 2 left"),
    RankSilentError: RankSilentError("rank 2 is silent"),
    OutOfStepError: OutOfStepError("rank 1 runs load"),
    PeerAborted: PeerAborted("rank 1 failed"),
    StepError: StepError("write", {}, "save"),
    RemoteError: RemoteError("foo.Bar", "foo.Bar: it broke"),
    MeetingError: MeetingError("rank 1 did not reach the store"),
    ControllerLostError: ControllerLostError("the connection to rank 0 has ended"),
    LeaseFolderRejected: LeaseFolderRejected(Path("/tmp/leases"), ("is a link", "is not ours")),
}


def modules() -> Iterator[str]:
    """Names of the package's modules, but for the demo: a test suite, which imports torch."""
    for module in pkgutil.walk_packages(pytest_dcp.__path__, "pytest_dcp."):
        if not module.name.startswith("pytest_dcp.demo"):
            yield module.name


def all_below(cls: type[DcpError]) -> Iterator[type[DcpError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from all_below(below)


def classes() -> list[type[DcpError]]:
    """Error classes of the package; a StepError's own class is made when it is raised."""
    for name in modules():
        importlib.import_module(name)
    found = (cls for cls in all_below(DcpError) if "made_for" not in vars(cls))
    ours = {cls for cls in found if cls.__module__.startswith("pytest_dcp.")}
    return sorted(ours, key=lambda cls: cls.__qualname__)


def test_every_exception_class_of_the_package_has_a_sample_here() -> None:
    assert set(classes()) == set(SAMPLES)


def test_the_demo_adds_no_exception_class() -> None:
    for path in (Path(pytest_dcp.__file__).parent / "demo").glob("**/*.py"):
        found = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)]
        bases = [ast.unparse(base) for one in found for base in one.bases]
        assert not [base for base in bases if base.endswith(("Error", "Exception"))], path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", SAMPLES.values(), ids=lambda error: type(error).__name__)
def test_an_exception_survives_pickling_with_its_text_and_facts(
    error: DcpError, protocol: int
) -> None:
    got = pickle.loads(pickle.dumps(error, protocol))
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert vars(got) == vars(error)
    assert got.args == error.args


@pytest.mark.parametrize("error", SAMPLES.values(), ids=lambda error: type(error).__name__)
def test_an_exception_survives_copying_and_a_second_pickling(error: DcpError) -> None:
    once = pickle.loads(pickle.dumps(copy.copy(error)))
    twice = pickle.loads(pickle.dumps(copy.deepcopy(once)))
    assert (type(twice), str(twice), vars(twice)) == (type(error), str(error), vars(error))


def test_a_world_error_keeps_its_message_and_its_failures_apart() -> None:
    got = pickle.loads(pickle.dumps(WorldError("rank 1: was killed", FAILURES)))
    assert (got.message, got.failures, str(got)) == ("rank 1: was killed", FAILURES, got.message)


def test_a_world_error_needs_no_failures() -> None:
    got = pickle.loads(pickle.dumps(WorldError("cannot start")))
    assert got.failures == ()


class SpecialWorldError(WorldError):
    """As a user of the package might derive one."""


def test_a_class_derived_from_a_world_error_comes_back_as_itself() -> None:
    got = pickle.loads(pickle.dumps(SpecialWorldError("m", FAILURES)))
    assert type(got) is SpecialWorldError
    assert got.failures == FAILURES


def test_notes_on_an_exception_survive() -> None:
    error = WorldError("rank 1: was killed", FAILURES)
    error.add_note("seen in step 3")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["seen in step 3"]


@pytest.mark.parametrize("kind", get_args(FailureKind))
def test_a_rank_failure_survives_pickling(kind: FailureKind) -> None:
    failure = RankFailure(3, kind, "teardown", 1e9, "ValueError: ünïcode \udcff", "line\nline")
    got = pickle.loads(pickle.dumps(failure))
    assert got == failure
    assert hash(got) == hash(failure)


def test_the_public_exceptions_are_exported() -> None:
    for cls in (DcpError, DivergedError, RankFailure, WorldError):
        assert getattr(pytest_dcp, cls.__name__) is cls
        assert cls.__name__ in pytest_dcp.__all__
