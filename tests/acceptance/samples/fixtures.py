"""Copied as test_fixtures.py: pytest's, the user's and our fixtures inside ranks."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from session_recorder import note

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from pytest_dcp._harness.rank.world_fixture import RankWorld

two = pytest.mark.world_size(2)


def test_scopes_in_the_controller(of_session: int, of_function: int) -> None:
    assert of_session == of_function == os.getpid()


@two
def test_scopes(of_session: int, of_module: int, of_class: int, of_function: int) -> None:
    assert {of_session, of_module, of_class, of_function} == {os.getpid()}


@two
def test_autouse(request: pytest.FixtureRequest) -> None:
    assert request.node.automatic_pid == os.getpid()


@two
def test_caplog(caplog: pytest.LogCaptureFixture, rank: int) -> None:
    logging.getLogger("mine").warning("of rank %d", rank)
    assert caplog.messages == [f"of rank {rank}"]


@two
def test_capsys(capsys: pytest.CaptureFixture[str], rank: int) -> None:
    print("out of", rank)
    print("err of", rank, file=sys.stderr)
    assert capsys.readouterr() == (f"out of {rank}\n", f"err of {rank}\n")


@two
def test_capfd(capfd: pytest.CaptureFixture[str], rank: int) -> None:
    os.write(1, f"out of {rank}\n".encode())
    os.system(f"echo err of {rank} >&2")
    assert capfd.readouterr() == (f"out of {rank}\n", f"err of {rank}\n")


@two
def test_monkeypatch(monkeypatch: pytest.MonkeyPatch, rank: int, tmp_path: Path) -> None:
    monkeypatch.setenv("MINE", str(rank))
    monkeypatch.setattr(os, "sep", str(rank))
    monkeypatch.chdir(tmp_path)
    assert (os.environ["MINE"], os.sep) == (str(rank), str(rank))


def test_monkeypatch_stays_in_its_ranks() -> None:
    assert "MINE" not in os.environ
    assert os.sep == "/"


@two
def test_recwarn(recwarn: pytest.WarningsRecorder) -> None:
    warnings.warn("heard", UserWarning, stacklevel=1)
    assert [str(one.message) for one in recwarn] == ["heard"]


@two
def test_warns() -> None:
    warnings.warn("told by all ranks", UserWarning, stacklevel=1)


@two
@pytest.mark.filterwarnings("error")
def test_warnings_are_errors() -> None:
    with pytest.raises(UserWarning, match="raised"):
        warnings.warn("raised", UserWarning, stacklevel=1)


@two
def test_tmp_path(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, rank: int) -> None:
    (tmp_path / "mine").write_text(str(rank))
    base = str(tmp_path_factory.getbasetemp())
    note("tmp_path", rank=rank, path=str(tmp_path), base=base)


def test_tmp_path_in_the_controller(tmp_path_factory: pytest.TempPathFactory) -> None:
    note("basetemp", path=str(tmp_path_factory.getbasetemp()))


@two
def test_environment(rank: int, local_rank: int, world_size: int, device: torch.device) -> None:
    assert (rank, world_size) == (dist.get_rank(), dist.get_world_size())
    assert local_rank == rank
    assert device == torch.device("cpu")
    told = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK")}
    assert told == {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
    assert os.environ["WORLD_SIZE"] == os.environ["LOCAL_WORLD_SIZE"] == "2"
    assert socket.gethostbyname(os.environ["MASTER_ADDR"]) == "127.0.0.1"


@two
def test_own_process_group(rank: int) -> None:
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method="env://")
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    assert total.item() == 3
    dist.destroy_process_group()


@pytest.mark.world_size(4, mesh=(2, 2), mesh_dim_names=("dp", "tp"))
def test_mesh(device_mesh: DeviceMesh, rank: int) -> None:
    assert device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
    assert device_mesh.mesh_dim_names == ("dp", "tp")
    assert device_mesh["tp"].get_local_rank() == rank % 2
    assert device_mesh.device_type == "cpu"


@two
def test_mesh_by_default(device_mesh: DeviceMesh) -> None:
    assert device_mesh.mesh.tolist() == [0, 1]
    assert device_mesh.mesh_dim_names is None


@two
def test_world(world: RankWorld, rank: int) -> None:
    assert (world.rank, world.size) == (rank, 2)
    assert world.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert world.broadcast(rank + 7, src=1) == 8
    with world.rank0_first():
        note("rank0_first", rank=rank)
    world.barrier()


@pytest.mark.parametrize("name", ["rank", "local_rank", "world_size", "device", "world"])
def test_without_a_marker(name: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(name)


def test_device_mesh_without_a_marker(device_mesh: object) -> None:
    pass


def test_checkpoint_dir_without_a_marker(checkpoint_dir: Path, tmp_path: Path) -> None:
    assert list(checkpoint_dir.iterdir()) == []
    assert checkpoint_dir.is_relative_to(tmp_path)


@two
def test_missing_fixture(nonesuch: object) -> None:
    pass


@two
async def test_async() -> None:
    pass
