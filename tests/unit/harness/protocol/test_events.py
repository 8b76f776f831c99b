"""The wire codec: messages arrive as sent, and all other input is a `WireError`."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_dcp._harness.protocol import messages as events
from pytest_dcp._harness.protocol.frames import WireError
from pytest_dcp._harness.protocol.messages import (
    NOT_THERE,
    Announce,
    At,
    CallFunction,
    DebugAnswer,
    DebugAsk,
    DebugDone,
    Decoder,
    Done,
    Example,
    Exchange,
    FaultAct,
    FaultAnswer,
    FaultAsk,
    Go,
    Leave,
    Message,
    Met,
    Phase,
    Place,
    RankOutcome,
    RunItem,
    RunProcess,
    SubReport,
    encode,
)


def whole(text: str) -> str:
    """The text with adjacent surrogates joined: JSON cannot tell the pair from its character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


texts = st.text(st.characters(exclude_categories=())).map(whole)  # lone surrogates too
finite = st.floats(allow_nan=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
reports = st.dictionaries(texts, json_values, max_size=3)


def tuples_of(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(items, max_size=3).map(tuple)


counts = tuples_of(st.tuples(st.integers(), st.integers()))
kinds = st.tuples(st.integers(), st.integers(), tuples_of(texts))
phases = st.sampled_from(get_args(Phase))
FIELDS: dict[type[Any], dict[str, st.SearchStrategy[Any]]] = {
    Done: {
        "phase": phases,
        "outcome": st.sampled_from(get_args(RankOutcome)),
        "at_s": finite,
        "duration_s": finite,
        "is_echo": st.booleans(),
        "exception": st.none() | st.tuples(texts, texts),
        "text": texts,
        "report": st.none() | reports,
        "sections": tuples_of(st.tuples(texts, texts, texts)),
        "debug_records": st.integers(),
        "log_without_debug": texts,
        "properties": tuples_of(st.tuples(texts, json_values)),
        "warnings": tuples_of(
            st.fixed_dictionaries(
                {
                    "text": texts,
                    "category": st.tuples(texts, texts),
                    "filename": texts,
                    "lineno": st.integers(),
                }
            )
        ),
        "imported": tuples_of(texts),
        "threads": tuples_of(texts),
        "reusable": st.booleans(),
        "xpassed": st.booleans(),
        "changed": tuples_of(texts),
        "groups": st.none()
        | st.dictionaries(
            texts,
            st.tuples(st.integers(), tuples_of(st.integers()), counts, counts, kinds),
            max_size=3,
        ),
        "returncode": st.none() | st.integers(),
        "awaits": texts,
        "payload": st.binary(),
    },
    At: {
        "place": st.sampled_from(get_args(Place)),
        "text": texts,
        "at_s": finite,
        "detail": texts,
    },
    SubReport: {"report": reports},
    Exchange: {"operation": texts, "payload": st.binary()},
    DebugAsk: {"reason": texts},
    DebugDone: {},
    Announce: {"reason": texts},
    FaultAsk: {"act": st.sampled_from(get_args(FaultAct)), "rank": st.integers()},
    RunItem: {
        "index": st.integers(),
        "nodeid": texts,
        "seed": st.integers(),
        "checkpoint_dir": texts,
        "location": st.none() | st.tuples(texts, st.none() | st.integers(), texts),
    },
    Go: {"phase": phases, "next_index": st.integers(), "next_nodeid": texts},
    Example: {"payload": st.binary()},
    RunProcess: {
        "index": st.integers(),
        "nodeid": texts,
        "seed": st.integers(),
        "payload": st.binary(),
    },
    CallFunction: {"seed": st.integers(), "payload": st.binary()},
    Met: {"sizes": tuples_of(st.integers(0, 99)), "error": texts, "payload": st.binary()},
    DebugAnswer: {"granted": st.booleans(), "group": st.integers(), "error": texts},
    FaultAnswer: {"survivors": tuples_of(st.integers(0, 99)), "error": texts},
    Leave: {},
}
MESSAGES: dict[type[Any], st.SearchStrategy[Any]] = {
    cls: st.builds(cls, **by_field) for cls, by_field in FIELDS.items()
}


def test_there_is_a_strategy_for_every_message_and_every_field() -> None:
    # A new class or field must not slip past the round trip below.
    assert set(FIELDS) == set(get_args(Message))
    for cls, by_field in FIELDS.items():
        assert list(by_field) == [f.name for f in fields(cls)]


def same(one: Any, other: Any) -> bool:
    """Equal in type as well, all the way down: a tuple is no list, True is no 1."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def same_message(one: Message, other: Message) -> bool:
    return type(one) is type(other) and all(
        same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one)
    )


def frame(text: bytes, payload: bytes = b"") -> bytes:
    """A frame made by hand, from the format in the module's docstring."""
    return struct.pack(">II", len(text), len(payload)) + text + payload


def decoded(data: bytes) -> list[Message]:
    return Decoder().feed(data)


# Round trips.


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_every_message_comes_out_as_it_went_in(cls: type[Any]) -> None:
    @settings(max_examples=40, deadline=None)
    @given(MESSAGES[cls])
    def holds(message: Message) -> None:
        (got,) = decoded(encode(message))
        assert same_message(got, message)

    holds()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_stream_cut_anywhere_gives_the_same_messages_in_order(data: st.DataObject) -> None:
    messages = data.draw(st.lists(st.one_of(*MESSAGES.values()), max_size=5))
    stream = b"".join(encode(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = Decoder()
    got: list[Message] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += decoder.feed(stream[start:end])
    assert len(got) == len(messages)
    assert all(map(same_message, got, messages))
    assert not decoder.buffer


def test_a_message_comes_out_with_its_last_byte_and_not_before() -> None:
    stream = encode(Exchange("gather()", b"\0\1\2"))
    decoder = Decoder()
    assert [len(decoder.feed(stream[i : i + 1])) for i in range(len(stream))] == [
        *[0] * (len(stream) - 1),
        1,
    ]


def test_a_frame_is_two_lengths_then_json_then_the_raw_payload() -> None:
    data = encode(Exchange("gather()", b"\xff\0raw"))
    text_bytes, payload_bytes = struct.unpack_from(">II", data)
    assert json.loads(data[8 : 8 + text_bytes]) == ["Exchange", {"operation": "gather()"}]
    assert data[8 + text_bytes :] == b"\xff\0raw"
    assert payload_bytes == 5


def test_a_value_that_json_does_not_know_travels_as_its_repr() -> None:
    (got,) = decoded(encode(Done("call", "passed", 0.0, properties=(("kind", {1} | {2}),))))
    assert isinstance(got, Done)
    assert got.properties == (("kind", repr({1, 2})),)


def test_a_mapping_whose_keys_json_does_not_know_travels_too() -> None:
    # record_property("shapes", {(2, 2): 1}) passes in plain pytest, so it must in a rank.
    (got,) = decoded(encode(Done("call", "passed", 0.0, properties=(("shapes", {(2, 2): 1}),))))
    assert isinstance(got, Done)
    assert got.properties[0][0] == "shapes"
    assert "(2, 2)" in str(got.properties[0][1])


@settings(deadline=None)
@given(st.lists(st.none() | st.binary(), max_size=6))
def test_met_gives_each_rank_s_payload_back_and_none_for_absent_ranks(
    payloads: list[bytes | None],
) -> None:
    sizes = tuple(NOT_THERE if p is None else len(p) for p in payloads)
    met = Met(sizes=sizes, payload=b"".join(p for p in payloads if p is not None))
    assert met.values() == payloads


# Hostile bytes.


HOSTILE: dict[str, bytes] = {
    "no json": frame(b"{"),
    "empty": frame(b""),
    "not utf-8": frame(b'["Leave", {"\xff": 1}]'),
    "a number": frame(b"1"),
    "null": frame(b"null"),
    "a list of one": frame(b'["Leave"]'),
    "a list of three": frame(b'["Leave", {}, {}]'),
    "an unknown class": frame(b'["Quit", {}]'),
    "a class of the standard library": frame(b'["object", {}]'),
    "a class that is no name": frame(b'[["Leave"], {}]'),
    "an object in the place of the list": frame(b'{"Leave": 1, "x": 2}'),
    "fields in a list": frame(b'["Leave", []]'),
    "fields in a string": frame(b'["Leave", "fields"]'),
    "fields in a number": frame(b'["Leave", 1]'),
    "fields null": frame(b'["Leave", null]'),
    "fields in a list, with a payload": frame(b'["Exchange", []]', b"payload"),
    "a field too many": frame(b'["Leave", {"at_once": true}]'),
    "a field too few": frame(b'["Go", {}]'),
    "a payload for a class without": frame(b'["Leave", {}]', b"payload"),
    "deeper than the parser goes": frame(b"[" * 100_000),
    "a number of too many digits": frame(b'["DebugAsk", {"reason": ' + b"9" * 5000 + b"}]"),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_frame_that_is_no_message_is_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        decoded(data)


@pytest.mark.parametrize(
    ("text_bytes", "payload_bytes"),
    [(2**32 - 1, 2**32 - 1), (2**32 - 1, 0), (0, 2**32 - 1), (1, events.MAX_FRAME_BYTES)],
)
def test_a_header_that_claims_too_much_is_refused_before_its_bytes_come(
    text_bytes: int, payload_bytes: int
) -> None:
    header = struct.pack(">II", text_bytes, payload_bytes)
    decoder = Decoder()
    assert decoder.feed(header[:7]) == []
    with pytest.raises(WireError, match=str(text_bytes + payload_bytes)):
        decoder.feed(header[7:])


def test_a_header_makes_no_room_before_its_bytes_come() -> None:
    decoder = Decoder()
    tracemalloc.start()
    try:
        assert decoder.feed(struct.pack(">II", 16, events.MAX_FRAME_BYTES - 16)) == []
        assert decoder.feed(b'["Exchange", {}]' + b"x" * 1000) == []
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100_000


def test_a_message_longer_than_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    message = Exchange("gather()", bytes(100))
    size_bytes = len(encode(message)) - 8
    monkeypatch.setattr(events, "MAX_FRAME_BYTES", size_bytes)
    assert same_message(decoded(encode(message))[0], message)
    monkeypatch.setattr(events, "MAX_FRAME_BYTES", size_bytes - 1)
    with pytest.raises(WireError, match="Exchange"):
        encode(message)


def plain(value: object) -> object:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


WRONG: dict[str, Any] = {
    "null": None,
    "a number": 5,
    "a fraction": 0.5,
    "text": "text",
    "true": True,
    "a list": [[1]],
    "an object": {"x": [1]},
}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_field_of_another_type_is_a_wire_error_that_names_the_value(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from([cls for cls, by_field in FIELDS.items() if by_field]))
    message = data.draw(MESSAGES[cls])
    names = [name for name in FIELDS[cls] if name != "payload"]
    body = {name: plain(getattr(message, name)) for name in names}
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    body[name] = wrong = data.draw(st.sampled_from([*WRONG.values()]))
    try:
        (got,) = decoded(frame(json.dumps([cls.__name__, body]).encode()))
    except WireError:
        return
    # The field can hold an accepted value.
    back = plain(getattr(got, name))
    assert back == wrong
    assert type(back) is type(wrong)
    (again,) = decoded(encode(got))
    assert same_message(again, got)


@pytest.mark.parametrize(
    ("cls", "body", "expected"),
    [
        (Done, {"phase": "call", "outcome": "passed", "at_s": "now"}, "expected a number"),
        (Done, {"phase": "call", "outcome": "passed", "at_s": float("nan")}, "expected a number"),
        (Done, {"phase": "call", "outcome": "fine", "at_s": 1}, "expected one of exit, failed"),
        (Done, {"phase": ["call"], "outcome": "passed", "at_s": 1}, "expected one of boot, call"),
        (FaultAsk, {"act": "kill", "rank": True}, "expected int, got True"),
        (FaultAsk, {"act": "kill", "rank": "1"}, "expected int, got '1'"),
        (Exchange, {"operation": 5}, "expected str, got 5"),
        (SubReport, {"report": [1]}, r"expected an object, got \[1\]"),
        (Met, {"sizes": 5}, "expected a list, got 5"),
        (Met, {"sizes": [None]}, "expected int, got None"),
    ],
)
def test_a_wrong_value_is_reported_with_the_expected_one(
    cls: type[Any], body: dict[str, Any], expected: str
) -> None:
    with pytest.raises(WireError, match=expected):
        decoded(frame(json.dumps([cls.__name__, body]).encode()))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exception", ["one"]),
        ("sections", [["call", "stdout"]]),
        ("properties", [["name"]]),
        ("properties", [[1, 2]]),
        ("warnings", [{}]),
        ("warnings", [{"text": "x", "category": "y", "filename": "z", "lineno": 0}]),
        ("groups", {"": [1]}),
        ("groups", {"": [1, [], [[0]], [], [0, 0, []]]}),
        ("groups", {"": [1, [], [], [], [0, 0]]}),
        ("imported", "torch"),
    ],
)
def test_a_wrong_shape_inside_a_field_is_a_wire_error(field: str, value: object) -> None:
    body = {"phase": "call", "outcome": "passed", "at_s": 1.0, field: value}
    with pytest.raises(WireError, match="expected"):
        decoded(frame(json.dumps(["Done", body]).encode()))


@pytest.mark.parametrize(
    "data", [b"\0\0\0\x64\x20\0\0\0" + encode(Leave()), b"\0\0\0\1\0\0\0\0", b"\0" * 9]
)
def test_bytes_that_begin_no_message_are_refused_before_the_rest_arrives(data: bytes) -> None:
    with pytest.raises(WireError, match="not the beginning of a message"):
        decoded(data)


def only_wire_errors(feed: Callable[[bytes], object], data: bytes) -> None:
    """Feeding the data works or raises `WireError`; anything else is the test's failure."""
    told = ""
    try:
        feed(data)
    except WireError as error:
        told = str(error)
    assert len(told) < 2000  # it quotes the data in part


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=5))
def test_random_bytes_give_wire_errors_and_nothing_worse(chunks: list[bytes]) -> None:
    decoder = Decoder()
    for chunk in chunks:
        only_wire_errors(decoder.feed, chunk)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from([cls.__name__ for cls in MESSAGES]), body=json_values)
@example(name="Done", body=[])
def test_a_known_class_with_any_json_for_its_fields_gives_wire_errors_and_nothing_worse(
    name: str, body: object
) -> None:
    only_wire_errors(decoded, frame(json.dumps([name, body]).encode()))


@settings(deadline=None)
@given(st.data())
def test_a_damaged_frame_gives_wire_errors_and_nothing_worse(data: st.DataObject) -> None:
    good = bytearray(encode(data.draw(st.one_of(*MESSAGES.values()))))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    only_wire_errors(decoded, bytes(good))
