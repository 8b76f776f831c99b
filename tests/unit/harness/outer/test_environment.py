"""What the variables of torchrun, srun and mpirun mean, and what is wrong with others."""

from __future__ import annotations

import pytest

from pytest_dcp import plugin
from pytest_dcp._harness.outer import environment
from pytest_dcp._harness.outer.environment import (
    INSIDE_VARIABLE,
    OuterEnvironmentError,
    read_environment,
)
from pytest_dcp._harness.protocol.launcher import RANK_VARIABLE

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = MASTER | {
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
}
SRUN = MASTER | {
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = MASTER | {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = MASTER | {"PMI_RANK": "1", "PMI_SIZE": "2"}
BY_HAND = MASTER | {"RANK": "0", "WORLD_SIZE": "2"}


def test_torchruns_variables_are_read() -> None:
    launch = read_environment(TORCHRUN)
    assert launch is not None
    assert (launch.launcher, launch.rank, launch.size) == ("torchrun", 5, 8)
    assert (launch.node, launch.local_rank, launch.is_local) == ("1", 1, False)
    assert (launch.master_addr, launch.master_port) == ("10.0.0.1", 29500)
    assert launch.has_agent_store
    assert (launch.run_id, launch.attempt, launch.max_restarts) == ("job", 1, 3)


@pytest.mark.parametrize(
    ("environ", "launcher", "rank", "size", "local_rank"),
    [
        (SRUN, "srun", 2, 4, 0),
        (OPEN_MPI, "mpirun", 1, 2, 1),
        (MPICH, "mpirun", 1, 2, None),
        (BY_HAND, "a launcher (RANK and WORLD_SIZE)", 0, 2, None),
        (SRUN | {"PMI_RANK": "2", "PMI_SIZE": "4"}, "srun", 2, 4, 0),  # by srun, for MPI
    ],
)
def test_other_launchers_variables_are_read(
    environ: dict[str, str], launcher: str, rank: int, size: int, local_rank: int | None
) -> None:
    launch = read_environment(environ)
    assert launch is not None
    assert (launch.launcher, launch.rank, launch.size) == (launcher, rank, size)
    assert launch.local_rank == local_rank
    assert not launch.has_agent_store


def test_all_ranks_on_one_machine_are_recognised() -> None:
    for environ in (OPEN_MPI, TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}):
        launch = read_environment(environ)
        assert launch is not None
        assert launch.is_local


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "4"},  # a parameter of many suites
        MASTER,
        # A batch script, which is not started by srun.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},
        SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"},
        TORCHRUN | {RANK_VARIABLE: "a world's own rank"},
        TORCHRUN | {INSIDE_VARIABLE: "a program that a test starts"},
    ],
)
def test_no_launcher_of_several_ranks(environ: dict[str, str]) -> None:
    assert read_environment(environ) is None


@pytest.mark.parametrize(
    "outer", [SRUN, OPEN_MPI, {"PMI_RANK": "0", "PMI_SIZE": "2"}], ids=["srun", "openmpi", "mpich"]
)
def test_a_torchrun_on_each_node_counts_and_not_its_own_launcher(outer: dict[str, str]) -> None:
    launch = read_environment(outer | TORCHRUN)
    assert launch is not None
    assert (launch.launcher, launch.rank, launch.size) == ("torchrun", 5, 8)


def test_mpirun_counts_though_its_daemons_were_started_by_srun() -> None:
    launch = read_environment(SRUN | OPEN_MPI)
    assert launch is not None
    assert (launch.launcher, launch.rank) == ("mpirun", 1)


def test_a_script_may_export_rank_and_world_size_for_torch() -> None:
    launch = read_environment(SRUN | {"RANK": "2", "WORLD_SIZE": "4"})
    assert launch is not None
    assert (launch.launcher, launch.rank, launch.size) == ("srun", 2, 4)


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (
            {"RANK": "1"},
            "RANK='1' is set, but WORLD_SIZE is not: start the ranks with torchrun, or unset RANK "
            "to run worlds on this machine alone",
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1"},
            "OMPI_COMM_WORLD_RANK='1' is set, but OMPI_COMM_WORLD_SIZE is not: start the ranks "
            "with torchrun, or unset OMPI_COMM_WORLD_RANK to run worlds on this machine alone",
        ),
        (BY_HAND | {"RANK": "2"}, "RANK=2 is not from 0 to 1, though WORLD_SIZE=2"),
        (BY_HAND | {"RANK": "one"}, "RANK='one' is not a whole number from 0 to 1048576"),
        (BY_HAND | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is not a whole number from 0 to"),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_STEP_NUM_TASKS=2 ranks need MASTER_ADDR and MASTER_PORT, which are not set: "
            "export the address of rank 0's node and a free port there, the same for all ranks",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
            "WORLD_SIZE=2 ranks need MASTER_PORT, which is not set: export the address",
        ),
        (
            SRUN | {"RANK": "2", "WORLD_SIZE": "8"},
            "two launchers disagree: SLURM_STEP_NUM_TASKS=4, but WORLD_SIZE=8; unset the variables "
            "of the one that did not start this process",
        ),
        (
            OPEN_MPI | {"PMI_RANK": "0", "PMI_SIZE": "2"},
            "two launchers disagree: OMPI_COMM_WORLD_RANK=1, but PMI_RANK=0",
        ),
    ],
)
def test_variables_that_do_not_fit_are_refused_in_a_sentence(
    environ: dict[str, str], sentence: str
) -> None:
    with pytest.raises(OuterEnvironmentError) as caught:
        read_environment(environ)
    assert str(caught.value).startswith(sentence)


def test_the_plugin_looks_for_the_sign_of_every_launcher() -> None:
    signs = {one.sign for one in environment.LAUNCHERS} | {environment.BY_HAND.sign}
    assert set(plugin.OUTER_VARIABLES) == signs
