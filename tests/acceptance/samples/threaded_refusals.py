"""Tests that cannot be called in threads."""

import unittest

import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.world_size(2, backend="threaded")
@given(st.integers())
def test_a_property(number):
    pass


class TestCase(unittest.TestCase):
    @pytest.mark.world_size(2, backend="threaded")
    def test_of_a_test_case(self):
        pass


@pytest.mark.world_size(65, backend="threaded")
def test_of_too_many():
    pass
