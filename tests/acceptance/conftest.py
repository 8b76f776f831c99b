"""Fixtures of the acceptance tests: suites in folders of their own, in which sessions are run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, Suite


@pytest.fixture(scope="module")
def make_suite(tmp_path_factory: pytest.TempPathFactory) -> MakeSuite:
    """Writes suites, each in a folder of its own."""
    from support.sample_session import write_suite

    def make(files: Mapping[str, str], ini: str = "") -> Suite:
        return write_suite(tmp_path_factory.mktemp("suite"), files, ini)

    return make
