import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_dcp._engine.plan.packed_names import pack_names, unpack_names

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
