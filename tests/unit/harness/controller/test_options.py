"""The session's options, from a command line and an ini file that are dictionaries."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_dcp._harness.controller.options import OPTIONS, Options, cpu_count, read_options
from pytest_dcp._harness.protocol.world_spec import MAX_WORLD_SIZE, Defaults
from pytest_dcp.command_line import add_options
from support.options import FakeConfig, FakeParser, StrictConfig

NAMES = [option.name for option in OPTIONS]


def read(line: dict[str, str] | None = None, ini: dict[str, object] | None = None) -> Options:
    return read_options(FakeConfig(line or {}, ini or {}))  # type: ignore[arg-type]  # a fake


def refused(line: dict[str, str] | None = None, ini: dict[str, object] | None = None) -> str:
    """The text of the usage error."""
    with pytest.raises(pytest.UsageError) as caught:
        read(line, ini)
    return str(caught.value)


def test_without_a_word_from_the_user_the_documented_defaults_hold() -> None:
    assert read() == Options(
        marker="world_size",
        launch="auto",
        defaults=Defaults(backend="auto", timeout_s=120.0, world_size=None),
        grace_s=1.0,
        report_ranks="all",
        pdb_rank=None,
        require_gpus=False,
        max_procs=0,
        output_limit_bytes=256 * 1024 * 1024,
        seed=None,
    )


GIVEN: list[tuple[str, str, str, object]] = [
    ("marker", "dist", "marker", "dist"),
    ("marker", "", "marker", ""),
    ("launch", "spawn", "launch", "spawn"),
    ("backend", "nccl", "defaults.backend", "nccl"),
    ("world-size", "8", "defaults.world_size", 8),
    ("timeout", "2.5", "defaults.timeout_s", 2.5),
    ("timeout", "0", "defaults.timeout_s", math.inf),
    ("grace", "0.25", "grace_s", 0.25),
    ("grace", "0", "grace_s", 0.0),
    ("report-ranks", "first", "report_ranks", "first"),
    ("pdb-rank", "0", "pdb_rank", 0),
    ("pdb-rank", "3", "pdb_rank", 3),
    ("pdb-rank", "first", "pdb_rank", None),
    ("require-gpus", "true", "require_gpus", True),
    ("max-procs", "16", "max_procs", 16),
    ("output-limit", "3", "output_limit_bytes", 3 * 1024 * 1024),
    ("adopt", "true", "adopt", True),
    ("adopt-except", "a.py *::b", "adopt_except", ("a.py", "*::b")),
    ("seed", "0", "seed", 0),
    ("seed", "1234567890123", "seed", 1234567890123),
]


def value_of(options: Options, path: str) -> object:
    value: object = options
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(("name", "text", "path", "value"), GIVEN)
def test_an_option_arrives_from_the_command_line_and_from_the_ini_file(
    name: str, text: str, path: str, value: object
) -> None:
    for options in (read({name: text}), read(ini={name: text}), read(ini={name: f" {text} "})):
        assert value_of(options, path) == value
        assert type(value_of(options, path)) is type(value)


def test_there_is_a_case_for_every_option() -> None:
    assert {name for name, *_ in GIVEN} == set(NAMES)


def test_the_command_line_wins_over_the_ini_file() -> None:
    assert read({"seed": "1"}, {"seed": "2"}).seed == 1
    assert read({"marker": ""}, {"marker": "dist"}).marker == ""


@pytest.mark.parametrize("value", [True, "True", "yes", "on", "1"])
def test_an_ini_file_asks_for_gpus_in_any_usual_spelling(value: object) -> None:
    assert read(ini={"require-gpus": value}).require_gpus


@pytest.mark.parametrize("value", [False, "false", "no", "off", "0", ""])
def test_an_ini_file_can_also_say_no_to_required_gpus(value: object) -> None:
    assert not read(ini={"require-gpus": value}).require_gpus


WRONG = [
    ("launch", "thread"),
    ("backend", "mpi"),
    ("report-ranks", "some"),
    ("world-size", "0"),
    ("world-size", "-2"),
    ("world-size", "two"),
    ("world-size", "2.5"),
    ("world-size", str(MAX_WORLD_SIZE + 1)),
    ("timeout", "-1"),
    ("timeout", "nan"),
    ("timeout", "1m"),
    ("grace", "-0.5"),
    ("grace", "soon"),
    ("pdb-rank", "-1"),
    ("pdb-rank", "last"),
    ("max-procs", "-1"),
    ("max-procs", "1e3"),
    ("output-limit", "-1"),
    ("output-limit", "1GB"),
    ("output-limit", "nan"),
    ("seed", "-1"),
    ("seed", str(2**63)),
    ("seed", "x"),
]


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_a_wrong_value_is_refused_with_the_option_s_name_and_the_value(
    name: str, text: str
) -> None:
    ini_name = f"dcp_{name.replace('-', '_')}"
    for given_as, told in (
        (f"--dcp-{name}", refused({name: text})),
        (ini_name, refused(ini={name: text})),
        (f"--dcp-{name}", refused({name: text}, ini={name: "another"})),
    ):
        assert told.startswith(f"{given_as} takes ")
        assert repr(text) in told


@pytest.mark.parametrize("value", ["maybe", "2", "tru"])
def test_an_ini_file_that_neither_asks_for_gpus_nor_not_is_refused(value: str) -> None:
    told = refused(ini={"require-gpus": value})
    assert "require_gpus" in told
    assert repr(value) in told


@pytest.mark.parametrize("name", ["world size", "3d", "a.b", "world_size(4)", "-"])
def test_a_marker_that_no_test_can_carry_is_refused(name: str) -> None:
    told = refused({"marker": name})
    assert "--dcp-marker" in told
    assert repr(name) in told


def test_all_wrong_values_are_reported_at_once() -> None:
    wrong = {"launch": "thread", "world-size": "0", "timeout": "1m", "seed": "x", "grace": "-1"}
    told = refused(wrong)
    for name, text in wrong.items():
        assert f"--dcp-{name} " in told
        assert repr(text) in told


@pytest.mark.parametrize("text", ["inf", "1e400", "infinity"])
@pytest.mark.parametrize("name", ["timeout", "grace", "output-limit"])
def test_an_endless_limit_is_taken_or_refused_but_is_no_crash(name: str, text: str) -> None:
    try:
        read({name: text})
    except pytest.UsageError as error:
        told = str(error)
    else:
        told = f"--dcp-{name} was taken"
    assert f"--dcp-{name} " in told


def test_a_part_of_a_mebibyte_is_a_limit_too() -> None:
    assert read({"output-limit": "0.5"}).output_limit_bytes == 512 * 1024


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(NAMES), st.text() | st.floats().map(str) | st.integers().map(str)
    )
)
def test_any_text_gives_options_or_one_usage_error(texts: dict[str, str]) -> None:
    try:
        options = read(texts)
    except pytest.UsageError:
        return
    assert options.defaults.timeout_s > 0
    assert options.grace_s >= 0
    assert options.output_limit_bytes >= 0


def test_every_option_has_an_ini_twin_a_help_and_no_default_of_pytest_s_own() -> None:
    parser = FakeParser()
    add_options(parser, OPTIONS)  # type: ignore[arg-type]  # a fake
    assert list(parser.group.options) == [f"--dcp-{name}" for name in NAMES]
    for name, keywords in parser.group.options.items():
        assert keywords["dest"] == name.removeprefix("--").replace("-", "_")
        assert keywords["default"] is None  # so that the ini file is asked when it is not given
        assert keywords["help"]
    assert set(parser.ini) == {keywords["dest"] for keywords in parser.group.options.values()}
    assert set(parser.ini.values()) == {None}


NATIVE: list[tuple[str, object, str, object]] = [
    ("world-size", 8, "defaults.world_size", 8),
    ("timeout", 200, "defaults.timeout_s", 200.0),
    ("timeout", 2.5, "defaults.timeout_s", 2.5),
    ("grace", 3, "grace_s", 3.0),
    ("pdb-rank", 1, "pdb_rank", 1),
    ("require-gpus", True, "require_gpus", True),
    ("max-procs", 16, "max_procs", 16),
    ("output-limit", 0.5, "output_limit_bytes", 512 * 1024),
    ("adopt", True, "adopt", True),
    ("seed", 7, "seed", 7),
]
"""Values that a TOML file states without quotes: every option that is not a name."""


@pytest.mark.parametrize(("name", "given", "path", "value"), NATIVE)
def test_a_toml_file_gives_an_option_in_its_own_type(
    name: str, given: object, path: str, value: object
) -> None:
    parser = FakeParser()
    add_options(parser, OPTIONS)  # type: ignore[arg-type]  # a fake
    assert value_of(read(ini={name: given}), path) == value
    if pytest.version_tuple >= (9, 2):
        registered: Any = parser.ini_types[f"dcp_{name.replace('-', '_')}"]
        assert isinstance(given, registered) or registered == str | float


def test_every_option_that_a_number_or_a_flag_suits_has_a_type() -> None:
    names = {"marker", "launch", "backend", "report-ranks", "adopt-except"}
    assert {name for name, *_ in NATIVE} == set(NAMES) - names
    assert {option.name for option in OPTIONS if option.takes is str} == names


def test_older_pytest_takes_a_toml_file_s_own_types_too() -> None:
    config = StrictConfig({"timeout": 200, "require-gpus": True, "seed": "5"})
    options = read_options(config)  # type: ignore[arg-type]  # a fake
    assert options.defaults.timeout_s == 200
    assert options.require_gpus
    assert options.seed == 5


def test_pytest_itself_can_show_the_help_of_every_option() -> None:
    # argparse takes % in a help text for a format.
    parser = FakeParser()
    add_options(parser, OPTIONS)  # type: ignore[arg-type]  # a fake
    for keywords in parser.group.options.values():
        assert keywords["help"] % {} == keywords["help"]


def test_there_is_at_least_one_core() -> None:
    assert cpu_count() >= 1
