"""Messages about examples between ranks and the controller: records, divergence, lines."""

from __future__ import annotations

import pickle
import re
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.errors import StopTest
from hypothesis.internal.conjecture.data import ConjectureData
from hypothesis.internal.intervalsets import IntervalSet

from pytest_dcp._harness.lockstep import hypothesis_internals
from pytest_dcp._harness.lockstep import hypothesis_version as lockstep_versions
from pytest_dcp._harness.lockstep.example_messages import (
    Choice,
    Entry,
    ShownLine,
    SpanEnd,
    SpanStart,
    add_to_checksum,
    decode,
    divergence,
    encode_choice,
    encode_line,
    encode_span,
    merged_lines,
)
from pytest_dcp.errors import UnsupportedVersionError

choices = st.builds(
    Choice,
    st.sampled_from(["integer", "string", "float"]),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.floats(allow_nan=False)),
    st.integers() | st.text() | st.floats(allow_nan=False) | st.binary() | st.booleans(),
    st.booleans(),
)
entries = st.lists(
    choices
    | st.builds(SpanStart, st.integers())
    | st.builds(SpanEnd, st.booleans())
    | st.builds(ShownLine, st.text()),
    max_size=10,
)


def integer(value: int, most: int = 10) -> Choice:
    return Choice("integer", {"min_value": 0, "max_value": most}, value, forced=False)


def encode(entry: Entry) -> bytes:
    match entry:
        case Choice(kind, constraints, value, forced):
            return encode_choice(kind, constraints, value, forced)
        case SpanStart(mark) | SpanEnd(mark):
            return encode_span(mark)
        case ShownLine(text):
            return encode_line(text)


def record(*entries: Entry) -> bytes:
    return b"".join(map(encode, entries))


def test_the_end_of_a_span_is_not_the_start_of_span_1() -> None:
    marks = [SpanStart(1), SpanEnd(True), SpanStart(0), SpanEnd(False), SpanStart(1)]
    assert decode(record(*marks)) == marks


@given(entries)
def test_a_record_is_read_as_it_was_written(written: list[Entry]) -> None:
    assert decode(record(*written)) == written


@given(entries, st.data())
def test_a_record_that_was_cut_off_keeps_its_whole_entries(
    written: list[Entry], data: st.DataObject
) -> None:
    whole = record(*written)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    assert decode(cut) == written[: len(decode(cut))]
    if len(cut) < len(whole):
        assert len(decode(cut)) < len(written)


def test_intervals_of_text_strategies_are_read() -> None:
    # Hypothesis passes these with each character that it draws.
    intervals = IntervalSet.from_string("abc")
    (entry,) = decode(encode_choice("string", {"intervals": intervals}, "a", False))
    assert isinstance(entry, Choice)
    assert entry.constraints["intervals"].intervals == intervals.intervals


@pytest.mark.parametrize(
    "damage",
    [
        b"cnomodule\nnothing\n.",
        b"cos\nsystem\n(S'exit 3'\ntR.",
        pickle.dumps(ShownLine),
        pickle.dumps((1, 2)),
        pickle.dumps(("integer", None, 1, False)),
        pickle.dumps([]),
        bytes(100),
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    ],
    ids=repr,
)
def test_bytes_that_are_no_entry_end_the_record_and_are_not_run(damage: bytes) -> None:
    good = encode_line("one")
    assert decode(good + damage + good) == [ShownLine("one")]


def test_equal_choices_are_equal_bytes() -> None:
    shared = "shared " * 3
    one = Choice("string", {"a": shared, "b": shared}, shared, forced=False)
    other = Choice("string", {"a": "shared " * 3, "b": "shared " * 3}, "shared " * 3, forced=False)
    assert encode(one) == encode(other)


def test_a_checksum_distinguishes_choices_and_counts_them() -> None:
    same = [add_to_checksum((0, 0), encode(integer(5))) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != add_to_checksum((0, 0), encode(integer(6)))
    assert add_to_checksum(same[0], encode(integer(5)))[0] == 2


@given(entries)
def test_ranks_that_drew_the_same_have_not_diverged(written: list[Entry]) -> None:
    assert divergence({0: written, 1: list(written)}, are_complete=True) == ""


def test_spans_and_lines_are_no_divergence() -> None:
    ranks = {0: [SpanStart(1), integer(5), SpanEnd(False)], 1: [ShownLine("rank 1"), integer(5)]}
    assert divergence(ranks, are_complete=True) == ""


def test_the_first_other_choice_is_named_with_its_ranks() -> None:
    ranks = {
        0: [integer(1), integer(2)],
        1: [integer(1), integer(2, most=20)],
        2: [integer(1), integer(2)],
    }
    said = divergence(ranks, are_complete=False)
    assert said.startswith(
        "ranks diverged at choice 2 of an example: "
        "ranks 0, 2 drew integer(min_value=0, max_value=10) = 2; "
        "rank 1 drew integer(min_value=0, max_value=20) = 2."
    )


@pytest.mark.parametrize("ended", [True, False])
def test_one_that_drew_less_has_diverged_only_when_all_have_ended(ended: bool) -> None:
    said = divergence({0: [integer(1)], 1: []}, are_complete=ended)
    assert ("rank 1 drew nothing more" in said) is ended


def test_lines_of_the_deciding_rank_come_first_and_others_once() -> None:
    call = "Failing test case: test(\n    rank={},\n)"
    ranks = {
        0: [ShownLine(call.format(0)), ShownLine("same"), ShownLine("mine")],
        1: [ShownLine(call.format(1)), ShownLine("same"), ShownLine("odd")],
        2: [ShownLine(call.format(2)), ShownLine("same"), ShownLine("odd")],
    }
    assert merged_lines(ranks, first=0) == [call.format(0), "same", "mine", "ranks 1, 2: odd"]
    assert merged_lines({}, first=0) == []


def test_another_hypothesis_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lockstep_versions.problem() is None

    def execute_once(self: object, data: object) -> None: ...

    state = hypothesis_internals.core.StateForActualGivenExecution
    monkeypatch.setattr(state, "execute_once", execute_once)
    assert re.match(
        r"hypothesis 6\.\S+ has no parameter is_final, print_\w+ of \S+\.execute_once, which "
        r"pytest_dcp needs: it supports hypothesis 6\.136 to 6\.\d+; install one of these",
        str(lockstep_versions.problem()),
    )


def test_a_hypothesis_without_a_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytest_dcp._harness.lockstep.hypothesis_internals"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(sys.modules["pytest_dcp._harness.lockstep"], "hypothesis_internals")
    monkeypatch.setitem(sys.modules, "hypothesis.internal.conjecture.providers", None)
    monkeypatch.delattr("hypothesis.internal.conjecture.providers")
    assert re.match(
        r"hypothesis 6\.\S+ has no hypothesis\.internal\.conjecture\.providers, which",
        str(lockstep_versions.problem()),
    )


def test_a_refused_hypothesis_fails_each_property(monkeypatch: pytest.MonkeyPatch) -> None:
    state = hypothesis_internals.core.StateForActualGivenExecution
    monkeypatch.setattr(state, "run_engine", state.run_engine)
    lockstep_versions.refuse(lockstep_versions.HYPOTHESIS.refuse("a.name"))

    @given(st.booleans())
    def test_it(value: bool) -> None: ...

    with pytest.raises(UnsupportedVersionError, match=r"^hypothesis 6\.\S+ has no a\.name, which"):
        test_it()


class RejectedBefore6168:
    """An example's data in older versions, as far as a rejection goes."""

    def __init__(self) -> None:
        self.events: dict[str, str] = {}

    def mark_invalid(self, why: str | None = None) -> None:
        self.events["invalid because"] = str(why)


def test_a_rejection_has_its_reason_in_older_versions_too() -> None:
    data: Any = RejectedBefore6168()
    assert hypothesis_internals.place_of_rejection(data) is None
    hypothesis_internals.mark_rejected(data, "too odd", "it.py:3")
    assert hypothesis_internals.reason_of(data) == "too odd"


def test_a_rejection_has_its_reason_and_place() -> None:
    data = ConjectureData.for_choices([])
    with pytest.raises(StopTest):
        hypothesis_internals.mark_rejected(data, "too odd", "it.py:3")
    assert hypothesis_internals.reason_of(data) == "too odd"
    assert hypothesis_internals.place_of_rejection(data) in ("it.py:3", None)
