"""Folders of Megatron-Core (`torch_dist`): DCP, with `common.pt` and `metadata.json` beside it.

The samples are written here as `megatron.core.dist_checkpointing` 0.16 writes them; the program in
`clients/megatron_folder.py` reads one that it has written itself.
"""

from __future__ import annotations

import argparse
import enum
import json
import os
import signal
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

import pytest_dcp.checkpoint as dcp
from pytest_dcp._cli.main import main
from pytest_dcp.errors import CheckpointCorruptError, NotACheckpointError
from support.states import torch_dcp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


class ModelType(enum.Enum):
    """As Megatron's own: pickled by the name of its class."""

    encoder_or_decoder = 1


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def common(iteration: int = 7) -> dict[str, Any]:
    arguments = argparse.Namespace(
        lr=0.1, params_dtype=torch.bfloat16, model_type=ModelType.encoder_or_decoder,
        exit_signal=signal.SIGTERM, betas=(0.9, 0.95),
    )  # fmt: skip
    rng_state = [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.arange(5).byte()}]
    return {
        "args": arguments,
        "iteration": iteration,
        "checkpoint_version": 3.0,
        "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 10},
        "rng_state": rng_state,
        "content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"},
    }


def write_folder(folder: Path, **more: Any) -> Path:
    state = {
        "decoder.layers.linear.weight": torch.arange(24.0).reshape(4, 6),
        "decoder.layers.extra_state/shard_0_1": None,
    }
    torch_dcp.save(state, checkpoint_id=folder)
    torch.save(common() | more, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "iter_0000007")


def test_tensors_and_plain_values_open(folder: Path) -> None:
    with dcp.open(folder) as opened:
        weight: Any = opened["decoder.layers.linear.weight"]
        assert torch.equal(weight[1:2], torch.arange(6.0, 12.0).reshape(1, 6))
        assert list(opened.common) == list(common())
        assert opened.common["iteration"] == 7
        assert opened.common["opt_param_scheduler"] == common()["opt_param_scheduler"]
        (states,) = opened.common["rng_state"]
        assert states["random_rng_state"] == (3, (1, 2), None)
        assert torch.equal(states["torch_rng_state"], torch.arange(5).byte())


def test_arguments_are_read_and_objects_of_other_classes_are_named(folder: Path) -> None:
    with dcp.open(folder) as opened:
        arguments = opened.common["args"]
    assert isinstance(arguments, argparse.Namespace)
    assert (arguments.lr, arguments.params_dtype) == (0.1, torch.bfloat16)
    assert arguments.betas == (0.9, 0.95)
    assert repr(arguments.model_type) == f"<{__name__}.ModelType, not read>"
    assert repr(arguments.exit_signal) == "<signal.Signals, not read>"


def test_other_checkpoints_have_no_common_values(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(1)}, checkpoint_id=tmp_path / "c")
    with dcp.open(tmp_path / "c") as opened:
        assert opened.common == {}


def test_common_values_are_read_from_a_url(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/{folder.name}/{path.name}", path.read_bytes())
    with dcp.open(f"memory://{folder.name}") as opened:
        assert opened.common["iteration"] == 7


def test_code_in_the_file_does_not_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = folder.parent / "made"
    torch.save(common() | {"attack": Attack(made)}, folder / "common.pt")
    with dcp.open(folder) as opened, pytest.raises(CheckpointCorruptError, match="mkdir"):
        opened.common  # noqa: B018
    assert main(["ls", str(folder)]) == 0
    assert "common.pt: cannot be read: class or function " in capsys.readouterr().out
    assert main(["verify", str(folder)]) == 1
    assert not made.exists()


@pytest.mark.parametrize("position", [0.2, 0.5, 0.9])
def test_damage_is_found(folder: Path, position: float, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "common.pt"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * position)])
    assert main(["verify", str(folder)]) == 1
    assert "common.pt" in capsys.readouterr().out


def test_the_commands_show_and_compare_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "common.pt: args, iteration, checkpoint_version, opt_param_scheduler, rng_state, "
        "content_metadata; `show` prints it"
    )
    assert main(["ls", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["common"] == list(common())
    assert main(["show", str(folder), "common.pt"]) == 0
    assert "iteration: 7\n" in capsys.readouterr().out
    assert main(["show", str(folder), "common.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["common"]["iteration"] == "7"
    assert main(["verify", str(folder)]) == 0
    other = write_folder(folder.parent / "other", iteration=8, more="x")
    capsys.readouterr()
    assert main(["diff", str(folder), str(folder)]) == 0
    assert main(["diff", str(folder), str(other)]) == 1
    assert capsys.readouterr().out.splitlines()[1:3] == [
        "common.pt: iteration: value 7, 8",
        "common.pt: more: value (none), 'x'",
    ]


def test_it_is_converted_without_the_common_values(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "all.safetensors"
    assert main(["convert", str(folder), str(target), "--skip-values"]) == 0
    assert list(load_file(target)) == ["decoder.layers.linear.weight"]


def test_half_a_checkpoint_and_a_run_are_named(folder: Path) -> None:
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(NotACheckpointError, match="a run of Megatron: open one of its iter_"):
        dcp.open(folder.parent)
    for path in (folder / ".metadata", *folder.glob("*.distcp")):
        path.unlink()
    with pytest.raises(NotACheckpointError, match=r"common.pt but no .metadata: the save did not"):
        dcp.open(folder)
