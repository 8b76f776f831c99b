"""Public clients of torch's engine on ours, unedited, and the same clients on torch's.

Each program beside this file saves and resumes with a client's own functions, on two ranks, and
reports digests of its state (`measure`). Checkpoints of either engine are resumed by both.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RANKS = 2
CLIENTS = {
    "accelerate_fsdp2": "accelerate",
    "lightning_fabric": "lightning",
    "lightning_trainer": "lightning",
    "megatron_fsdp_uneven": "megatron_fsdp",
    "megatron_sharded": "megatron",
    "torchao_optimizer": "torchao",
    "torchao_sharded": "torchao",
    "torchdata_loader": "torchdata",
    "torchtitan_manager": "torchtitan",
    "torchtnt_saver": "torchtnt",
    "transformers_hf": "transformers",
}
"""The package that each program needs."""
ASKED = "DCP_TEST_CLIENTS"
"""Set by the tox environment `clients`, which installs the lighter packages."""

SWAP = ["-m", "pytest_dcp", "run"]


def launch(program: str, folder: Path, *tasks: str, swap: bool) -> list[dict[str, Any]]:
    """Run a program's tasks with torchrun, on our engine or on torch's; the results of each rank.

    Fails if a module of torch's engine that ours lacks was imported with the swap.
    """
    results = folder / f"{'ours' if swap else 'torch'}-{'-'.join(tasks)}"
    results.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", *(SWAP if swap else []), str(HERE / f"{program}.py")]
    ran = subprocess.run(
        [*command, str(results), *tasks],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-8000:]
    assert "engine has no" not in ran.stderr
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.skipif(ASKED not in os.environ, reason="takes minutes: tox run -e clients")
@pytest.mark.parametrize(("program", "package"), CLIENTS.items(), ids=CLIENTS)
def test_saves_and_resumes_alike_on_both_engines(
    tmp_path: Path, program: str, package: str
) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    theirs = launch(program, tmp_path, "save", "of-torch", "resume", "of-torch", swap=False)
    tasks = ["save", "ours", "resume", "of-torch", "resume", "ours"]
    ours = launch(program, tmp_path, *tasks, swap=True)
    back = launch(program, tmp_path, "resume", "ours", swap=False)
    for torchs, swapped, again in zip(theirs, ours, back, strict=True):
        assert (
            torchs["engine"] == again["engine"] == "torch.distributed.checkpoint.state_dict_saver"
        )
        assert swapped["engine"].startswith("pytest_dcp.")
        # What torch's engine cannot do on this machine is compared with our own save only.
        saved = swapped["save ours"]
        agree(torchs["save of-torch"], saved)
        for resumed in (torchs["resume of-torch"], swapped["resume of-torch"]):
            agree(torchs["save of-torch"], resumed)
        for resumed in (swapped["resume ours"], again["resume ours"]):
            agree(saved, resumed)
            assert resumed.keys() >= torchs["resume of-torch"].keys()


def agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that the results that both have are equal, and that they have some."""
    both = one.keys() & other.keys()
    assert both
    assert {name: one[name] for name in both} == {name: other[name] for name in both}
