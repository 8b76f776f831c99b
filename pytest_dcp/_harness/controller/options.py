"""The command line's and the ini file's say: options -> `Options`. Each option has an ini twin.

Light on purpose: this is imported by every session, also one without a single world.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from pytest_dcp._harness.protocol.world_spec import BACKENDS, MAX_WORLD_SIZE, Defaults

ReportRanks = Literal["all", "failed", "first"]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a session, checked."""

    marker: str
    """The marker's name; empty: the plugin leaves every marker alone."""
    launch: str
    """auto, fork or spawn."""
    defaults: Defaults
    grace_s: float
    """How long the peers of a failed rank may go on."""
    report_ranks: ReportRanks
    pdb_rank: int | None
    """None: the first that asks."""
    require_gpus: bool
    max_procs: int
    """Rank processes at a time on this machine, over all sessions; 0: by the number of cores."""
    output_limit_bytes: int
    """Captured output of one rank in one phase; more is a failure."""
    seed: int | None
    fault_budget: int
    """Crash states at most that are tried of one trace."""
    fault_replay: str
    """The id of the one crash state to try; empty: all."""


@dataclass(frozen=True, slots=True)
class _Option:
    name: str
    """--dcp-<name>; the ini twin has underscores."""
    default: str
    help: str
    choices: tuple[str, ...] = ()
    takes: type[str] | type[int] | type[float] | type[bool] = str
    """What a TOML file may give, beside a string; a bool is a flag on the command line."""

    @property
    def key(self) -> str:
        """The name in an ini file, and of the parsed command line's attribute."""
        return f"dcp_{self.name.replace('-', '_')}"


OPTIONS = (
    _Option("marker", "world_size", "name of the marker that runs a test in a world; empty: none"),
    _Option("launch", "auto", "how ranks are started", ("auto", "fork", "spawn")),
    _Option("world-size", "", "run every world with this many ranks", takes=int),
    _Option("backend", "auto", "backend of worlds whose marker names none", BACKENDS),
    _Option(
        "timeout",
        "120",
        "seconds from all ranks ready to the end of teardown; 0: no limit",
        takes=float,
    ),
    _Option("grace", "1", "seconds that the peers of a failed rank may go on", takes=float),
    _Option("report-ranks", "all", "whose output a report shows", ("all", "failed", "first")),
    _Option(
        "pdb-rank",
        "first",
        "the rank that gets the terminal for pdb; first: who asks first",
        takes=int,
    ),
    _Option("require-gpus", "", "fail, not skip, a test whose GPUs are missing", takes=bool),
    _Option(
        "max-procs", "0", "rank processes at a time on this machine; 0: by its cores", takes=int
    ),
    _Option("output-limit", "256", "MiB that one rank may print in one phase", takes=float),
    _Option("seed", "", "seed of every rank; by default from the test's name", takes=int),
    _Option(
        "fault-budget",
        "pr",
        "crash states to try of one trace: pr, nightly or a number",
        takes=int,
    ),
    _Option("fault-replay", "", "try only the crash state of this id"),
)


def add_options(parser: pytest.Parser) -> None:
    """Register all options and their ini twins."""
    group = parser.getgroup("dcp", "worlds of ranks (pytest_dcp)")
    for option in OPTIONS:
        kwargs: dict[str, Any] = {"dest": option.key, "default": None}
        if option.takes is bool:
            kwargs |= {"action": "store_const", "const": "true"}
        elif option.choices:
            kwargs["choices"] = option.choices
        else:
            kwargs["metavar"] = option.name.rpartition("-")[2].upper()
        shown = f" (default: {option.default})" if option.default else ""
        group.addoption(f"--dcp-{option.name}", help=option.help + shown, **kwargs)
        kind = _ini_type(option.takes)
        help_ = f"{option.help}; as --dcp-{option.name}"
        parser.addini(option.key, help_, type=kind, default=None)


def _ini_type(takes: type[Any]) -> Any:
    """The type that pytest is given for an ini option: a string, or what `takes` names.

    Strings come first, so that an ini file's text reaches `read_options` as it was written. pytest
    has known unions since 9.2; what older ones do is in `_ini_value`.
    """
    return str | takes if takes is not str and pytest.version_tuple >= (9, 2) else "string"


def read_options(config: pytest.Config) -> Options:
    """The session's options. Raises `pytest.UsageError` naming every wrong one."""
    raw = {option.name: _value(config, option) for option in OPTIONS}
    reader = _Reader(raw, {option.name: _given_as(config, option) for option in OPTIONS})
    for option in OPTIONS:
        if option.choices and raw[option.name] not in option.choices:
            reader.refuse(option.name, ", ".join(option.choices))
        if option.takes is bool and raw[option.name].lower() not in FLAGS:
            reader.refuse(option.name, "true or false")
    if raw["marker"] and not raw["marker"].isidentifier():
        reader.refuse("marker", "a name such as world_size")
    world_size = reader.number("world-size", low=1, high=MAX_WORLD_SIZE)
    timeout = reader.number("timeout", low=0) or float("inf")
    grace = reader.number("grace", low=0)
    output = reader.number("output-limit", low=0, high=1e6)
    max_procs = reader.number("max-procs", low=0)
    seed = reader.number("seed", low=0, high=2**63 - 1)
    raw["fault-budget"] = FAULT_BUDGETS.get(raw["fault-budget"], raw["fault-budget"])
    fault_budget = reader.number("fault-budget", low=1)
    pdb_rank = None
    if raw["pdb-rank"] != "first":
        pdb_rank = reader.number("pdb-rank", low=0)
    if reader.problems:
        raise pytest.UsageError("; ".join(reader.problems))
    return Options(
        marker=raw["marker"],
        launch=raw["launch"],
        defaults=Defaults(
            backend=raw["backend"],
            timeout_s=float(timeout),
            world_size=None if world_size is None else int(world_size),
        ),
        grace_s=float(grace or 0),
        report_ranks=raw["report-ranks"],  # type: ignore[arg-type]  # checked above
        pdb_rank=None if pdb_rank is None else int(pdb_rank),
        require_gpus=FLAGS[raw["require-gpus"].lower()],
        max_procs=int(max_procs or 0),
        output_limit_bytes=int((output or 0) * 2**20),
        seed=None if seed is None else int(seed),
        fault_budget=int(fault_budget or 0),
        fault_replay=raw["fault-replay"],
    )


def _value(config: pytest.Config, option: _Option) -> str:
    given = config.getoption(option.key)
    if given is None:
        given = _ini_value(config, option.key)
    text = option.default if given is None else str(given).strip()
    # Only the marker has a use for nothing; elsewhere it is an option left blank.
    return text if text or option.name == "marker" else option.default


def _given_as(config: pytest.Config, option: _Option) -> str:
    """The option's name in the place that its value comes from: command line, or ini file."""
    return option.key if config.getoption(option.key) is None else f"--dcp-{option.name}"


def _ini_value(config: pytest.Config, key: str) -> object:
    """What the ini or TOML file says, of whatever type; None when it says nothing.

    pytest 9.0 and 9.1 refuse a TOML file's 200 where a string was registered, and have no type for
    both. The second way can go when they are no longer supported.
    """
    try:
        value: object = config.getini(key)
    except TypeError:
        private: Any = config
        value = private._inicfg[key].value
    return value


FLAGS = {
    "": False, "false": False, "0": False, "no": False, "off": False,
    "true": True, "1": True, "yes": True, "on": True,
}  # fmt: skip
"""What an ini file may say for an option that is given or not."""
INTEGERS = frozenset(option.name for option in OPTIONS if option.takes is int)
FAULT_BUDGETS = {"pr": "1000", "nightly": "100000"}
"""Names of budgets: about a second, and about two minutes, for a small checkpoint."""


class _Reader:
    """Reads values of options, and gathers what is wrong with them."""

    def __init__(self, raw: Mapping[str, str], given_as: Mapping[str, str]) -> None:
        self.problems: list[str] = []
        self._raw = raw
        self._given_as = given_as
        """By option, its name where its value was written."""

    def refuse(self, name: str, takes: str) -> None:
        """Note that an option `takes` something else."""
        self.problems.append(f"{self._given_as[name]} takes {takes}; got {self._raw[name]!r}")

    def number(self, name: str, *, low: float, high: float = float("inf")) -> float | None:
        """The value as a number from `low` to `high`, inclusive; None for none, or a wrong one."""
        text = self._raw[name]
        if not text:
            return None
        kind = "a whole number" if name in INTEGERS else "a number"
        if name == "fault-budget":
            kind = f"{', '.join(FAULT_BUDGETS)} or {kind}"
        try:
            value: float = int(text) if name in INTEGERS else float(text)
        except ValueError:
            self.refuse(name, kind)
            return None
        if not low <= value <= high:
            bounds = f">= {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
            self.refuse(name, f"{kind} {bounds}")
            return None
        return value


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
