"""The user interface: the plugin on or off, markers of every form, options, and misuse of each.

Whole sessions over suites of `samples/`, each run once and looked at by many tests.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

USAGE_ERROR = pytest.ExitCode.USAGE_ERROR
OURS = ["pytest_dcp", "pytest_dcp.fault_fixtures", "pytest_dcp.fixtures", "pytest_dcp.plugin"]
PLAIN = "def test_plain():\n    pass\n"


def errors_of(session: SessionResult) -> list[str]:
    """The lines of the usage error that ended a session."""
    _, found, text = session.output.partition("\nERROR: ")
    assert found, f"no usage error in:\n{session.output[-3000:]}"
    return text.strip().splitlines()


# Registration.


@pytest.mark.parametrize(
    ("args", "env"),
    [
        ([], {}),
        (["-p", "pytest_dcp"], {}),
        (["-p", "pytest_dcp", "-p", "pytest_dcp"], {}),
        (["-p", "pytest_dcp"], {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}),
    ],
    ids=["entry point", "both", "twice", "-p alone"],
)
def test_the_plugin_registers_once_and_costs_an_unmarked_suite_nothing(
    make_suite: MakeSuite, args: list[str], env: dict[str, str]
) -> None:
    suite = make_suite({"conftest.py": "registration.py", "test_plain.py": PLAIN})
    session = suite.run("-Werror", "--strict-markers", *args, env=env, new_interpreter=True)
    (seen,) = session.noted("registration")
    assert session.exit_code == pytest.ExitCode.OK
    assert seen["plugins"] == OURS
    assert (seen["options"], seen["markers"]) == (1, 1)
    assert (seen["torch"], seen["started"], seen["children"]) == (False, [], "")


def test_the_plugin_can_be_switched_off(make_suite: MakeSuite) -> None:
    suite = make_suite({"conftest.py": "registration.py", "test_foreign.py": "foreign_marker.py"})
    session = suite.run("-p", "no:pytest_dcp", new_interpreter=True)
    (seen,) = session.noted("registration")
    assert session.exit_code == pytest.ExitCode.OK
    assert seen["plugins"] == []
    assert (seen["options"], seen["markers"]) == (0, 0)
    assert (seen["torch"], seen["started"]) == (False, [])


def test_an_empty_marker_leaves_a_foreign_marker_alone(make_suite: MakeSuite) -> None:
    files = {"conftest.py": "registration.py", "test_foreign.py": "foreign_marker.py"}
    ini = "dcp_marker =\nmarkers = world_size: another plugin's"
    session = make_suite(files, ini).run("--strict-markers", new_interpreter=True)
    (seen,) = session.noted("registration")
    assert session.exit_code == pytest.ExitCode.OK
    assert len(session.collected) == 3
    assert (seen["markers"], seen["torch"], seen["started"]) == (0, False, [])


def test_the_marker_can_be_renamed_beside_a_foreign_one(make_suite: MakeSuite) -> None:
    files = {"test_renamed.py": "renamed_marker.py", "test_foreign.py": "foreign_marker.py"}
    ini = "dcp_marker = dcp_world\nmarkers = world_size: another plugin's"
    session = make_suite(files, ini).run("--strict-markers")
    assert session.exit_code == pytest.ExitCode.OK
    assert {nodeid.partition("::")[2] for nodeid in session.collected} == {
        "test_foreign",
        "test_foreign_with_a_parameter[2]",
        "test_foreign_with_a_parameter[3]",
        "test_renamed",
        "test_renamed_list[world_size=1]",
        "test_renamed_list[world_size=3]",
    }


# Wrong markers.

WRONG = {
    "test_wrong[zero]": "takes a size from 1 to 1024; got 0",
    "test_wrong[negative]": "takes a size from 1 to 1024; got -1",
    "test_wrong[too_large]": "takes a size from 1 to 1024; got 5000",
    "test_wrong[text]": "takes an int or a list of ints; got '4'",
    "test_wrong[float]": "takes an int or a list of ints; got 2.0",
    "test_wrong[bool]": "takes an int or a list of ints; got True",
    "test_wrong[none]": "takes an int or a list of ints; got None",
    "test_wrong[set]": "takes an int or a list of ints; got {2}",
    "test_wrong[no_size]": "takes a size, as in world_size(4), or a parametrization",
    "test_wrong[two_sizes]": "takes one positional argument, a size or a list of sizes; got 2",
    "test_wrong[keyword_size]": "has no keyword 'size'; it takes backend, device, mesh,",
    "test_wrong[empty_list]": "was given an empty list of sizes",
    "test_wrong[list_with_text]": "takes an int or a list of ints; got 'x'",
    "test_wrong[list_in_list]": "takes an int or a list of ints; got [1]",
    "test_wrong[size_twice]": "lists a size twice: [2, 2]",
    "test_wrong[backend]": "backend= takes one of auto, gloo, nccl, fake, threaded; got 'mpi'",
    "test_wrong[device]": "device= takes auto, cpu or cuda; got 'tpu'",
    "test_wrong[nccl_on_cpu]": "backend='nccl' needs device='cuda'; got device='cpu'",
    "test_wrong[mesh_product]": "mesh=(2, 3) has 6 ranks, but the size is 4",
    "test_wrong[mesh_int]": "mesh= takes a shape such as (2, 2), of ints >= 1; got 4",
    "test_wrong[mesh_names]": "mesh_dim_names=('dp',) has 1 names for a mesh of 2 dimensions",
    "test_wrong[mesh_names_twice]": "mesh_dim_names= has a name twice: ('dp', 'dp')",
    "test_wrong[mesh_names_text]": "mesh_dim_names= takes names such as ('dp', 'tp'); got 'dp'",
    "test_wrong[timeout_negative]": "timeout= takes seconds, or 0 or None for no limit; got -1",
    "test_wrong[timeout_nan]": "timeout= takes seconds, or 0 or None for no limit; got nan",
    "test_wrong[timeout_text]": "timeout= takes seconds, or 0 or None for no limit; got '1'",
    "test_wrong[isolation]": "isolation= takes test or module; got 'process'",
    "test_wrong[typing_error]": "has no keyword 'tiemout'; it takes backend, device, mesh,",
    "test_wrong[two_problems]": "backend= takes one of auto, gloo, nccl, fake, threaded; got 'mpi'",
    "test_wrong[list_in_param]": "holds a list of sizes in a place that cannot be parametrised",
    "test_mesh_of_one_size[world_size=3]": "mesh=(2,) has 2 ranks, but the size is 3",
    "test_parametrised[0]": "takes a size from 1 to 1024; the parametrization gave 0",
    "test_parametrised[5000]": "takes a size from 1 to 1024; the parametrization gave 5000",
    "test_parametrised[x]": "takes an int; the parametrization of world_size gave 'x'",
    "TestOfUnittest::test_list": "holds a list of sizes in a place that cannot be parametrised",
}


@pytest.fixture(scope="module")
def run_wrong_markers(make_suite: MakeSuite) -> Callable[..., SessionResult]:
    """Runs the suite once per set of arguments, whatever the order of the tests."""
    return functools.cache(make_suite({"test_wrong_markers.py": "wrong_markers.py"}).run)


@pytest.fixture(scope="module", params=["-n0", "-n2"])
def wrong_markers(
    run_wrong_markers: Callable[..., SessionResult], request: pytest.FixtureRequest
) -> SessionResult:
    return run_wrong_markers(request.param)


@pytest.mark.parametrize("test", WRONG)
def test_a_wrong_marker_is_named_with_its_test_and_value(
    wrong_markers: SessionResult, test: str
) -> None:
    start = f"test_wrong_markers.py::{test}: @pytest.mark.world_size {WRONG[test]}"
    assert any(line.startswith(start) for line in errors_of(wrong_markers))


def test_wrong_markers_are_usage_errors_reported_all_at_once_before_anything_runs(
    wrong_markers: SessionResult,
) -> None:
    second_problems = 2  # of two_problems and of list_in_list
    assert len(errors_of(wrong_markers)) == len(WRONG) + second_problems
    assert wrong_markers.exit_code == USAGE_ERROR
    assert wrong_markers.noted("ran") == []
    assert "INTERNALERROR" not in wrong_markers.output
    assert wrong_markers.left_running == ()


# Wrong options.

SAID = {
    "--dcp-world-size takes a whole number from 1 to 1024; got '0'",
    "--dcp-timeout takes a number >= 0; got '-1'",
    "--dcp-grace takes a number; got 'soon'",
    "--dcp-output-limit takes a number from 0 to 1e+06; got 'inf'",
    "--dcp-max-procs takes a whole number >= 0; got '-2'",
    "--dcp-seed takes a whole number; got '1.5'",
    "--dcp-pdb-rank takes a whole number; got 'last'",
    "--dcp-launch takes auto, fork, spawn; got 'thread'",
    "--dcp-backend takes auto, gloo, nccl; got 'mpi'",
    "--dcp-report-ranks takes all, failed, first; got 'some'",
    "--dcp-marker takes a name such as world_size; got 'a-b'",
    "dcp_require_gpus takes true or false; got 'maybe'",
}


def wrong_values() -> Iterable[tuple[str, str]]:
    """(option, value) of everything in `SAID`."""
    for text in SAID:
        name = text.partition(" ")[0].removeprefix("--")
        yield name, text.rpartition("got ")[2].strip("'")


def test_wrong_ini_values_are_reported_all_at_once(make_suite: MakeSuite) -> None:
    ini = "\n".join(f"{name.replace('-', '_')} = {value}" for name, value in wrong_values())
    session = make_suite({"test_plain.py": PLAIN}, ini).run()
    assert session.exit_code == USAGE_ERROR
    options = (text.partition(" ") for text in SAID)
    said = [f"{name.removeprefix('--').replace('-', '_')} {rest}" for name, _, rest in options]
    assert [text for text in said if text not in session.output] == []
    assert "--dcp-" not in session.output


NATIVE_TOML = """
[tool.pytest]
dcp_timeout = 200
dcp_grace = 0.5
dcp_max_procs = 3
dcp_require_gpus = true
dcp_seed = "5"
"""
SHOWS_OPTIONS = """
from pytest_dcp.plugin import OPTIONS_KEY

def test_shows_the_options(pytestconfig):
    options = pytestconfig.stash[OPTIONS_KEY]
    print(options.defaults.timeout_s, options.grace_s, options.max_procs, options.require_gpus)
    print(options.seed)
"""


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="older pytest has no [tool.pytest] table")
def test_a_toml_file_s_own_types_are_taken(make_suite: MakeSuite) -> None:
    files = {"pyproject.toml": NATIVE_TOML, "test_options.py": SHOWS_OPTIONS}
    session = make_suite(files).run("-c", "pyproject.toml", "-p", "pytest_dcp", "-s")
    assert session.exit_code == 0
    assert "200.0 0.5 3 True\n5\n" in session.output


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="older pytest has no [tool.pytest] table")
@pytest.mark.parametrize("line", ["dcp_timeout = true", "dcp_seed = -1", "dcp_max_procs = [1]"])
def test_a_toml_file_s_wrong_value_is_a_usage_error(make_suite: MakeSuite, line: str) -> None:
    files = {"pyproject.toml": f"[tool.pytest]\n{line}\n", "test_options.py": SHOWS_OPTIONS}
    session = make_suite(files).run("-c", "pyproject.toml", "-p", "pytest_dcp")
    assert session.exit_code == USAGE_ERROR
    assert "INTERNALERROR" not in session.output
    assert line.partition(" ")[0].removeprefix("dcp_").replace("_", "-") in session.output.replace(
        "_", "-"
    )


@pytest.mark.parametrize("distribution", ["-n0", "-n2"])
def test_wrong_options_are_reported_all_at_once(make_suite: MakeSuite, distribution: str) -> None:
    by_argparse = ("dcp-launch", "dcp-backend", "dcp-report-ranks", "dcp_require_gpus")
    given = [(name, value) for name, value in wrong_values() if name not in by_argparse]
    options = [f"--{name}={value}" for name, value in given]
    session = make_suite({"test_plain.py": PLAIN}).run(distribution, *options)
    assert session.exit_code == USAGE_ERROR
    assert len(given) == len(SAID) - len(by_argparse)
    for name, _ in given:
        assert any(text in session.output for text in SAID if text.startswith(f"--{name} "))


def test_a_wrong_choice_is_refused_with_the_choices(make_suite: MakeSuite) -> None:
    session = make_suite({"test_plain.py": PLAIN}).run("--dcp-launch=thread")
    assert session.exit_code == USAGE_ERROR
    assert "--dcp-launch: invalid choice: 'thread' (choose from " in session.output


# Forms of the marker.

SIZES = {
    "test_module": 2,
    "test_function": 1,
    "test_list[world_size=1]": 1,
    "test_list[world_size=3]": 3,
    "test_list_of_one[world_size=2]": 2,
    "test_list_and_other[world_size=1-a]": 1,
    "test_list_and_other[world_size=1-b]": 1,
    "test_list_and_other[world_size=2-a]": 2,
    "test_list_and_other[world_size=2-b]": 2,
    "test_param[1]": 2,
    "test_param[3]": 3,
    "test_own_parametrization[1]": 1,
    "test_own_parametrization[3]": 3,
    "test_own_parametrization_of_two[3-a]": 3,
    "test_class": 3,
    "test_function_in_class": 1,
    "test_inner_class": 1,
    "test_method": 3,
}
OVERRIDDEN = {
    "test_module": 1,
    "test_function": 1,
    "test_list[world_size=1]": 1,
    "test_list_of_one[world_size=1]": 1,
    "test_list_and_other[world_size=1-a]": 1,
    "test_list_and_other[world_size=1-b]": 1,
    "test_param[1]": 1,
    "test_param[3]": 1,
    "test_own_parametrization[1]": 1,
    "test_own_parametrization[3]": 3,
    "test_own_parametrization_of_two[3-a]": 3,
    "test_class": 1,
    "test_function_in_class": 1,
    "test_inner_class": 1,
    "test_method": 1,
}
"""With --dcp-world-size=1. A size that the test itself states is kept."""


def sizes(session: SessionResult) -> dict[str, int]:
    """Test -> size of the world that it ran in, having seen each rank of it once."""
    noted = Counter((note["test"], note["size"], note["rank"]) for note in session.noted("size"))
    found: dict[str, list[int]] = {}
    for test, size, rank in noted.elements():
        found.setdefault(test, [size]).append(rank)
    assert all(sorted(ranks) == [*range(size)] for size, *ranks in found.values())
    return {test: size for test, (size, *_) in found.items()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), SIZES), (("--dcp-world-size=1",), OVERRIDDEN)],
    ids=["as marked", "overridden"],
)
def test_the_closest_marker_sets_the_size_of_the_world(
    make_suite: MakeSuite, options: tuple[str, ...], expected: Mapping[str, int]
) -> None:
    session = make_suite({"test_marker_forms.py": "marker_forms.py"}).run(*options)
    assert sizes(session) == expected
    assert {nodeid.rpartition("::")[2] for nodeid in session.collected} == expected.keys()
    assert {r.category for r in session.reports if r.when == "call"} == {"passed"}


def test_another_size_for_a_mesh_is_a_usage_error(make_suite: MakeSuite) -> None:
    session = make_suite({"test_mesh_forms.py": "mesh_forms.py"}).run("--dcp-world-size=2")
    assert session.exit_code == USAGE_ERROR
    assert errors_of(session) == [
        "test_mesh_forms.py::test_mesh: @pytest.mark.world_size mesh=(2, 2) has 4 ranks and "
        "cannot take the size 2 that --dcp-world-size asks for"
    ]
