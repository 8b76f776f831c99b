"""Values of numpy and the standard library: read by the engine's own reader, or named at save."""

from __future__ import annotations

import array
import collections
import datetime
import decimal
import enum
import fractions
import io
import pathlib
import pickle
import random
import time
import tracemalloc
import types
import uuid
import warnings
import zoneinfo
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format import python_values as values
from pytest_dcp._engine.format.entry import pickle_of, records_of, value_entry
from pytest_dcp._engine.format.python_values import decode_value, encode_value, inert, refusal_of
from pytest_dcp._engine.unpickle.stored_tensors import read_stored_value
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

UTC = datetime.timezone.utc
INERT: list[Any] = [
    np.arange(6).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(4, dtype=">i4"),
    np.array(0.5),
    np.zeros((0, 3), np.float16),
    np.array(["a", "bcd"]),
    np.array([b"a", b"bcd"]),
    np.array([True, False]),
    np.array([1 + 2j]),
    np.array(["2020-01-01", "1999-12-31"], "M8[D]"),
    np.array([3, 5], "m8[25us]"),
    np.longdouble(1) / 3,
    np.float32(0.1),
    np.int64(-7),
    np.bool_(True),
    np.str_("text"),
    np.datetime64("2020-01-01T00:00", "ns"),
    np.timedelta64(3, "h"),
    np.dtype("<f4"),
    np.random.RandomState(3).get_state(),
    np.random.default_rng(3).bit_generator.state,
    random.Random(3).getstate(),
    io.BytesIO(b"abc\xff"),
    io.StringIO("text"),
    datetime.datetime(2020, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    datetime.datetime(2020, 1, 2, fold=1),
    datetime.date(2020, 1, 2),
    datetime.time(1, 2, 3),
    datetime.timedelta(days=-1, microseconds=5),
    datetime.timezone(datetime.timedelta(hours=2), "here"),
    decimal.Decimal("1.50"),
    decimal.Decimal("NaN"),
    fractions.Fraction(-1, 3),
    uuid.UUID(int=2**127 + 5),
    pathlib.Path("/a/b.pt"),
    pathlib.PurePosixPath("a"),
    pathlib.PureWindowsPath("c:/a"),
    types.SimpleNamespace(a=1, b=[2]),
    collections.Counter("abca"),
    collections.deque([1, [2]], maxlen=5),
    collections.defaultdict(list, a=[1]),
    array.array("d", [1.0, 2.5]),
    bytearray(b"ab\xff"),
    b"bytes",
    1j,
    range(2, 9, 3),
    slice(1, None, 2),
    ...,
    torch.float16,
    torch.Size([2, 3]),
    torch.device("cpu"),
    torch.strided,
    torch.per_tensor_affine,
    {("nested", (1, frozenset([2]))): 3, torch.float32: 1, datetime.date(2020, 1, 1): 2},
    {np.int64(3): "numpy key", pathlib.PurePosixPath("a"): 1, None: 2, decimal.Decimal(1): 3},
]


def alike(one: Any, other: Any) -> bool:
    """Equal, of the same classes, also within containers that compare otherwise."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray | np.generic):
        # numpy itself gives an array of another byte order back in the native one.
        native = other.dtype.newbyteorder("=")
        same = one.dtype == native and one.shape == other.shape
        return bool(same and one.tobytes() == other.astype(native).tobytes())
    if isinstance(one, io.BytesIO | io.StringIO):
        return one.getvalue() == other.getvalue() and one.tell() == other.tell()
    if isinstance(one, decimal.Decimal):
        return str(one) == str(other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


@pytest.mark.parametrize("value", INERT, ids=lambda value: f"{type(value).__name__}")
def test_an_inert_value_comes_back_by_default(value: Any) -> None:
    entry = encode_value(("in a tuple", [value]))
    assert alike(decode_value(entry), ("in a tuple", [value]))
    assert alike(decode_value(encode_value(value)), value)
    assert refusal_of(value, encode_value(value)) is None


def test_an_array_can_be_changed_and_two_names_of_one_stay_one() -> None:
    shared = np.arange(3)
    one, other = decode_value(encode_value((shared, shared)))
    one[0] = 9
    assert other[0] == 9


def test_arrays_of_numpy_1_are_read() -> None:
    data = pickle.dumps(np.arange(3), 2).replace(b"numpy._core", b"numpy.core")
    assert alike(decode_value(value_entry(data)), np.arange(3))
    data = pickle.dumps(np.float32(1), 2).replace(b"numpy._core", b"numpy.core")
    assert alike(decode_value(value_entry(data)), np.float32(1))


def test_a_stream_is_read_from_where_it_stood() -> None:
    stream = io.BytesIO(b"abcdef")
    stream.seek(2)
    assert decode_value(encode_value(stream)).read() == b"cdef"


# ---- tensors within values


def test_tensors_within_values_come_back_and_share_their_storage() -> None:
    base = torch.arange(6.0)
    value = (base[1:3], base, base.reshape(2, 3).t(), torch.nn.Parameter(base[:2].clone()))
    view, whole, turned, parameter = decode_value(encode_value(value))
    whole[1] = 50
    assert view[0] == 50
    assert turned.stride() == (1, 3)
    assert type(parameter) is torch.nn.Parameter
    assert parameter.requires_grad


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.empty(0, 3),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.uint16),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.ones(2, requires_grad=True),
        torch.full((2,), 1 + 2j).conj(),
        torch.full((2,), 1 + 2j).conj().imag,
        torch.eye(3).to_sparse(),
        torch.ones(1).expand(4, 5),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_every_kind_of_plain_tensor_within_a_value(tensor: torch.Tensor) -> None:
    (found,) = decode_value(encode_value((tensor,)))
    assert found.dtype == tensor.dtype
    assert found.requires_grad == tensor.requires_grad
    assert found.is_conj() == tensor.is_conj()
    expected, found = tensor.detach().to_dense(), found.detach().to_dense()
    assert found.shape == expected.shape
    assert found.resolve_conj().resolve_neg().tolist() == expected.tolist()


def test_a_tensor_beyond_its_storage_is_refused() -> None:
    entry = bytearray(encode_value((torch.arange(4, dtype=torch.uint8),)))
    data = bytes(entry)
    # The number of elements in the storage's reference and the shape are both BININT1 4.
    longer = data.replace(b"K\x04tq", b"K\x09tq").replace(b"K\x04\x85", b"K\x09\x85")
    assert longer != data
    with pytest.raises(CheckpointCorruptError):
        decode_value(longer)


# ---- classes of the user's


class Color(enum.Enum):
    RED = 1


@dataclass
class Settings:
    rate: float


class Pair(NamedTuple):
    a: int
    b: Any


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: int) -> None:
        self.x = x


OWN: list[Any] = [
    *(Color.RED, Settings(0.5), Pair(1, [2]), Slotted(3), np.array([None, 1])),
    datetime.datetime(2020, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")),
]


@pytest.mark.parametrize("value", OWN, ids=lambda value: type(value).__name__)
def test_save_names_the_values_that_load_refuses_and_load_refuses_them(
    tmp_path: Path, value: Any
) -> None:
    state = {"train": {"value": (value,)}, "fine": np.arange(2)}
    with pytest.warns(UserWarning, match=r"1 value\(s\).*refused by load") as caught:
        dcp.save(state, checkpoint_id=tmp_path)
    (text,) = [str(w.message) for w in caught if "refused by load" in str(w.message)]
    assert "'train.value', a tuple: " in text
    assert "fine" not in text
    with pytest.raises(UntrustedPickleError, match="add_safe_globals"):
        decode_value(encode_value(value))
    assert str(decode_value(encode_value(value), weights_only=False)) == str(value) or isinstance(
        value, Slotted
    )


@pytest.mark.parametrize("value", OWN[:4], ids=lambda value: type(value).__name__)
def test_a_class_that_the_user_allows_is_read_and_not_warned_of(value: Any, tmp_path: Path) -> None:
    with torch.serialization.safe_globals([type(value)]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dcp.save({"v": value}, checkpoint_id=tmp_path)
        assert not [w for w in caught if "refused by load" in str(w.message)]
        found = decode_value(encode_value(value))
    assert type(found) is type(value)
    if isinstance(value, Slotted):
        assert found.x == value.x
    else:
        assert found == value


def test_plain_and_inert_values_are_not_warned_of(tmp_path: Path) -> None:
    state = {f"v{n}": value for n, value in enumerate(INERT) if not isinstance(value, dict)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(state, checkpoint_id=tmp_path)
    target: dict[str, Any] = dict.fromkeys(state)
    dcp.load(target, checkpoint_id=tmp_path)
    assert all(alike(target[key], state[key]) for key in state)


@pytest.mark.parametrize("value", [*INERT, *OWN], ids=lambda value: type(value).__name__)
def test_a_value_taken_for_inert_without_a_trial_is_read(value: Any) -> None:
    if inert(value):
        decode_value(encode_value(value))


def test_a_list_longer_than_any_limit_is_read() -> None:
    many = [0] * 10_000_001
    assert len(decode_value(encode_value((many, ...)))[0]) == len(many)


# ---- hostile pickles: time and memory in proportion to the file


def reduced(module: str, name: str, args: Any) -> bytes:
    """A pickle that calls a global with arguments."""
    body = pickle.dumps(args, 2)[2:-1]
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + body + b"R."


@pytest.mark.parametrize(
    "data",
    [
        reduced("builtins", "bytearray", (2**31,)),
        reduced("__builtin__", "bytes", (2**31,)),
        b"\x80\x02]q\x00(ccollections\nCounter\n)Rc__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85Re.",
        reduced("decimal", "Decimal", ("9" * 10**6,)),
        reduced("fractions", "Fraction", ("1e999999999",)),
        reduced("fractions", "Fraction", (1 << 10**6, 3)),
        reduced("collections", "deque", ([0] * 10, None)),
        reduced("datetime", "datetime", (b"\xff" * 10,)),
        reduced("datetime", "timedelta", (10**30, 0, 0)),
        reduced("pathlib", "Path", (3,)),
        reduced("numpy", "dtype", ("O8", False, True)),
        reduced("numpy", "dtype", ("V99999999", False, True)),
        reduced("array", "array", ("u", ["a"])),
        reduced("array", "array", ("d", ["a"])),
        reduced("numpy.core.multiarray", "_reconstruct", (list, (0,), b"b")),
        reduced("os", "system", ("true",)),
        reduced("collections", "Counter", ([1, 2],)),
        reduced("types", "SimpleNamespace", (1,)),
    ],
)
def test_a_call_for_more_than_an_inert_value_is_refused(data: bytes) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(CheckpointCorruptError):
            decode_value(value_entry(data))
        assert time.perf_counter() - started < 5
        assert tracemalloc.get_traced_memory()[1] < 64 * len(data) + 2_000_000
    finally:
        tracemalloc.stop()


def test_keys_of_one_hash_are_refused_before_they_take_quadratic_time() -> None:
    step = 2**61 - 1
    counter = pickle.dumps(dict.fromkeys(range(400), 1), 2)
    body = b"".join(pickle.dumps(k * step, 2)[2:-1] + b"K\x01" for k in range(40_000))
    data = b"\x80\x02ccollections\nCounter\n}(" + body + b"u\x85R."
    started = time.perf_counter()
    with pytest.raises(UntrustedPickleError, match="of one hash"):
        decode_value(value_entry(data))
    assert time.perf_counter() - started < 5
    assert counter


def test_a_value_that_its_maker_refuses_is_damaged() -> None:
    entry = encode_value((torch.arange(4),))
    data = bytes(pickle_of(entry)).replace(b"\x89ccollections", b"\x88ccollections")
    with pytest.raises(CheckpointCorruptError, match="cannot be made"):
        read_again(entry, data)
    moment = pickle.dumps(np.array([1], "M8[ns]"), 2)
    without = moment.replace(b"\x02\x00\x00\x00ns", b"\x02\x00\x00\x00XX")
    assert without != moment
    with pytest.raises(CheckpointCorruptError, match="unit of a moment"):
        decode_value(value_entry(without))
    with torch.serialization.safe_globals([Color]), pytest.raises(CheckpointCorruptError):
        decode_value(value_entry(pickle.dumps(Color.RED, 2).replace(b"K\x01", b"K\x07")))


def read_again(entry: bytes, data: bytes) -> Any:
    """Read an entry after replacing its pickle; its storages are kept."""
    read = records_of(entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            values, "records_of", lambda _: lambda name: data if name == "data.pkl" else read(name)
        )
        return decode_value(entry)


def test_an_array_of_another_size_than_its_bytes_is_refused() -> None:
    data = pickle.dumps(np.arange(3, dtype=np.uint8), 2)
    for wrong in (b"K\x04\x85", b"K\x00\x85", b"K\x02\x85"):
        with pytest.raises(CheckpointCorruptError, match="bytes of an array"):
            decode_value(value_entry(data.replace(b"K\x03\x85", wrong, 1)))


def test_nothing_goes_to_torch_load_unless_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", never)
    decode_value(encode_value((torch.ones(2), np.ones(2), collections.Counter("a"))))
    with pytest.raises(UntrustedPickleError):
        decode_value(encode_value(Settings(1)))


def long_bytes(text: bytes, behind: bytes = b"") -> bytes:
    """A pickle of `[bytes]` as protocol 2 writes it; `behind`: opcodes before the list's end."""
    call = b"c_codecs\nencode\nq\x00X" + len(text).to_bytes(4, "little") + text + b"q\x01"
    return b"\x80\x02](" + call + b"X\x06\x00\x00\x00latin1q\x02\x86q\x03R" + behind + b"e."


@pytest.mark.parametrize(
    ("text", "behind", "error", "reason"),
    [
        ("é" * (1 << 20), b"h\x01", UntrustedPickleError, "plain values"),
        ("x" * (1 << 20) + "€", b"", CheckpointCorruptError, "bytes as latin1 text"),
        (b"x" * (1 << 20) + b"\xff", b"", CheckpointCorruptError, "a string in UTF-8"),
        ("é" * (1 << 20), None, None, ""),
    ],
    ids=["used again as text", "not latin1", "not UTF-8", "sound"],
)
def test_long_bytes_are_made_of_their_text_alone(
    text: str | bytes, behind: bytes | None, error: type[Exception] | None, reason: str
) -> None:
    utf8 = text if isinstance(text, bytes) else text.encode()
    pickled = long_bytes(utf8, behind or b"")
    if error is None:
        assert read_stored_value(pickled, lambda _: b"") == [utf8.decode().encode("latin1")]
        return
    with pytest.raises(error, match=reason):
        read_stored_value(pickled, lambda _: b"")
