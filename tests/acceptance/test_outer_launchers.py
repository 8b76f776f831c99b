"""Sessions that torchrun and other launchers start: the same reports as on one machine, once.

A session of torchrun imports torch in each of its processes, so few sessions serve many tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest

from support.sample_session import WITHIN_S

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult, Suite

INI = """
dcp_grace = 1
markers = launched_only: needs a launcher's three ranks
"""
PASSED = {"call": "passed"}
TORCHRUN = ("-m", "torch.distributed.run")
LEFT_OUT = "test_sizes[world_size=7]"
ADDRESSES = re.compile(r"\d+\.\d+\.\d+\.\d+:\d+|\[[^]]*\]:\d+|process \d+|0x[0-9a-f]+|\d+\.\d+ s")


@pytest.fixture(scope="module")
def suite(make_suite: MakeSuite) -> Suite:
    return make_suite({"test_launched.py": "launched.py"}, INI)


@pytest.fixture(scope="module")
def local(suite: Suite) -> SessionResult:
    return suite.run("-m", "not launched_only", f"--deselect=test_launched.py::{LEFT_OUT}")


@pytest.fixture(scope="module")
def distributed(suite: Suite) -> SessionResult:
    return suite.run("-n2", "-m", "not launched_only", f"--deselect=test_launched.py::{LEFT_OUT}")


@pytest.fixture(scope="module")
def launched(suite: Suite) -> SessionResult:
    """Three ranks; torchrun would restart a session that fails."""
    under = (*TORCHRUN, "--nproc-per-node=3", "--max-restarts=1")
    return suite.run("--junitxml=junit.xml", under=under)


def outcomes(result: SessionResult) -> dict[tuple[str, str, bool], list[tuple[str, str]]]:
    """By test and phase: the categories and headlines of the reports."""
    found: dict[tuple[str, str, bool], list[tuple[str, str]]] = {}
    for report in result.reports:
        text = re.sub(r"^\[gw\d+\] .*\n*", "", report.text)  # xdist's
        headline = ADDRESSES.sub("*", text.partition("\n")[0])
        key = report.nodeid, report.when, report.subtest
        found.setdefault(key, []).append((report.category, headline))
    return found


def test_every_test_ends_as_on_one_machine(local: SessionResult, launched: SessionResult) -> None:
    here, there = outcomes(local), outcomes(launched)
    assert len(here) > 60
    assert {key: there.get(key) for key in here} == here
    assert {key[0].rpartition("_")[2] for key in there.keys() - here.keys()} == {
        "large",
        "rank",
        "ever",
    }


def test_the_same_suite_ends_alike_in_xdists_workers(
    local: SessionResult, distributed: SessionResult
) -> None:
    assert outcomes(distributed) == outcomes(local)


def test_reports_come_once_and_from_rank_0_alone(launched: SessionResult) -> None:
    assert launched.repeated() == []
    assert len({report.pid for report in launched.reports}) == 1
    (ordinary,) = launched.noted("ordinary")
    assert ordinary["pid"] == launched.reports[0].pid
    assert launched.output.count("test session starts") == 1 + 1  # of the restart
    assert len(re.findall(r"\d+ failed, \d+ passed.* in ", launched.output)) == 1


def test_output_and_stacks_come_from_all_ranks(launched: SessionResult) -> None:
    printed = dict(launched.bad("test_parameters_and_output[b]").sections)
    assert printed["Captured stdout [rank 0] call"] == "b of rank 0\n"
    assert printed["Captured stdout [rank 1] call"] == "b of rank 1\n"
    died = launched.bad("test_dies")
    assert died.text.startswith("rank 1: was killed by signal 9 (SIGKILL) in call")
    assert "last words of 1" in dict(died.sections)["Captured stdout [rank 1] call"]
    hung = launched.bad("test_hangs").text
    assert re.match(r"rank 1: still in call at .* 2 s, at test_launched.py:\d+ in test_hangs", hung)
    assert "in barrier" in hung


def test_tests_that_need_more_ranks_are_deselected_with_a_count(launched: SessionResult) -> None:
    assert not any(report.nodeid.endswith(LEFT_OUT) for report in launched.reports)
    assert "1 test needs more ranks than the 3 of torchrun, up to 7: deselected" in launched.output
    assert "1 deselected" in launched.output


def test_ranks_know_their_place(launched: SessionResult) -> None:
    places = [note for note in launched.noted("place") if note["size"] == 3]
    assert sorted((note["rank"], note["local_rank"]) for note in places) == [(0, 0), (1, 1), (2, 2)]
    assert {note["local_world_size"] for note in places} == {"3"}
    assert {note["master_addr"] for note in places} == {"127.0.0.1"}


def test_a_warm_world_keeps_its_processes(launched: SessionResult) -> None:
    pids = [note["pid"] for note in launched.noted("warm")]
    assert len(pids) == 4
    assert len(set(pids)) == 2


def test_a_world_that_does_not_fit_is_refused_in_words(launched: SessionResult) -> None:
    text = launched.bad("test_a_world_that_is_too_large").text
    assert "a world of 4 ranks does not fit: the launcher has started 3" in text


def test_a_test_in_rank_0s_process_may_fork(launched: SessionResult) -> None:
    assert launched.outcomes("test_a_forked_child_is_terminated_as_ever") == PASSED
    assert launched.outcomes("test_a_program_of_a_test_is_no_rank") == PASSED


def test_a_failed_session_is_not_run_again_by_a_restart(launched: SessionResult) -> None:
    assert launched.exit_code == 1
    assert "torchrun has restarted a session that ended with exit code 1" in launched.output
    assert re.search(r"rank +: 0 .*\n +exitcode +: 1 ", launched.output)


def test_the_junit_file_is_rank_0s(launched: SessionResult) -> None:
    assert (launched.cwd / "junit.xml").exists()


def test_nothing_is_left(launched: SessionResult) -> None:
    assert launched.left_running == ()


# Two nodes.


class Node(NamedTuple):
    """Where one of torchrun's agents runs."""

    address: str
    prefix: tuple[str, ...] = ()
    """The command that enters the node."""


LOOPBACK = (Node("127.0.0.1"), Node("127.0.0.1"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextlib.contextmanager
def two_namespaces() -> Iterator[tuple[Node, Node]]:
    """Two network namespaces that are joined by a cable; skips where none can be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"dcp{os.getpid()}{end}" for end in "ab"]

    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)

    try:
        for name in names:
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
    try:
        ip(f"-n {names[0]} link add cable type veth peer name cable netns {names[1]}")
        for number, name in enumerate(names, 1):
            ip(f"-n {name} addr add 10.213.77.{number}/24 dev cable")
            ip(f"-n {name} link set cable up")
        first, second = (
            Node(f"10.213.77.{number}", ("ip", "netns", "exec", name))
            for number, name in enumerate(names, 1)
        )
        yield first, second
    finally:
        for name in names:
            ip(f"netns del {name}")


def run_on_nodes(suite: Suite, nodes: tuple[Node, Node]) -> SessionResult:
    """A session of one rank on each node, each started by an agent of its own."""
    run = suite.prepare()
    endpoint = f"{nodes[0].address}:{free_port()}"
    commands = [
        [
            *node.prefix, sys.executable, *TORCHRUN, "--nnodes=2", "--nproc-per-node=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}",
            f"--local-addr={node.address}", f"--rdzv-conf=is_host={1 - number}", "-m", "pytest",
        ]
        for number, node in enumerate(nodes)
    ]  # fmt: skip
    second_output = run.private / "output-1"
    with second_output.open("wb") as output:
        second = subprocess.Popen(
            commands[1],
            cwd=run.cwd,
            env=run.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        exit_code = run.wait(commands[0], WITHIN_S)
        second.wait(WITHIN_S)  # killed by the last test
    finally:
        second.kill()
        second.wait()
    result = run.result(max(exit_code, second.returncode), 0.0)  # one was killed by SIGKILL
    return replace(result, output=result.output + second_output.read_text())


@pytest.fixture(scope="module", params=["loopback", "namespaces"])
def on_nodes(request: pytest.FixtureRequest, make_suite: MakeSuite) -> SessionResult:
    """A session of two nodes, the second of which is killed at its end."""
    suite = make_suite({"test_nodes.py": "nodes.py"}, "dcp_grace = 20")
    if request.param == "loopback":
        return run_on_nodes(suite, LOOPBACK)
    with two_namespaces() as nodes:
        return run_on_nodes(suite, nodes)


def test_two_agents_are_two_nodes(on_nodes: SessionResult) -> None:
    assert on_nodes.outcomes("test_place") == PASSED
    places = sorted(on_nodes.noted("place"), key=lambda note: int(note["rank"]))
    assert [note["local_rank"] for note in places] == [0, 0]
    assert [note["LOCAL_WORLD_SIZE"] for note in places] == ["1", "1"]
    assert [note["GROUP_RANK"] for note in places] == ["0", "1"]
    addresses = {(note["MASTER_ADDR"], note["GLOO_SOCKET_IFNAME"]) for note in places}
    assert addresses in ({("127.0.0.1", "lo")}, {("10.213.77.1", "cable")})


def test_a_failure_on_another_node_is_in_the_report(on_nodes: SessionResult) -> None:
    failed = on_nodes.bad("test_fails_on_node_1")
    assert failed.headline == "rank 1: AssertionError: assert 1 == 0"
    assert len({report.pid for report in on_nodes.reports}) == 1


def test_a_checkpoint_of_two_nodes_is_read_by_both(on_nodes: SessionResult) -> None:
    assert on_nodes.outcomes("test_checkpoint") == PASSED


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_node_that_dies_in_a_save_leaves_a_whole_checkpoint(on_nodes: SessionResult) -> None:
    import pytest_dcp.checkpoint as dcp

    (record,) = on_nodes.folder.glob("session-*/saved")
    found = dcp.load_without_template(checkpoint_id=record)
    assert found["w"].tolist() in ([1.0] * 1000, [2.0] * 1000)
    assert sorted(found["rank"].values()) == [0, 1]
    (survivor,) = on_nodes.noted("survivor")
    assert survivor["rank"] == 0
    assert "rank 1" in survivor["text"]


def test_the_session_ends_when_a_node_is_lost(on_nodes: SessionResult) -> None:
    text = on_nodes.bad("test_a_node_dies_in_a_save").text
    how = r"rank 1: its process under torchrun \(process \d+ on \S+\) is gone or unreachable"
    assert re.search(f"{how} in call, without a verdict", text)
    assert re.search(f"_pytest.outcomes.Exit: {how}", on_nodes.output)
    assert on_nodes.exit_code == 1
    assert not any(report.nodeid.endswith("test_comes_too_late") for report in on_nodes.reports)


# Other launchers, by their variables, and wrong ones.


def run_by_hand(suite: Suite, variables: Sequence[Mapping[str, str]], *args: str) -> SessionResult:
    """A session of processes that no launcher has started, with the variables of one."""
    run = suite.prepare()
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "pytest", *args]
    with contextlib.ExitStack() as stack:
        for rank, mine in [*enumerate(variables)][1:]:
            output = stack.enter_context((run.private / f"output-{rank}").open("wb"))
            process = subprocess.Popen(
                command,
                cwd=run.cwd,
                env=run.env | master | mine,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        run.env.update(master | variables[0])
        exit_code = run.wait(command, WITHIN_S)
        left = run.left_after(2 * WITHIN_S)
    result = run.result(exit_code, 0.0)
    return replace(result, left_running=left)


SMALL = """
import os
import pytest
import torch  # once, before the fork

@pytest.mark.world_size(2)
def test_world(rank, world):
    if os.path.exists("part.py"):
        import part
        part.run(rank)
    assert world.gather(rank) == [0, 1]
"""
PART = """
def run(rank):
    if rank == 0:
        return "in rank 0"
    return "in the other"
"""
ONE_MORE = (
    SMALL
    + """
if os.environ.get("OMPI_COMM_WORLD_RANK") == "1":
    def test_of_rank_1_alone():
        pass
"""
)


def others_output(result: SessionResult) -> str:
    """The output of the ranks but rank 0."""
    files = result.folder.glob("session-*/output-*")
    return "".join(path.read_text() for path in files)


def test_srun_is_recognised_by_its_variables(make_suite: MakeSuite) -> None:
    suite = make_suite({"test_small.py": SMALL, "part.py": PART})
    variables = [
        {"SLURM_PROCID": f"{rank}", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
        for rank in range(2)
    ]
    reports = ("--junitxml=junit.xml", "--cov=part", "--cov-report=json")
    result = run_by_hand(suite, variables, *reports)
    assert "rank 0 of the 2 of srun" in result.output
    assert result.outcomes("test_world") == PASSED
    assert result.exit_code == 0
    assert 'tests="1"' in (result.cwd / "junit.xml").read_text()
    measured = json.loads((result.cwd / "coverage.json").read_text())
    assert measured["files"]["part.py"]["missing_lines"] == []
    assert [path.name for path in result.cwd.glob(".coverage*")] == [".coverage"]
    assert others_output(result) == ""
    assert result.left_running == ()


def test_ranks_of_mpirun_that_collect_other_tests_are_named(make_suite: MakeSuite) -> None:
    suite = make_suite({"test_more.py": ONE_MORE})
    variables = [
        {"OMPI_COMM_WORLD_RANK": f"{rank}", "OMPI_COMM_WORLD_SIZE": "2"} for rank in range(2)
    ]
    result = run_by_hand(suite, variables)
    assert (
        "ERROR: the ranks must collect the same tests, but rank 1 also had "
        "test_more.py::test_of_rank_1_alone"
    ) in result.output
    assert result.exit_code == pytest.ExitCode.USAGE_ERROR
    assert result.reports == ()
    assert others_output(result) == ""
    assert result.left_running == ()


@pytest.mark.parametrize(
    ("env", "args", "sentence"),
    [
        ({"RANK": "1"}, (), "RANK='1' is set, but WORLD_SIZE is not: start the ranks with"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ("-n2",),
            "pytest-xdist's -n cannot be used under a launcher (RANK and WORLD_SIZE), which has",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            ("--dcp-adopt",),
            "--dcp-adopt starts the processes of each test itself, but a launcher (RANK and",
        ),
    ],
)
def test_wrong_environments_are_refused_in_a_sentence(
    make_suite: MakeSuite, env: Mapping[str, str], args: Sequence[str], sentence: str
) -> None:
    result = make_suite({"test_small.py": SMALL}).run(*args, env=env)
    assert result.exit_code == pytest.ExitCode.USAGE_ERROR
    assert sentence in result.output


def test_without_marked_tests_nothing_changes(make_suite: MakeSuite) -> None:
    suite = make_suite({"test_plain.py": "def test_plain():\n    pass\n"})
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result = suite.run(env=env)
    assert result.outcomes("test_plain") == PASSED
    assert "1 passed" in result.output
    assert result.output.count("test session starts") == 1
