"""Restoring process state after a test: changes since the mark, except fixtures' lasting ones."""

from __future__ import annotations

from typing import Any

from pytest_dcp._harness.rank.process_state import Facet, ProcessState, merge_change


class Fake:
    """A state of named values, which can be changed from outside."""

    def __init__(self, **values: Any) -> None:
        self.now: dict[str, Any] = values
        self.reads = 0

    def facet(self, name: str, *, settable: bool = True) -> Facet:
        def read() -> Any:
            self.reads += 1
            value = self.now[name]
            return dict(value) if isinstance(value, dict) else value

        def put_back(value: Any) -> None:
            self.now[name] = value

        return Facet(name, read, put_back if settable else None)


def test_changes_since_the_mark_are_put_back() -> None:
    fake = Fake(a=1, b=2)
    state = ProcessState([fake.facet("a"), fake.facet("b")])
    state.settle()
    fake.now = {"a": 3, "b": 2}
    assert state.put_back() == ()
    assert fake.now == {"a": 1, "b": 2}


def test_a_change_that_cannot_be_put_back_is_named() -> None:
    fake = Fake(a=1, b=2)
    state = ProcessState([fake.facet("a", settable=False), fake.facet("b")])
    state.settle()
    fake.now = {"a": 3, "b": 3}
    assert state.put_back() == ("a",)
    assert fake.now == {"a": 3, "b": 2}


def test_an_error_of_putting_back_is_no_error_where_the_value_is_back() -> None:
    fake = Fake(a=1)
    facet = fake.facet("a")

    def fail(value: Any) -> None:
        fake.now["a"] = value
        raise RuntimeError

    state = ProcessState([Facet("a", facet.read, fail)])
    state.settle()
    fake.now["a"] = 2
    assert state.put_back() == ()


def test_changes_of_wider_fixtures_before_the_test_last() -> None:
    fake = Fake(a=1)
    state = ProcessState([fake.facet("a")])
    state.settle()
    state.wait()
    with state.lasting():
        fake.now["a"] = 2
    state.settle()
    fake.now["a"] = 3
    state.put_back()
    assert fake.now["a"] == 2


def test_only_the_changes_of_a_late_wider_fixture_last() -> None:
    fake = Fake(env={"old": "1"}, b=1)
    state = ProcessState([fake.facet("env"), fake.facet("b")])
    state.settle()
    fake.now["env"]["early"] = "1"
    fake.now["b"] = 2
    with state.lasting():
        fake.now["env"]["late"] = "1"
    state.put_back()
    assert fake.now == {"env": {"old": "1", "late": "1"}, "b": 1}


def test_the_mark_is_not_read_again_for_a_test_without_wider_fixtures() -> None:
    fake = Fake(a=1)
    state = ProcessState([fake.facet("a")])
    state.settle()
    state.wait()
    state.settle()
    assert fake.reads == 1
    state.open()
    state.settle()
    assert fake.reads == 2


def test_a_change_is_merged_by_item() -> None:
    assert merge_change({"a": 1, "x": 9}, {"a": 1, "b": 2}, {"a": 5}) == {"a": 5, "x": 9}
    assert merge_change([1, 2, 3], [1, 0, 3], [1, 0, 4]) == [1, 2, 4]
    assert merge_change(1, 2, 3) == 3
    assert merge_change([1], [1], [1, 2]) == [1, 2]
