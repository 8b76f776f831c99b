import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.plan.packed_index import SEARCHES, pack_index
from pytest_dcp._engine.plan.packed_names import PackedNames, pack_names, unpack_names

AWKWARD = ["", '"', '"a', "a\nb", "\n", "\r", "\u2028", "\0", '"\ud800', "\udfff", "é", "\\n"]
names = st.one_of(
    st.sampled_from(AWKWARD),
    st.text(max_size=6),
    # Halves of surrogate pairs too, alone and side by side.
    st.text(st.sampled_from(["a", ".", "\n", '"', "\ud83d", "\x85"]), max_size=5),
)


@given(st.lists(names, max_size=6))
def test_names_come_back_from_their_bytes(fqns):
    assert unpack_names(pack_names(fqns)) == tuple(fqns)


@pytest.mark.parametrize("fqn", ["\ud83d\ude00", "\n\ud83d\ude00", '"\ud83d\ude00'])
def test_halves_of_a_surrogate_pair_stay_two_characters(fqn):
    assert unpack_names(pack_names([fqn])) == (fqn,)


def test_equal_bytes_become_one_tuple():
    block = pack_names(["layers.0.weight", "layers.0.bias"])
    again = pickle.loads(pickle.dumps(block))
    assert again is not block
    assert unpack_names(block) is unpack_names(again)


WORDS = st.lists(st.text("ab.é\ud800", min_size=1, max_size=4), min_size=1, max_size=12)


@given(WORDS, st.text('ab.é\ud800\n"', max_size=4))
def test_a_search_and_a_dict_find_the_same(names: list[str], other: str) -> None:
    block = pack_names(names)
    assert PackedNames.can_search(block)
    packed = PackedNames(block)
    assert len(packed) == len(names)
    assert [packed[row] for row in range(len(names))] == names
    assert packed.unpack() == tuple(names)
    for name in {*names, other}:
        if names.count(name) > 1:
            with pytest.raises(ValueError, match="got it twice"):
                packed.find(name)
        else:
            assert packed.find(name) == (names.index(name) if name in names else None)


@pytest.mark.parametrize("names", [[], [""], ['"a"'], ["a", '"b'], ["a\nb"], ["a", ""]])
def test_names_in_quotes_are_not_searched(names: list[str]) -> None:
    assert not PackedNames.can_search(pack_names(names))


def test_an_index_searches_for_some_names_and_then_makes_the_dict() -> None:
    names = [f"layers.{n}.weight" for n in range(40)]
    none = np.zeros((40, 0), np.int64)
    index = pack_index(
        PackedNames(pack_names(names)),
        property_of=np.zeros(40, np.int32), properties=(), ndim=np.zeros(40, np.int16),
        size=none, first=np.arange(41), offset=none, shape=none,
    )  # fmt: skip
    for n in range(SEARCHES):
        assert index.find_row(names[n]) == n
    assert index.names_at(np.array([3, 0])) == (names[3], names[0])
    assert "fqns" not in vars(index)
    assert index.find_row(names[-1]) == 39
    assert index.find_row("none") is None
    assert vars(index)["fqns"] == tuple(names)
    assert index.names_at(np.arange(40)) == tuple(names)
    assert len(index) == 40
