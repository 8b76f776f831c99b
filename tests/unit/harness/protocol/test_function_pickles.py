"""Functions that go to ranks: they keep their file, and what cannot go is named."""

from __future__ import annotations

import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest

from pytest_dcp._harness.protocol.function_pickles import dump_call, dumps

LOCK = threading.Lock()


def make_function(kept: object) -> Callable[[], object]:
    def closing_over() -> object:
        return kept

    return closing_over


def returned(data: bytes) -> object:
    function, args, kwargs = cloudpickle.loads(data)
    return function(*args, **kwargs)


def test_closures_lambdas_and_arguments_arrive() -> None:
    assert returned(dump_call(make_function({"a": 1}), (), {})) == {"a": 1}
    assert returned(dump_call(lambda a, b: (a, b), (1,), {"b": 2})) == (1, 2)


def test_code_keeps_its_file_also_inside_of_other_code() -> None:
    def outer() -> object:
        return (lambda: 1 / 0)()

    with pytest.raises(ZeroDivisionError) as caught:
        returned(dump_call(outer, (), {}))
    frames = traceback.extract_tb(caught.value.__traceback__)[-2:]
    assert [frame.filename for frame in frames] == [__file__, __file__]
    assert [frame.line for frame in frames] == ["return (lambda: 1 / 0)()"] * 2


def test_a_process_that_has_cloudpickle_alone_knows_nothing_of_the_sender(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(dumps(make_function(7)))
    code = "import sys, cloudpickle; print(cloudpickle.load(open(sys.argv[1], 'rb'))())"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "data"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "7\n"


class Holder:
    def __init__(self) -> None:
        self.held = threading.Lock()

    def method(self) -> None:
        """Takes its object along."""


def uses_a_global() -> object:
    return LOCK


uses_a_global.__module__ = "__main__"  # pickled by value, as a function of a script is


def with_default(lock: object = LOCK) -> object:
    return lock


with_default.__module__ = "__main__"

WAYS: list[tuple[Callable[..., object], tuple[object, ...], str]] = [
    (make_function(LOCK), (), "closure variable 'kept' is a _thread.lock"),
    (make_function([1, LOCK]), (), "closure variable 'kept', element 1 is a _thread.lock"),
    (make_function({"x": LOCK}), (), "closure variable 'kept', the value of 'x' is a _thread.lock"),
    (
        make_function(make_function(LOCK)),
        (),
        "closure variable 'kept', closure variable 'kept' is a _thread.lock",
    ),
    (make_function(Holder()), (), "closure variable 'kept', attribute 'held' is a _thread.lock"),
    (Holder().method, (), "its object, attribute 'held' is a _thread.lock"),
    (uses_a_global, (), "global 'LOCK' is a _thread.lock"),
    (with_default, (), "a default is a _thread.lock"),
    (print, (1, LOCK), "argument 2 is a _thread.lock"),
    (print, ([LOCK],), "argument 1, element 0 is a _thread.lock"),
]


@pytest.mark.parametrize(("function", "args", "way"), WAYS, ids=[way for *_, way in WAYS])
def test_a_value_that_cannot_be_pickled_is_named(
    function: Callable[..., object], args: tuple[object, ...], way: str
) -> None:
    with pytest.raises(TypeError) as caught:
        dump_call(function, args, {})
    assert f" cannot be sent to the ranks: {way} (" in str(caught.value)
    assert "cannot pickle '_thread.lock' object" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_the_function_is_named_with_file_and_line() -> None:
    function = make_function(LOCK)
    with pytest.raises(TypeError) as caught:
        dump_call(function, (), {})
    line = function.__code__.co_firstlineno
    name = "make_function.<locals>.closing_over"
    assert str(caught.value).startswith(f"{name} ({__file__}:{line}) cannot be sent")


def test_an_argument_by_name_is_named() -> None:
    with pytest.raises(TypeError, match=r"argument 'lock' is a _thread\.lock"):
        dump_call(print, (), {"lock": LOCK})
