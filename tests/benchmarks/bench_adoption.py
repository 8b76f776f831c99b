"""Times unmodified tests as their authors run them and adopted, alternating in one run.

    python tests/benchmarks/bench_adoption.py [--rounds N] [--out DIR] [--quick] [--guide PAGE]

The same file runs twice in each round: under pytest alone, and with `--dcp-adopt`. Every test has
four ranks that form a group and sum a tensor. A figure is the median over all tests of all rounds,
from the start of one test to the start of the next; only ratios within one run mean anything.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import figures
import processes
import suites
import table

ROUNDS = 3
TARGET = 20.0
FILE_NAME = "bench_adoption.json"
TESTS = {"as written": 3, "adopted": 12}
"""Tests of one session; the first and the last are not counted."""
OPTIONS = {
    "as written": ["-p", "no:pytest_dcp"],
    "adopted": ["-p", "pytest_dcp", "--dcp-adopt"],
}
CASE = """\
import torch, torch.distributed as dist
{imports}

class TestGroup({base}):
{setup}
{tests}
"""
SETUP = """
    def setUp(self):
        super().setUp()
        self._spawn_processes()
"""
CASE_TEST = """
    def test_{number}(self):
        store = dist.FileStore(self.file_name, self.world_size)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world_size)
        total = torch.ones(4)
        dist.all_reduce(total)
        assert total.tolist() == [4.0] * 4
"""
TENSOR_TEST = """
    world_size = 4

    @with_comms
    def test_{number}(self):
        mesh = self.build_device_mesh()
        tensor = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
        assert tensor.full_tensor().tolist() == list(range(8))
"""
PROCESSES = """\
import os, torch, torch.distributed as dist, torch.multiprocessing as mp

def add_up(rank, size, port):
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", port
    dist.init_process_group("gloo", rank=rank, world_size=size)
    total = torch.ones(4)
    dist.all_reduce(total)
    assert total.tolist() == [4.0] * 4
    dist.destroy_process_group()

def start():
    context = mp.get_context("spawn")
    ranks = [context.Process(target=add_up, args=(rank, 4, "29517")) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
"""
SPAWN_TEST = """
def test_{number}():
    mp.spawn(add_up, args=(4, "29517"), nprocs=4)
"""
PROCESS_TEST = """
def test_{number}():
    start()
"""
COMMON = "torch.testing._internal"
KINDS = {
    "MultiProcessTestCase": (
        CASE.replace("{base}", "MultiProcessTestCase")
        .replace("{setup}", SETUP)
        .replace(
            "{imports}",
            f"from {COMMON}.common_distributed import MultiProcessTestCase",
        ),
        CASE_TEST,
    ),
    "DTensorTestBase, with_comms": (
        CASE.replace("{base}", "DTensorTestBase")
        .replace("{setup}", "")
        .replace(
            "{imports}",
            "from torch.distributed.tensor import Shard, distribute_tensor\n"
            f"from {COMMON}.distributed._tensor.common_dtensor import DTensorTestBase, with_comms",
        ),
        TENSOR_TEST,
    ),
    "mp.spawn": (PROCESSES + "\n{tests}", SPAWN_TEST),
    "multiprocessing.Process": (PROCESSES + "\n{tests}", PROCESS_TEST),
}


def suite_of(kind: str, tests: int) -> str:
    """The test file of a kind of suite. Pure (no I/O)."""
    frame, test = KINDS[kind]
    return frame.replace("{tests}", "".join(test.format(number=n) for n in range(tests)))


def measure(kind: str, way: str) -> list[float]:
    """Milliseconds of each test of one session. Raises SampleFailed unless every test passed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        scratch = Path(name)
        suites.write(scratch, suite_of(kind, TESTS[way]))
        argv = [sys.executable, "-m", "pytest", *OPTIONS[way], "-p", "no:cacheprovider", "-q"]
        processes.run(argv, scratch, settings={"GLOO_SOCKET_IFNAME": "lo"})
        times = suites.read_times(scratch)
        if times.passed != TESTS[way]:
            output = (scratch / "output.txt").read_text(errors="replace")
            raise processes.SampleFailed(f"{times.passed} of {TESTS[way]} passed:\n{output}")
        return times.each_ms()


def summarize(samples: Sequence[tuple[str, str, list[float]]]) -> list[dict[str, object]]:
    """For each kind of suite the medians of both ways, and their ratio. Pure (no I/O)."""
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        medians = {
            way: statistics.median(
                one for k, w, each in samples if (k, w) == (kind, way) for one in each
            )
            for way in OPTIONS
        }
        ratio = medians["as written"] / medians["adopted"]
        rows.append({"kind": kind, **medians, "ratio": ratio, "met": ratio >= TARGET})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when a sample failed to run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help=f"folder for {FILE_NAME}; default: a new one")
    parser.add_argument("--quick", action="store_true", help="one round")
    figures.add_option(parser)
    options = parser.parse_args(argv)
    processes.become_subreaper()
    samples = []
    try:
        for number in range(1 if options.quick else options.rounds):
            for kind in KINDS:
                for way in OPTIONS:
                    samples.append((kind, way, measure(kind, way)))
                    median_ms = statistics.median(samples[-1][2])
                    print(f"round {number + 1}  {kind}, {way}: {median_ms:,.1f} ms", flush=True)
    except processes.SampleFailed as failure:
        print(f"a sample failed to run:\n{failure}", file=sys.stderr)
        return 1
    run = {
        "environment": {
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "torch": version("torch"),
            "cpus": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg(),
        },
        "options": {"quick": options.quick, "rounds": options.rounds},
        "adopted": summarize(samples),
        "samples": samples,
    }
    folder = options.out or Path(tempfile.mkdtemp(prefix="bench-adoption-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(json.dumps(run, indent=1) + "\n")
    print(table.markdown(figures.ADOPTION_COLUMNS, figures.adoption_rows(run["adopted"])))
    print(f"\nraw samples: {folder / FILE_NAME}")
    if options.guide:
        figures.update(options.guide, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
