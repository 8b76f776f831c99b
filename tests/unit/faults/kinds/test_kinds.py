"""Faults are values: they pickle, and their repr is code that makes them again."""

from __future__ import annotations

import dataclasses
import pickle
import signal
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.faults as faults
from pytest_dcp.errors import StoreResponseError
from pytest_dcp.faults import (
    BitFlip,
    Damage,
    Errno,
    Fault,
    Foreign,
    InputOutput,
    Kill,
    LostReply,
    Missing,
    Moment,
    NoSpace,
    Operation,
    Raise,
    ShortRead,
    ShortWrite,
    StaleFile,
    StorageFault,
    Swap,
    TornWrite,
    Truncate,
    Unavailable,
    Unpicklable,
    Unrebuildable,
    WrongShape,
    WrongType,
    ZeroSector,
)
from pytest_dcp.faults.kinds.base import shorter
from pytest_dcp.faults.tap.operation import Shorten

BASES = {Fault, StorageFault, Damage}
NEED: dict[str, dict[str, Any]] = {
    "Errno": {"code": 28},
    "Swap": {"other": "*.distcp"},
    "StaleFile": {"old": "/x/y"},
}
KINDS = [
    kind
    for name in faults.__all__
    if isinstance(kind := getattr(faults, name), type)
    and issubclass(kind, Fault)
    and kind not in BASES
]


class NoGate:
    def wait(self, limit_s: float) -> None:
        raise AssertionError("nothing is to hang here")


def moment(kind: Any = "write", nbytes: int = 10, **facts: Any) -> Moment:
    operation = Operation("write", "a.distcp", nbytes=nbytes)
    return Moment(kind, 1, NoGate(), dataclasses.replace(operation, kind=kind), **facts)


def made(kind: type[Fault]) -> Fault:
    return kind(**NEED.get(kind.__name__, {}))


def test_every_kind_is_here() -> None:
    assert len(KINDS) >= 34


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_frozen_and_survives_pickling_and_its_repr(kind: type[Fault]) -> None:
    fault = made(kind)
    field = dataclasses.fields(fault)[0].name if dataclasses.fields(fault) else "rank"  # type: ignore[arg-type]  # every kind is a dataclass
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        setattr(fault, field, 1)
    assert pickle.loads(pickle.dumps(fault)) == fault
    assert eval(repr(fault), dict(vars(faults))) == fault
    assert kind.__doc__


def test_an_exception_class_is_shown_by_its_name() -> None:
    assert repr(Raise(KeyError)) == "Raise(exception=KeyError, when='before')"
    assert repr(Raise(KeyError("k"))) == "Raise(exception=KeyError('k'), when='before')"
    assert repr(LostReply()) == "LostReply(exception=ConnectionResetError)"


def test_the_number_of_a_signal_is_kept_so_that_the_repr_is_code() -> None:
    assert repr(Kill(signal.SIGTERM)) == "Kill(signal=15, when='before')"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [Raise, Unpicklable, Unrebuildable])
def test_an_exception_is_raised_before_or_after(kind: Any, when: Any) -> None:
    fault = kind(when=when)
    act, rest = (fault.before, fault.after) if when == "before" else (fault.after, fault.before)
    rest(moment())
    with pytest.raises(Exception, match=r"injected at write a\.distcp"):
        act(moment())


def test_an_exception_in_the_future_is_raised_by_a_future_of_the_same_kind() -> None:
    fault = Raise(KeyError("k"), when="future")
    done: torch.futures.Future[int] = torch.futures.Future()
    done.set_result(1)
    with pytest.raises(KeyError):
        fault.result(done, moment()).wait()
    ready: Future[int] = Future()
    with pytest.raises(KeyError):
        fault.result(ready, moment()).result()


def test_exceptions_that_cannot_travel_really_cannot() -> None:
    with pytest.raises(faults.UnpicklableError) as caught:
        Unpicklable().before(moment())
    with pytest.raises(TypeError):
        pickle.dumps(caught.value)
    with pytest.raises(faults.UnrebuildableError) as other:
        Unrebuildable().before(moment())
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(other.value))


def test_a_lost_reply_acts_when_the_work_is_done() -> None:
    assert LostReply().before(moment()) is None
    with pytest.raises(ConnectionResetError):
        LostReply().after(moment())


def test_an_errno_names_the_file_as_the_system_does() -> None:
    with pytest.raises(OSError, match="No space") as caught:
        Errno(28).before(moment(file=Path("/r/a.distcp")))
    assert (caught.value.errno, caught.value.filename) == (28, "/r/a.distcp")
    with pytest.raises(OSError, match="Input") as moved:
        InputOutput().before(moment("rename", file=Path("/r/a"), target=Path("/r/b")))
    assert (moved.value.filename, moved.value.filename2) == ("/r/a", "/r/b")


def test_a_full_disk_takes_the_bytes_that_fit() -> None:
    assert NoSpace(100).before(moment(room_bytes=7)) == Shorten(7)
    with pytest.raises(OSError, match="No space"):
        NoSpace(100).before(moment(room_bytes=0))


def test_half_is_read_or_written_by_default_and_at_least_one_byte() -> None:
    assert ShortRead().before(moment("read", 9)) == Shorten(4)
    assert ShortWrite().before(moment("write", 1)) == Shorten(1)
    assert ShortWrite(0).before(moment("write", 9)) == Shorten(0)
    assert TornWrite(at=3).before(moment("write", 9)) == Shorten(3)
    with pytest.raises(OSError, match="Input"):
        TornWrite().after(moment())


def test_an_object_store_s_answer_has_its_status() -> None:
    with pytest.raises(StoreResponseError) as caught:
        Unavailable().before(moment())
    assert caught.value.status == 503


def test_a_wrong_result_is_another_type_or_one_part_short() -> None:
    assert WrongType().result([1], moment()) is None
    assert WrongType("x").result([1], moment()) == "x"
    assert WrongShape().result([1, 2, 3], moment()) == [1, 2]
    assert shorter(([1, 2], "metadata")) == ([1], "metadata")
    assert shorter({"a": 1, "b": 2}) == {"a": 1}
    assert shorter(torch.zeros(3, 2)).shape == (2, 2)
    assert shorter(None) is None
    future: torch.futures.Future[list[int]] = torch.futures.Future()
    future.set_result([1, 2])
    assert shorter(future).value() == [1]


@pytest.mark.parametrize(
    ("fault", "becomes"),
    [
        (BitFlip(1, 0), b"acc"),
        (BitFlip(-1, 1), b"aba"),
        (ZeroSector(1, nbytes=2), b"ab\0"),
        (Truncate(), b"a"),
        (Truncate(2), b"ab"),
        (Truncate(-1), b"ab"),
        (Missing(), None),
        (Foreign(b"x"), b"x"),
    ],
)
def test_damage_is_done_to_the_file_before_it_is_looked_at_and_after_it_is_written(
    tmp_path: Path, fault: Damage, becomes: bytes | None
) -> None:
    for kind in ("open", "close", "rename"):
        file = tmp_path / "f"
        file.write_bytes(b"abc")
        renamed = file if kind == "rename" else None
        act, rest = (fault.before, fault.after) if kind == "open" else (fault.after, fault.before)
        assert fault.meets(file)
        rest(moment(kind, file=file, target=renamed))
        assert file.read_bytes() == b"abc"
        act(moment(kind, file=file, target=renamed))
        assert (file.read_bytes() if file.exists() else None) == becomes


def test_a_file_that_cannot_be_damaged_so_is_not_met(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    assert not BitFlip(3).meets(file)
    assert not BitFlip(-4).meets(file)
    assert not ZeroSector(1).meets(file)
    assert not Swap("*").meets(file)
    assert not StaleFile(str(tmp_path / "none")).meets(file)
    assert not Truncate().meets(tmp_path)
    assert not Truncate().meets(None)


def test_files_are_swapped_and_replaced_by_older_ones(tmp_path: Path) -> None:
    for name in "fgo":
        (tmp_path / name).write_text(name)
    Swap("g").before(moment("open", file=tmp_path / "f"))
    assert [(tmp_path / name).read_text() for name in "fg"] == ["g", "f"]
    StaleFile(str(tmp_path / "o")).before(moment("open", file=tmp_path / "f"))
    assert (tmp_path / "f").read_text() == "o"
