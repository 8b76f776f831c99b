"""The sample suites that pytest runs, and the times that their sessions record.

A suite is a folder with an empty `pytest.ini` (so that no other configuration is found), a
`conftest.py` that writes the controller's clock to `times.json`, and one test file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

CONFTEST = '''\
"""Writes to times.json when each test started and ended, as the controller saw it."""

import json
import os
import sys
import time
from pathlib import Path

controller = os.getpid()  # forked ranks inherit these hooks and must not write
starts_s = []
ends_s = []
passed = []


def pytest_runtest_logstart(nodeid):
    if os.getpid() == controller:
        starts_s.append(time.perf_counter())


def pytest_runtest_logfinish(nodeid):
    if os.getpid() == controller:
        ends_s.append(time.perf_counter())


def pytest_runtest_logreport(report):
    if os.getpid() == controller and report.when == "call" and report.passed:
        passed.append(report.nodeid)


def pytest_sessionfinish():
    if os.getpid() == controller:
        times = {
            "starts_s": starts_s,
            "ends_s": ends_s,
            "passed": len(passed),
            "torch_imported": "torch" in sys.modules,
        }
        Path(__file__).with_name("times.json").write_text(json.dumps(times))
'''

WORLDS = """\
import pytest
import workloads

pytestmark = pytest.mark.world_size({size}, isolation="{isolation}")


@pytest.mark.parametrize("number", range({tests}))
def test_{workload}(number, device_mesh):
    workloads.{workload}(device_mesh)
"""


# With torch also where there is no world: a test that needs one imports it, and Hypothesis then
# saves and seeds numpy's random state for each example.
EXAMPLES = """\
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


{marker}
@pytest.mark.parametrize("number", range({tests}))
@settings(max_examples={examples}, database=None, deadline=None, derandomize=True)
@given(x=st.integers(), xs=st.lists(st.integers(), max_size=5))
def test_examples(number, x, xs):
    pass
"""


REPAIRS = """\
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.world_size({size}, isolation="module")
@pytest.mark.parametrize("number", range({tests}))
@settings(max_examples={examples}, database=None, deadline=None, derandomize=True)
@given(x=st.integers())
def test_repairs(number, world, x):
    if world.rank == 1:
        world.kill(1)
"""


SHORT = """\
import pytest
import torch
import torch.distributed as dist


{marker}
@pytest.mark.parametrize("number", range({tests}))
def test_sum(number):
    tensor = torch.ones(4)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    assert tensor.tolist() == [float({sum})] * 4
"""


@dataclass(frozen=True, slots=True)
class SessionTimes:
    """The times that one session's conftest wrote."""

    starts_s: list[float]
    """Start of each test, on the controller's monotonic clock, in order."""
    ends_s: list[float]
    """End of each test, on the same clock."""
    passed: int
    """How many tests passed."""
    torch_imported: bool
    """Whether the controller had imported torch when the session finished."""

    def first_ms(self) -> float:
        """The duration of the first test: of the first world, with all that is started once."""
        return (self.ends_s[0] - self.starts_s[0]) * 1e3

    def each_ms(self) -> list[float]:
        """From one test's start to the next one's, except for the first test and the last.

        So the time between two tests counts too. The last is left out, since it includes the end of
        its module.
        """
        pairs = zip(self.starts_s[1:-1], self.starts_s[2:], strict=True)
        return [(after - before) * 1e3 for before, after in pairs]


def world_suite(workload: str, size: int, isolation: str, tests: int) -> str:
    """The test file of `tests` tests, each the workload in `size` ranks. Pure (no I/O)."""
    return WORLDS.format(workload=workload, size=size, isolation=isolation, tests=tests)


def example_suite(size: int, tests: int, examples: int) -> str:
    """The test file of a property, run `tests` times over; in no world when `size` is 0. Pure."""
    marker = f'@pytest.mark.world_size({size}, isolation="module")' if size else ""
    return EXAMPLES.format(marker=marker, tests=tests, examples=examples)


def repair_suite(size: int, tests: int, examples: int) -> str:
    """The test file of a property, run `tests` times over; each example loses a rank. Pure."""
    return REPAIRS.format(size=size, tests=tests, examples=examples)


def short_suite(size: int, tests: int) -> str:
    """The test file of a few tests that use torch; in no world when `size` is 0. Pure."""
    marker = f"@pytest.mark.world_size({size})" if size else ""
    return SHORT.format(marker=marker, tests=tests, sum=size or 1)


def plain_suite(tests: int) -> str:
    """The test file of `tests` ordinary tests that do nothing. Pure (no I/O)."""
    return "\n\n".join(f"def test_{number}():\n    pass\n" for number in range(tests))


def write(folder: Path, tests: str) -> None:
    """Writes the suite with the given test file into an existing folder."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_sample.py").write_text(tests)


def read_times(folder: Path) -> SessionTimes:
    """The times that the session in `folder` wrote."""
    return SessionTimes(**json.loads((folder / "times.json").read_text()))
