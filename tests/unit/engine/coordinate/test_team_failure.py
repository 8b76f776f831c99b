"""How exceptions travel between ranks, and how a step's error reads."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import traceback
from dataclasses import replace
from typing import Any

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from pytest_dcp._engine.coordinate import (
    CoordinationError,
    OutOfStepError,
    PeerAborted,
    RankEndedError,
    RankLeftError,
    RankSilentError,
    RemoteError,
    StepError,
)
from pytest_dcp._engine.coordinate.carried_error import MAX_DATA_BYTES, CarriedError
from pytest_dcp._engine.coordinate.failure import Cause, capture, checked_cause, is_echo, step_error
from pytest_dcp._engine.coordinate.wire import pack, unpack
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFileMissingError,
    CheckpointMismatchError,
)
from pytest_dcp.rank_names import ranks_text

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup  # pytest needs it there


def raised(error: BaseException) -> BaseException:
    try:
        raise error  # noqa: TRY301 - here is where it is raised
    except BaseException as caught:  # noqa: BLE001 - for its traceback
        return caught


def sent(error: BaseException, rank: int = 2) -> Cause:
    """The cause of an exception, after a trip to another rank."""
    return checked_cause(unpack(pack(capture(rank, raised(error)))))


class Mute(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class Trap(Exception):
    """Its pickle ends the process that loads it; so does making it, or setting its attributes."""

    def __new__(cls, *args: object) -> Trap:
        if args and args[0] != "made by hand":
            _leave(2)
        return super().__new__(cls, *args)

    def __reduce__(self) -> tuple[type[SystemExit], tuple[int]]:
        return (_leave, (1,))  # type: ignore[return-value]  # a function does as well as a class

    def __setattr__(self, name: str, value: object) -> None:
        _leave(3)


def _leave(code: int) -> None:
    raise SystemExit(code)


def Local() -> Exception:
    """An exception of a class that no other rank can find."""
    return type("Local", (Exception,), {"__qualname__": "Local.<locals>.Local"})("local")


class Holder(Exception):
    def __init__(self, held: object) -> None:
        super().__init__("holds", held)


@pytest.mark.parametrize(
    "error",
    [
        CoordinationError("a"),
        OutOfStepError("a"),
        PeerAborted("a"),
        RankEndedError("a"),
        RankLeftError("a"),
        RankSilentError("a"),
        RemoteError("m.T", "m.T: text"),
    ],
)
def test_every_error_survives_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.args, str(copy)) == (type(error), error.args, str(error))


def test_a_step_error_survives_pickling() -> None:
    error = step_error("plan", "save", [sent(ValueError("boom"))])
    error.add_note("noted")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, StepError)
    assert isinstance(copy, CheckpointException)
    assert (copy.step, copy.operation, str(copy)) == ("plan", "save", str(error))
    assert copy.__notes__ == ["noted"]
    assert repr(copy.failures[2][0]) == "ValueError('boom')"
    assert copy.failures[2][1][0].name == "raised"


def test_an_exception_of_plain_data_arrives_as_itself() -> None:
    error, stack = sent(OSError(28, "No space left on device", "/data/x")).rebuild()
    assert isinstance(error, OSError)
    assert (error.errno, error.filename) == (28, "/data/x")
    assert "raise error" in (stack[0].line or "")


@pytest.mark.parametrize(
    "error",
    [
        *(Mute(), Holder(threading.Lock()), Holder(bytes(MAX_DATA_BYTES)), Local()),
        ExceptionGroup("two", [ValueError()]),
    ],
)
def test_an_exception_that_is_no_plain_data_arrives_as_text(error: Exception) -> None:
    rebuilt, _ = sent(error).rebuild()
    assert isinstance(rebuilt, RemoteError)
    assert rebuilt.type_name == f"{type(error).__module__}.{type(error).__qualname__}"
    assert type(error).__name__ in str(rebuilt)


def test_nothing_of_an_exceptions_class_runs_where_it_arrives() -> None:
    trap = Trap("made by hand")
    vars(trap)["more"] = [1, {"a": (2,)}]
    cause = sent(trap)
    other = replace(cause, error=replace(cause.error, args=("a stranger's",)))
    for arrived, args in ((cause, ("made by hand",)), (other, ("a stranger's",))):
        rebuilt, _ = arrived.rebuild()
        assert (type(rebuilt), rebuilt.args, vars(rebuilt)) == (Trap, args, vars(trap))


@pytest.mark.parametrize(
    "names",
    [
        *(("gone", "Missing"), ("os", "system"), ("builtins", "int"), ("os", "path.join")),
        *(("builtins", "Gone"), (__name__, "Asked.inside"), ("", ""), ("builtins", "")),
    ],
)
def test_an_exception_whose_class_is_not_loaded_here_arrives_as_text(
    names: tuple[str, str],
) -> None:
    cause = Cause(1, "gone.Missing", "gone.Missing: text", (), CarriedError(*names, ("x",), {}))
    rebuilt, _ = checked_cause(unpack(pack(cause))).rebuild()
    assert isinstance(rebuilt, RemoteError)
    assert str(rebuilt) == "gone.Missing: text"


@pytest.mark.parametrize(
    "error",
    [
        CarriedError("builtins", "UnicodeDecodeError", ("too few",), {}),
        CarriedError("builtins", "ValueError", (), {"__class__": 7}),
    ],
)
def test_an_error_that_its_class_cannot_be_made_of_arrives_as_text_or_harmless(
    error: CarriedError,
) -> None:
    rebuilt, _ = Cause(1, "m.T", "m.T: text", (), error).rebuild()
    assert type(rebuilt) in (RemoteError, ValueError)


@pytest.mark.parametrize(
    "changed",
    [
        *(
            {"rank": "1"},
            {"text": 7},
            {"frames": (("f", 1, "g"),)},
            {"frames": [("f", 1, "g", "")]},
        ),
        *({"error": 7}, {"nested": ("x",)}, {"step": ("one",)}, {"type_name": None}),
        {"error": CarriedError("builtins", "ValueError", ["x"], {})},  # type: ignore[arg-type]
        {"error": CarriedError("builtins", "ValueError", (), {1: 2})},  # type: ignore[dict-item]
    ],
)
def test_a_cause_of_wrong_parts_is_refused(changed: dict[str, Any]) -> None:
    wrong = replace(sent(ValueError("x")), **changed)
    for value in (wrong, replace(sent(ValueError("x")), nested=(wrong,)), 7):
        with pytest.raises(ValueError, match="expected the cause of a failure"):
            checked_cause(unpack(pack(value)))


def test_a_step_error_within_an_operation_arrives_with_its_failures() -> None:
    inner = of_ranks(OSError(28, "No space", "/x"), RemoteError("m.T", "m.T: text"))
    rebuilt, _ = sent(inner).rebuild()
    assert isinstance(rebuilt, StepError)
    assert (str(rebuilt), rebuilt.step, rebuilt.operation) == (str(inner), "plan", "save")
    assert rebuilt.failures[0][0].errno == 28


class Asked(Exception):
    """Its attributes run code, and are not asked for."""

    @property
    def inside(self) -> type:
        _leave(4)
        return ValueError


class Stubborn(Exception):
    """Takes two arguments wherever it is made."""

    def __new__(cls, one: int, two: int) -> Stubborn:
        return super().__new__(cls, one, two)

    def __init__(self, one: int, two: int) -> None:
        self.one = one


class Final(Exception):
    """Refuses subclasses."""

    def __init_subclass__(cls, **_: object) -> None:
        raise TypeError("no subclasses")


def of_ranks(*errors: BaseException) -> StepError:
    return step_error("plan", "save", [sent(error, rank) for rank, error in enumerate(errors)])


@pytest.mark.parametrize(
    ("errors", "cls", "facts"),
    [
        ([OSError(28, "No space", "/x")], OSError, {"errno": 28, "filename": "/x"}),
        (
            [FileNotFoundError(2, "none", "f"), PermissionError(13, "no", "g")],
            OSError,
            {"errno": 2, "filename": "f"},
        ),
        (
            [CheckpointMismatchError("m", missing=("a",))],
            CheckpointMismatchError,
            {"missing": ("a",)},
        ),
        (
            [CheckpointMismatchError("m"), CheckpointMismatchError("n")],
            ValueError,
            {"message": "m"},
        ),
        ([CheckpointCorruptError("r", file="f", offset=3)], CheckpointError, {"offset": 3}),
        (
            [CheckpointFileMissingError("r"), CheckpointCorruptError("s")],
            CheckpointCorruptError,
            {"reason": "r"},
        ),
        ([KeyError("w")], KeyError, {}),
        ([UnicodeDecodeError("utf8", b"x", 0, 1, "r")], UnicodeDecodeError, {"reason": "r"}),
        ([Stubborn(1, 2)], Stubborn, {"one": 1}),
        ([RankEndedError("rank 0 ended")], RankEndedError, {}),
    ],
)
def test_a_step_error_has_the_class_that_all_failed_ranks_raised(
    errors: list[BaseException], cls: type[Exception], facts: dict[str, Any]
) -> None:
    error = of_ranks(*errors)
    for one in (error, pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert isinstance(one, cls)
        assert isinstance(one, CheckpointException)
        assert type(one) is type(error)
        assert {name: getattr(one, name) for name in facts} == facts
        assert str(one) == str(error)
        assert (one.step, one.operation, list(one.failures)) == (
            "plan",
            "save",
            list(range(len(errors))),
        )
        assert str(error) in "".join(traceback.format_exception(one))


@pytest.mark.parametrize(
    "errors",
    [
        [ValueError("1"), KeyError("2")],
        [StopIteration()],
        [KeyboardInterrupt()],
        [SyntaxError("x", ("f", 1, 2, "t"))],
        [ExceptionGroup("two", [ValueError()])],
        [Final()],
        [Holder(threading.Lock())],
        [],
    ],
)
def test_a_step_error_of_nothing_in_common_is_an_exception_all_the_same(
    errors: list[BaseException],
) -> None:
    with pytest.raises(Exception, match="step 'plan' of save failed") as caught:
        raise of_ranks(*errors)
    assert type(caught.value) is StepError


def test_a_step_error_in_a_step_error_counts_as_its_cause() -> None:
    inner = of_ranks(OSError(5, "Input/output error"))
    assert isinstance(of_ranks(inner), OSError)
    assert type(of_ranks(StepError("s", {}, "load"))) is StepError


def test_the_first_line_names_ranks_step_operation_and_causes() -> None:
    causes = [sent(RankEndedError("rank 1 ended"), 1), sent(ValueError("b\nc"), 0)]
    line, *_ = str(step_error("plan", "load x", causes)).splitlines()
    assert line == (
        "step 'plan' of load x failed on rank 0: ValueError: b; "
        "rank 1: RankEndedError: rank 1 ended"
    )


def test_equal_failures_are_reported_once() -> None:
    text = str(step_error("plan", "save", [sent(ValueError("same"), rank) for rank in range(5)]))
    assert text.count("ValueError: same") == 2
    assert "failed on ranks 0-4: ValueError: same\n" in text


def test_many_failures_are_counted_on_the_first_line() -> None:
    causes = [sent(ValueError(f"v{rank}"), rank) for rank in range(9)]
    text = str(step_error("plan", "save", causes))
    assert "; rank 2: ValueError: v2; and 6 more\n" in text
    assert all(f"ValueError: v{rank}" in text for rank in range(9))


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([0, 2, 3, 4, 9], "ranks 0,2-4,9")]
)
def test_ranks_are_named_in_runs(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text


def test_an_error_that_comes_of_a_peers_failure_is_an_echo() -> None:
    outer = RuntimeError("writer stopped")
    outer.__cause__ = KeyError("x")
    outer.__cause__.__context__ = PeerAborted("rank 1")
    assert is_echo(PeerAborted("rank 1"))
    assert is_echo(outer)
    assert not is_echo(ValueError("own"))


def test_a_ring_of_causes_is_no_echo() -> None:
    one, two = ValueError("1"), ValueError("2")
    one.__context__, two.__context__ = two, one
    assert not is_echo(one)
