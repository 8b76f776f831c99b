"""Checkpoints without isal: zlib's checksums are the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from support.states import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WITHOUT_ISAL = """
import sys
sys.modules["isal"] = sys.modules["isal.isal_zlib"] = None  # Importing it is an ImportError.
import zlib
import pytest
import torch
import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.format.checksum import crc32

assert crc32 is zlib.crc32
theirs, ours = sys.argv[1:]
state = dcp.load_without_template(checkpoint_id=theirs)
dcp.save(state, checkpoint_id=ours)
"""


def test_a_process_without_isal_reads_and_writes_the_same_checkpoints(tmp_path: Path) -> None:
    state = {"w": torch.arange(100_000.0), "small": [torch.ones(2), 3]}
    dcp.save(state, checkpoint_id=tmp_path / "with", no_dist=True)
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_ISAL]
    command += [str(tmp_path / "with"), str(tmp_path / "without")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    reader = dcp.FileSystemReader(tmp_path / "without", verify="full")
    loaded = {"w": torch.zeros(100_000), "small": [torch.zeros(2), 0]}
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    assert same(loaded, state)
