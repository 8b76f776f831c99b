"""The faults' options, from a command line and an ini file that are dictionaries."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_dcp.command_line import add_options
from pytest_dcp.faults.crash_models import MODELS
from pytest_dcp.faults.crashes.losses import LOSSES, RULES
from pytest_dcp.faults.options import OPTIONS, FaultOptions, read_fault_options
from support.options import FakeConfig, FakeParser

Texts = dict[str, str]


def read(line: Texts | None = None, ini: dict[str, object] | None = None) -> FaultOptions:
    return read_fault_options(FakeConfig(line or {}, ini or {}))  # type: ignore[arg-type]  # a fake


def test_the_documented_defaults() -> None:
    assert read() == FaultOptions(budget=1000, replay="")


@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("fault-budget", "pr", FaultOptions(1000, "")),
        ("fault-budget", "nightly", FaultOptions(100_000, "")),
        ("fault-budget", "77", FaultOptions(77, "")),
        ("fault-replay", "ext4-ordered-407cce6c12", FaultOptions(1000, "ext4-ordered-407cce6c12")),
    ],
)
def test_an_option_arrives_from_the_command_line_and_from_the_ini_file(
    name: str, text: str, options: FaultOptions
) -> None:
    for found in (read({name: text}), read(ini={name: text}), read(ini={name: f" {text} "})):
        assert found == options
        assert type(found.budget) is int


@pytest.mark.parametrize("text", ["0", "daily", "-1", "1e3", "nan"])
def test_a_wrong_budget_is_refused_with_the_option_s_name_and_the_value(text: str) -> None:
    for line, ini, given_as in (
        ({"fault-budget": text}, {}, "--dcp-fault-budget"),
        ({}, {"fault-budget": text}, "dcp_fault_budget"),
        ({"fault-budget": text}, {"fault-budget": "another"}, "--dcp-fault-budget"),
    ):
        with pytest.raises(pytest.UsageError) as refused:
            read(line, dict(ini))
        told = str(refused.value)
        assert told.startswith(f"{given_as} takes pr, nightly or a whole number")
        assert repr(text) in told


@pytest.mark.parametrize("text", ["foo", "posx-407cce6c12", "posix-407", "posix-407cce6c12 x"])
def test_no_id_of_a_crash_state_is_refused(text: str) -> None:
    with pytest.raises(pytest.UsageError, match=r"--dcp-fault-replay takes the id .*posix, ") as no:
        read({"fault-replay": text})
    assert str(no.value).endswith(f"got {text!r}")


def test_every_model_that_an_id_may_begin_with_has_its_rules_and_losses() -> None:
    assert set(MODELS) == set(RULES) == set(LOSSES)


def test_a_toml_file_gives_the_budget_as_a_number() -> None:
    parser = FakeParser()
    add_options(parser, OPTIONS)  # type: ignore[arg-type]  # a fake
    assert read(ini={"fault-budget": 77}).budget == 77
    if pytest.version_tuple >= (9, 2):
        registered: Any = parser.ini_types["dcp_fault_budget"]
        assert isinstance(77, registered)


def test_every_option_has_an_ini_twin_a_help_and_no_default_of_pytest_s_own() -> None:
    parser = FakeParser()
    add_options(parser, OPTIONS)  # type: ignore[arg-type]  # a fake
    assert list(parser.group.options) == ["--dcp-fault-budget", "--dcp-fault-replay"]
    for name, keywords in parser.group.options.items():
        assert keywords["dest"] == name.removeprefix("--").replace("-", "_")
        assert keywords["default"] is None  # so that the ini file is asked when it is not given
        assert keywords["help"] % {} == keywords["help"]  # argparse takes % for a format
    assert set(parser.ini) == {"dcp_fault_budget", "dcp_fault_replay"}
    assert set(parser.ini.values()) == {None}
