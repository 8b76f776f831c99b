"""Times torch's own harness: `MultiProcessTestCase`, which spawns its four ranks for each test.

A script: `python peer_spawn.py --tests N --out FILE`. It is written as torch's own tests are: a
file store, spawned ranks that import this file again, the result compared in each rank. FILE gets
JSON with `each_ms`, one duration per test from its start to its end, setUp and tearDown included.
"""

import argparse
import json
import time
import unittest
from pathlib import Path

import torch.distributed as dist
import workloads
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.common_distributed import MultiProcessTestCase

WORLD_SIZE = 4


class AllReduceTest(MultiProcessTestCase):
    """One all-reduce in a world of four ranks."""

    @property
    def world_size(self) -> int:
        return WORLD_SIZE

    def setUp(self) -> None:
        super().setUp()
        self._spawn_processes()

    def test_all_reduce(self) -> None:
        store = dist.FileStore(  # type: ignore[attr-defined] # torch re-exports it without __all__
            self.file_name, self.world_size
        )
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size)
        workloads.all_reduce(init_device_mesh("cpu", (self.world_size,)))


class Stopwatch(unittest.TestResult):
    """A result that notes how long each test took, from its start to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.each_ms: list[float] = []
        self._started_s = 0.0

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._started_s = time.perf_counter()

    def stopTest(self, test: unittest.TestCase) -> None:
        self.each_ms.append((time.perf_counter() - self._started_s) * 1e3)
        super().stopTest(test)


def run_tests(tests: int) -> list[float]:
    """The duration in ms of each of `tests` runs of the test.

    Raises RuntimeError with the tracebacks when one did not pass.
    """
    watch = Stopwatch()
    unittest.TestSuite(AllReduceTest("test_all_reduce") for _ in range(tests)).run(watch)
    problems = [text for _, text in watch.failures + watch.errors + watch.skipped]
    if problems or len(watch.each_ms) != tests:
        raise RuntimeError(f"{len(watch.each_ms)} of {tests} ran:\n" + "\n".join(problems))
    return watch.each_ms


def main() -> None:
    """Runs the tests and writes their durations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.write_text(json.dumps({"each_ms": run_tests(options.tests)}))


if __name__ == "__main__":
    main()
