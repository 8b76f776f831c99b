"""An option of the command line and its twin in the ini file: register it, read it, check it.

Enters: a table of `Option`, and what the user wrote. Leaves: checked values, or one list of
everything that is wrong. The harness and the faults each have a table of their own.

Light on purpose: every session imports it, even without any world.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

FLAGS = {
    "": False, "false": False, "0": False, "no": False, "off": False,
    "true": True, "1": True, "yes": True, "on": True,
}  # fmt: skip
"""The words that an ini file may use for a flag."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option, as the command line and the ini file know it."""

    name: str
    """--dcp-<name>; the ini twin has underscores."""
    default: str
    help: str
    choices: tuple[str, ...] = ()
    takes: type[str] | type[int] | type[float] | type[bool] = str
    """Types of values that a TOML file may give, beside a string; a bool is a flag on the command
    line.
    """
    words: Mapping[str, str] = field(default_factory=dict)
    """Words that stand for a value."""
    may_be_empty: bool = False
    """Whether an empty text is a value; elsewhere it is an option left blank."""

    @property
    def key(self) -> str:
        """The name in an ini file, and of the parsed command line's attribute."""
        return f"dcp_{self.name.replace('-', '_')}"


def add_options(parser: pytest.Parser, options: Sequence[Option]) -> None:
    """Register options and their ini twins."""
    group = parser.getgroup("dcp", "worlds of ranks (pytest_dcp)")
    for option in options:
        kwargs: dict[str, Any] = {"dest": option.key, "default": None}
        if option.takes is bool:
            kwargs |= {"action": "store_const", "const": "true"}
        elif option.choices:
            kwargs["choices"] = option.choices
        else:
            kwargs["metavar"] = option.name.rpartition("-")[2].upper()
        default_note = f" (default: {option.default})" if option.default else ""
        group.addoption(f"--dcp-{option.name}", help=option.help + default_note, **kwargs)
        kind = _ini_type(option.takes)
        help_ = f"{option.help}; as --dcp-{option.name}"
        parser.addini(option.key, help_, type=kind, default=None)


def _ini_type(takes: type[Any]) -> Any:
    """The type that pytest is given for an ini option: a string, or what `takes` names.

    Strings come first, so that an ini file's text reaches `OptionReader` as it was written. pytest
    has known unions since 9.2; `_ini_value` says what older ones do.
    """
    return str | takes if takes is not str and pytest.version_tuple >= (9, 2) else "string"


class OptionReader:
    """Reads the values of a table of options, and collects all problems with them."""

    def __init__(self, config: pytest.Config, options: Sequence[Option]) -> None:
        self.problems: list[str] = []
        self._options = {option.name: option for option in options}
        self._texts = {option.name: _text_of(config, option) for option in options}
        self._source_names = {option.name: _source_name(config, option) for option in options}
        """By option, its name where its value was written."""
        for option in options:
            if option.choices and self._texts[option.name] not in option.choices:
                self.refuse(option.name, ", ".join(option.choices))
            if option.takes is bool and self._texts[option.name].lower() not in FLAGS:
                self.refuse(option.name, "true or false")

    def raise_problems(self) -> None:
        """Raise `pytest.UsageError` naming every wrong option, if there is one."""
        if self.problems:
            raise pytest.UsageError("; ".join(self.problems))

    def refuse(self, name: str, takes: str) -> None:
        """Note that an option `takes` something else."""
        self.problems.append(f"{self._source_names[name]} takes {takes}; got {self._texts[name]!r}")

    def text(self, name: str) -> str:
        """The value as it was written, without blanks around it; the default where none was."""
        return self._texts[name]

    def flag(self, name: str) -> bool:
        """The value as yes or no; no for a wrong one."""
        return FLAGS.get(self._texts[name].lower(), False)

    def number(self, name: str, *, low: float, high: float = float("inf")) -> float | None:
        """The value as a number from `low` to `high`, inclusive; None for none, or a wrong one."""
        option = self._options[name]
        text = option.words.get(self._texts[name], self._texts[name])
        if not text:
            return None
        kind = "a whole number" if option.takes is int else "a number"
        if option.words:
            kind = f"{', '.join(option.words)} or {kind}"
        try:
            value: float = int(text) if option.takes is int else float(text)
        except ValueError:
            self.refuse(name, kind)
            return None
        if not low <= value <= high:
            bounds = f">= {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
            self.refuse(name, f"{kind} {bounds}")
            return None
        return value


def check_together(*readings: Callable[[], object]) -> None:
    """Call each; raise one `pytest.UsageError` with the texts of all that they raised."""
    problems: list[str] = []
    for reading in readings:
        try:
            reading()
        except pytest.UsageError as error:
            problems.append(str(error))
    if problems:
        raise pytest.UsageError("; ".join(problems))


def _text_of(config: pytest.Config, option: Option) -> str:
    value = config.getoption(option.key)
    if value is None:
        value = _ini_value(config, option.key)
    text = option.default if value is None else str(value).strip()
    return text if text or option.may_be_empty else option.default


def _source_name(config: pytest.Config, option: Option) -> str:
    """The option's name in the place that its value comes from: command line, or ini file."""
    return option.key if config.getoption(option.key) is None else f"--dcp-{option.name}"


def _ini_value(config: pytest.Config, key: str) -> object:
    """The value in the ini or TOML file, of any type; None when it has none.

    pytest 9.0 and 9.1 refuse a TOML file's 200 where a string was registered.
    """
    try:
        value: object = config.getini(key)
    except TypeError:
        from pytest_dcp._pytest_internals import toml_value

        value = toml_value(config, key)
    return value
