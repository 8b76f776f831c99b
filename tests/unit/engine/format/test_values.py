import io
import math
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.format.python_values import decode_value, encode_value, plain
from pytest_dcp.errors import CheckpointCorruptError, UntrustedPickleError
from support.tilings import fewer

keys = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.tuples(st.integers())
)
leaves = st.one_of(
    keys, st.floats(), st.integers(-(1 << 70), 1 << 70), st.text(st.characters(), max_size=3)
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
        st.sets(keys, max_size=3),
    ),
    max_leaves=8,
)


def told(value):
    """A value with the type of everything in it; NaN equal to itself."""
    if isinstance(value, dict):
        return type(value), [(told(k), told(v)) for k, v in value.items()]
    if isinstance(value, set):
        return type(value), sorted(map(repr, map(told, value)))
    if isinstance(value, (list, tuple)):
        return type(value), [told(inner) for inner in value]
    if isinstance(value, float):
        return float, "nan" if math.isnan(value) else value.hex()
    return type(value), value


class Own:
    pass


@given(values)
@fewer(2)
def test_a_value_comes_back_as_it_was(value):
    entry = encode_value(value)
    assert told(decode_value(entry)) == told(value)
    assert told(decode_value(memoryview(entry))) == told(value)


@given(values)
@fewer(4)
def test_torch_reads_the_value_that_we_write(value):
    if not plain(value):
        return
    assert told(torch.load(io.BytesIO(encode_value(value)), weights_only=True)) == told(value)


@given(values)
@fewer(4)
def test_we_read_the_value_that_torch_writes(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    assert told(decode_value(stream.getvalue())) == told(value)


@given(values, st.data())
@fewer(2)
def test_a_flipped_bit_never_gives_another_value(value, data):
    entry = bytearray(encode_value(value))
    with zipfile.ZipFile(io.BytesIO(entry)) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        pickled = archive.read(name)
    start = bytes(entry).index(pickled)
    at = data.draw(st.integers(0, len(pickled) - 1))
    entry[start + at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CheckpointCorruptError):
        decode_value(bytes(entry))


def test_tensors_and_shared_lists_inside_a_value_come_back():
    shared = [1]
    value = (torch.arange(3), {"a": shared, "b": shared}, torch.float16, torch.Size([2]))
    found = decode_value(encode_value(value))
    assert torch.equal(found[0], value[0])
    assert found[1:] == value[1:]


def test_a_value_that_holds_itself_is_refused_by_default():
    loop: list = [1]
    loop.append(loop)
    with pytest.raises(UntrustedPickleError, match="no cycles"):
        decode_value(encode_value(loop))


def test_a_value_that_holds_itself_comes_back_from_a_trusted_checkpoint():
    loop: list = [1]
    loop.append(loop)
    found = decode_value(encode_value(loop), weights_only=False)
    assert found[1] is found


def test_a_deeply_nested_value_comes_back():
    deep: list = []
    for _ in range(40):
        deep = [deep]
    assert decode_value(encode_value(deep)) == deep


def test_a_class_of_the_users_is_read_only_from_a_trusted_checkpoint():
    entry = encode_value({"a": Own()})
    with pytest.raises(UntrustedPickleError, match="weights_only=False"):
        decode_value(entry)
    assert isinstance(decode_value(entry, weights_only=False)["a"], Own)


@pytest.mark.parametrize("entry", [b"", b"PK\x03\x04", b"garbage" * 40])
def test_bytes_that_are_no_entry_are_refused(entry):
    with pytest.raises(CheckpointCorruptError):
        decode_value(entry)


def test_only_exact_plain_types_go_the_short_way():
    class Number(int):
        pass

    assert plain({"a": [1, (2.0, None)], (1,): {True}})
    for value in [Number(1), [Number(1)], {"a": torch.ones(1)}, b"bytes", {((1,),): 1}]:
        assert not plain(value)
