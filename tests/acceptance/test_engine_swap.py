"""Programs and suites that import torch's engine and are given ours, unedited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

OURS = "pytest_dcp"
PROGRAM = """
import json, multiprocessing, os, subprocess, sys
import early  # took names before torch's engine was replaced

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict_saver as saver
from torch.distributed.checkpoint import FileSystemWriter, StorageWriter, load, save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_model_state_dict


def home(queue):
    import torch.distributed.checkpoint as there

    queue.put(there.save.__module__)


def answer_of(method):
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=home, args=(queue,))
    process.start()
    answer = queue.get()
    process.join()
    return answer


if __name__ == "__main__":
    dcp.__path__.append("newer")
    import torch.distributed.checkpoint.of_newer_torch

    found = {
        name: value.__module__
        for name, value in {
            "class": FileSystemWriter, "function": save, "attribute": dcp.load,
            "module": saver.save, "later": dcp_to_torch_save, "state": get_model_state_dict,
            "early": early.save, "type": StorageWriter,
        }.items()
    }
    found["spawned"] = answer_of("spawn")
    found["forked"] = answer_of("fork")
    command = [sys.executable, "-c", "import torch.distributed.checkpoint as d;"
               "print(d.save.__module__)"]
    found["subprocess"] = subprocess.check_output(command, text=True).strip()
    found["customized"] = os.environ.get("CUSTOMIZED", "")
    found["arguments"] = sys.argv[1:]
    save({"w": torch.arange(3.0)}, checkpoint_id=sys.argv[1], no_dist=True)
    state = {"w": torch.zeros(3)}
    load(state, checkpoint_id=sys.argv[1], no_dist=True)
    found["loaded"] = state["w"].tolist()
    print(json.dumps(found))
    sys.exit(3)
"""
EARLY = "from torch.distributed.checkpoint import save\n"
CUSTOMIZE = "import os\nos.environ['CUSTOMIZED'] = 'yes'\n"


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    env = {**os.environ, "PYTHONPATH": str(folder), **environment}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)


def printed(ran: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of stdout; gloo prints its own there with torch 2.10."""
    return [line for line in ran.stdout.splitlines() if not line.startswith("[Gloo]")]


def _add_newer_module(folder: Path) -> None:
    """A module that ours lacks: we have all of torch's, so it is one of a torch to come."""
    (folder / "newer").mkdir()
    (folder / "newer" / "of_newer_torch.py").write_text("")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("program")
    (made / "program.py").write_text(PROGRAM)
    (made / "early.py").write_text(EARLY)
    (made / "sitecustomize.py").write_text(CUSTOMIZE)
    _add_newer_module(made)
    return made


@pytest.fixture(scope="module")
def ran(folder: Path) -> subprocess.CompletedProcess[str]:
    arguments = [str(folder / "checkpoint"), "--flag"]
    return run(folder, "-m", "pytest_dcp", "run", "program.py", *arguments)


@pytest.fixture(scope="module")
def found(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


class TestAProgram:
    def test_runs_as_it_would_alone(
        self, folder: Path, ran: subprocess.CompletedProcess[str], found: dict[str, Any]
    ) -> None:
        assert ran.returncode == 3  # its own
        assert found["arguments"] == [str(folder / "checkpoint"), "--flag"]
        assert found["loaded"] == [0.0, 1.0, 2.0]

    @pytest.mark.parametrize(
        "how", ["class", "function", "attribute", "module", "later", "state", "early"]
    )
    def test_is_given_our_engine_however_it_imports_it(
        self, found: dict[str, Any], how: str
    ) -> None:
        assert found[how].startswith(OURS)

    @pytest.mark.parametrize("how", ["spawned", "forked", "subprocess"])
    def test_so_are_its_children(self, found: dict[str, Any], how: str) -> None:
        assert found[how].startswith(OURS)

    def test_types_that_both_engines_share_stay_torchs(self, found: dict[str, Any]) -> None:
        assert found["type"] == "torch.distributed.checkpoint.storage"

    def test_its_own_sitecustomize_is_still_run_in_children(self, found: dict[str, Any]) -> None:
        assert found["customized"] == "yes"

    def test_the_end_of_a_run_names_the_parts_that_only_torchs_engine_has(
        self, ran: subprocess.CompletedProcess[str]
    ) -> None:
        (line,) = [line for line in ran.stderr.splitlines() if "engine has no" in line]
        assert line == (
            "pytest_dcp's engine has no torch.distributed.checkpoint.of_newer_torch: torch's own "
            "was imported"
        )

    def test_alone_it_has_torchs_engine(self, folder: Path) -> None:
        ran = run(folder, "-c", "import early; print(early.save.__module__)")
        assert ran.stdout.startswith("torch.")


def test_the_ranks_of_torchrun_and_their_children_save_with_our_engine(folder: Path) -> None:
    (folder / "ranks.py").write_text(
        "import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp\n"
        "import torch.multiprocessing as mp\n"
        "def tell(rank, who):\n"
        "    sys.stdout.write(f'{who}: {dcp.save.__module__}\\n')\n"
        "if __name__ == '__main__':\n"
        "    dist.init_process_group('gloo')\n"
        "    dcp.save({'w': torch.ones(2)}, checkpoint_id=sys.argv[1])\n"
        "    tell(0, 'rank')\n"
        "    mp.spawn(tell, ('child',), nprocs=1)\n"
        "    dist.destroy_process_group()\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = run(folder, *launch, "-m", "pytest_dcp", "run", "ranks.py", str(folder / "of-ranks"))
    assert ran.returncode == 0, ran.stderr
    ours = "pytest_dcp._engine.verbs.save"
    assert sorted(printed(ran)) == [f"child: {ours}"] * 2 + [f"rank: {ours}"] * 2
    assert (folder / "of-ranks" / ".metadata").exists()


def test_a_script_that_is_not_there_is_one_line(folder: Path) -> None:
    ran = run(folder, "-m", "pytest_dcp", "run", "nothing.py")
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].endswith("error: there is no program 'nothing.py'")


IN_A_PROCESS = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

if __name__ == "__main__":
    where, store = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    saving = dcp.async_save({"w": torch.arange(3.0)}, checkpoint_id=where,
                            async_checkpointer_type=AsyncCheckpointerType.PROCESS)
    saving.result()
    state = {"w": torch.zeros(3)}
    dcp.load(state, checkpoint_id=where)
    print(dcp.async_save.__module__, state["w"].tolist())
    dist.destroy_process_group()
"""


def test_a_save_in_a_background_process_is_ours(folder: Path) -> None:
    """The process imports our engine before torch's, not after it."""
    (folder / "in_a_process.py").write_text(IN_A_PROCESS)
    names = [str(folder / "in-a-process"), str(folder / "store")]
    ran = run(folder, "-m", "pytest_dcp", "run", "in_a_process.py", *names)
    assert ran.returncode == 0, ran.stderr
    assert printed(ran) == ["pytest_dcp._engine.background.async_save [0.0, 1.0, 2.0]"]


NAMES = """
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.filesystem as filesystem
from torch.distributed.checkpoint import PerRank  # which torch lacks

print(PerRank.__module__, hasattr(dcp, "nonsense"), hasattr(filesystem, "PerRank"))
try:
    dcp.sav
except AttributeError as error:
    print(error)
from torch.distributed.checkpoint import nonsense
"""


def test_a_name_that_only_we_have_is_found_and_one_of_neither_is_named(folder: Path) -> None:
    (folder / "names.py").write_text(NAMES)
    ran = run(folder, "-m", "pytest_dcp", "run", "names.py")
    found, text = ran.stdout.splitlines()
    assert found.startswith("pytest_dcp.")
    assert found.endswith(" False False")
    assert text == (
        "torch.distributed.checkpoint has no 'sav', neither in the installed torch nor in "
        "pytest_dcp: correct the name, or install the torch that has it"
    )
    assert ran.returncode == 1
    assert "cannot import name 'nonsense' from 'torch.distributed.checkpoint'" in ran.stderr


USED = """
import torch.distributed.checkpoint as dcp


class Writer(dcp.FileSystemWriter):
    pass


used = [dcp.FileSystemReader("a"), dcp.FileSystemReader("b"), Writer("c")]
"""


IN_USE = (
    "torch's engine was in use before pytest_dcp's took its place, and stays in use in "
    "2 FileSystemReader, the class used.Writer: swap first, or import and make these later"
)


@pytest.mark.parametrize("used", [True, False])
def test_objects_of_torchs_engine_from_before_the_swap_are_named(folder: Path, used: bool) -> None:
    (folder / "used.py").write_text(USED if used else "import torch.distributed.checkpoint\n")
    (folder / "test_it.py").write_text("def test_it():\n    pass\n")
    ran = run(
        folder, "-m", "pytest", "-p", "used", "-p", "pytest_dcp", "--dcp-engine", "test_it.py"
    )
    assert ran.returncode == 0, ran.stdout
    told = [line for line in ran.stdout.splitlines() if "in use before" in line]
    assert told == [f"engine: {IN_USE}"] * used


SUITE = """
import importlib
import pathlib

import conftest
import pytest
import torch
import torch.distributed.checkpoint as dcp


def test_alone():
    assert dcp.load.__module__.startswith("pytest_dcp")
    assert conftest.save.__module__.startswith("pytest_dcp")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("launch", ["as asked"])
def test_in_ranks(checkpoint_dir, launch):
    assert dcp.save.__module__.startswith("pytest_dcp")
    dcp.save({"w": torch.ones(2)}, checkpoint_id=checkpoint_dir)
    dcp.__path__.append(str(pathlib.Path(__file__).parent / "newer"))
    importlib.import_module("torch.distributed.checkpoint.of_newer_torch")
    found = importlib.import_module("torch.distributed.checkpoint._experimental.builder")
    assert found.make_sync_checkpointer.__module__.startswith("pytest_dcp")
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("suite")
    (made / "test_it.py").write_text(SUITE)
    (made / "conftest.py").write_text(EARLY)
    _add_newer_module(made)
    return made


@pytest.mark.parametrize(
    "how", [[], ["-n1", "--dcp-launch=spawn"]], ids=["forked", "spawned by a worker"]
)
def test_a_suite_is_given_our_engine(suite: Path, how: list[str]) -> None:
    ran = run(suite, "-m", "pytest", "-p", "pytest_dcp", "--dcp-engine", *how, "test_it.py")
    assert ran.returncode == 0, ran.stdout
    assert "2 passed" in ran.stdout
    assert "engine: torch.distributed.checkpoint gives pytest_dcp.checkpoint" in ran.stdout
    assert "engine has no torch.distributed.checkpoint.of_newer_torch: torch's own" in ran.stdout


def test_without_the_option_it_has_torchs(suite: Path) -> None:
    ran = run(suite, "-m", "pytest", "-p", "pytest_dcp", "test_it.py", "-k", "alone")
    assert ran.returncode == 1
    assert "engine:" not in ran.stdout
