"""A background process ends with its rank, however that ends, and not before its saves are done."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.background.saver_process import SaverProcess

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WAIT_S = 180

PROGRAM = """
import sys, time
import torch
import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.background import process as async_process
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType

class Slow(dcp.FileSystemWriter):
    def finish(self, metadata, results):
        time.sleep(1)
        super().finish(metadata, results)

future = dcp.async_save(
    {"t": torch.arange(4.0)},
    storage_writer=Slow(sys.argv[1]),
    no_dist=True,
    async_checkpointer_type=AsyncCheckpointerType.PROCESS,
)
saver = async_process._alone[0]
while saver._line is None:
    time.sleep(0.01)
print(saver._line.process.pid, flush=True)
if sys.argv[2] == "wait":
    future.result()
    print("saved", flush=True)
    time.sleep(3600)
"""


def started(folder: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder), how],
        stdout=subprocess.PIPE,
        text=True,
    )


def is_gone(pid: int) -> bool:
    """Whether a process, of which somebody else is the parent by now, has ended; waits a while."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_program_that_ends_before_its_save_waits_for_it(tmp_path: Path) -> None:
    with started(tmp_path / "c", "end") as program:
        output, _ = program.communicate(timeout=WAIT_S)
    assert program.returncode == 0
    assert is_gone(int(output.split()[0]))
    target = {"t": torch.zeros(4)}
    dcp.load(target, checkpoint_id=tmp_path / "c", no_dist=True)
    assert target["t"].tolist() == [0, 1, 2, 3]


def test_it_ends_with_a_rank_that_is_killed(tmp_path: Path) -> None:
    with started(tmp_path / "c", "wait") as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        assert program.stdout.readline() == "saved\n"
        # A process that cannot look for itself.
        os.kill(pid, signal.SIGSTOP)
        program.kill()
    assert is_gone(pid)


class CountCollected:
    """An order: how many objects a collection looks at, and whether collections happen."""

    def run(self, line: Any) -> tuple[int, bool]:
        return len(gc.get_objects()), gc.isenabled()


def test_a_collection_in_the_process_leaves_out_the_objects_of_torch() -> None:
    process = SaverProcess()
    try:
        looked_at, is_enabled = process.ask(CountCollected(), lambda: None, WAIT_S)
    finally:
        process.end()
    assert looked_at < 20_000  # torch alone has 250,000
    assert is_enabled
