"""Whole pytest sessions, each in a process of its own: files in, reports out.

Enters: the files of a suite, most of them from `samples/`, and a command line. Leaves: a
`SessionResult` with every report of the session, its output, and the processes and files that
outlived it. A session that takes too long is killed with everything it started, and the caller gets
an AssertionError.

A session's processes are found by a token in their environment or on their command line, never by
way of the package under test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import psutil

from support.session_server import TOKEN_LENGTH, ForkedSession, start_session, starts_alike

SAMPLES = Path(__file__).parents[1] / "acceptance" / "samples"
GONE_S = 2.0
"""Processes of a session must be gone this long after its end."""
WITHIN_S = 240.0
"""Bounds a session that takes some ten seconds on an idle machine."""
BASETEMP = "basetemp"
EXPECTED_IN_TMPDIR = ("pytest-dcp-", "torchinductor_")
"""Prefixes of what may stay, and does not grow with the number of worlds: the lock files by which
pytest processes share the machine, and a folder that importing torch makes for its caches."""


@dataclass(frozen=True, slots=True)
class Report:
    """One report of the session, as its recorder wrote it down."""

    nodeid: str
    when: str
    """setup, call or teardown."""
    category: str
    """As the terminal counts it: passed, failed, error, skipped, xfailed, xpassed; or empty."""
    text: str
    """The failure as it is shown, or the reason of a skip."""
    path: str
    """Where the failure or the skip happened."""
    message: str
    """The line of the failure in the short summary."""
    xfail: str | None
    """The reason of an expected failure."""
    sections: tuple[tuple[str, str], ...]
    """Captured output: (title, text)."""
    properties: tuple[tuple[str, Any], ...]
    duration_s: float
    subtest: bool
    children: int | None
    """Processes below the session when a test had been set up; None after other phases."""
    pid: int
    """Of the process that made the report."""

    @property
    def headline(self) -> str:
        """The first line of what is shown."""
        return self.text.partition("\n")[0]


@dataclass(frozen=True, slots=True)
class SessionResult:
    """A session that ended."""

    folder: Path
    """Where its files are."""
    cwd: Path
    exit_code: int
    elapsed_s: float
    output: str = field(repr=False)
    """stdout and stderr."""
    collected: tuple[str, ...] = field(repr=False)
    """nodeids."""
    reports: tuple[Report, ...] = field(repr=False)
    """In the order in which they were made, those of subtests among them."""
    warnings: tuple[str, ...]
    """`Category: text`"""
    children: Mapping[str, int]
    """Processes below the session at the end of its `loop`, and at its `finish`."""
    pids: frozenset[int]
    """Of processes that recorded anything but notes."""
    notes: tuple[Mapping[str, Any], ...] = field(repr=False)
    """Notes of the suite's own code, also in ranks; see `session_recorder.note`."""
    left_running: tuple[str, ...]
    """Command lines of processes that outlived the session by `GONE_S`."""
    left_in_tmpdir: tuple[str, ...]

    def phases(self, test: str) -> dict[str, Report]:
        """The reports of a test, by phase; `test` is the end of its nodeid."""
        found = [r for r in self.reports if r.nodeid.endswith(f"::{test}") and not r.subtest]
        if not found:
            raise AssertionError(f"no report of {test!r}:\n{self.output[-5000:]}")
        return {report.when: report for report in found}

    def outcomes(self, test: str) -> dict[str, str]:
        """Phase -> category, of the phases that the terminal counts."""
        return {when: one.category for when, one in self.phases(test).items() if one.category}

    def bad(self, test: str) -> Report:
        """The last report of a test that is no pass: the failure or skip to look at."""
        counted = [r for r in self.phases(test).values() if r.category not in ("", "passed")]
        if not counted:
            raise AssertionError(f"{test!r} passed:\n{self.output[-5000:]}")
        return counted[-1]

    def noted(self, about: str) -> list[Mapping[str, Any]]:
        """The notes about one thing, in the order in which they were made."""
        return [note for note in self.notes if note["about"] == about]

    def repeated(self) -> list[tuple[str, str]]:
        """(nodeid, phase) of reports that were made more than once."""
        counts = Counter((r.nodeid, r.when) for r in self.reports if not r.subtest)
        return [key for key, times in counts.items() if times > 1]


@dataclass(frozen=True, slots=True)
class Suite:
    """A folder of files in which sessions can be run."""

    folder: Path

    def run(
        self,
        *args: str,
        cwd: str = ".",
        cache: bool = False,
        within_s: float = WITHIN_S,
        env: Mapping[str, str] = MappingProxyType({}),
        under: Sequence[str] = (),
        new_interpreter: bool = False,
    ) -> SessionResult:
        """`pytest *args` in `cwd` below the folder; waits for its end.

        The session has its own TMPDIR, and its basetemp is elsewhere, so that any file left in
        TMPDIR is a leak. `env` is added to the environment, and `under` are the interpreter's
        arguments before pytest's.

        The session is a fork of a process that has imported torch (see `session_server`), unless
        `new_interpreter` asks for a program of its own, or `env` or `under` need one.
        """
        run = self.prepare(cwd=cwd, cache=cache, env=env)
        started = time.monotonic()
        if new_interpreter or under or not starts_alike(env):
            exit_code = run.wait([sys.executable, *under, "-m", "pytest", *args], within_s)
        else:
            exit_code = run.wait_for_fork(args, within_s)
        return run.result(exit_code, time.monotonic() - started)

    def prepare(
        self,
        *,
        cwd: str = ".",
        cache: bool = False,
        env: Mapping[str, str] = MappingProxyType({}),
    ) -> _Run:
        """Prepare the session that `run` runs; see `live_session` for another way to run it."""
        run = _Run.prepare(self.folder, self.folder / cwd)
        options = ["-p", "no:randomly", "-p", "session_recorder"]
        options += [] if cache else ["-p", "no:cacheprovider"]
        run.env["PYTEST_ADDOPTS"] = " ".join([*options, f"--basetemp={run.basetemp}"])
        run.env.update(env)
        return run


class MakeSuite(Protocol):
    """`write_suite` in a new folder."""

    def __call__(self, files: Mapping[str, str], ini: str = "") -> Suite: ...


def write_suite(folder: Path, files: Mapping[str, str], ini: str = "") -> Suite:
    """A suite of `files`, name -> text, with a pytest.ini of its own.

    A text that names a file in `samples/` stands for that file's text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pytest.ini").write_text(f"[pytest]\n{ini}\n")
    for name, text in {"session_recorder.py": "session_recorder.py", **files}.items():
        sample = SAMPLES / text if "\n" not in text else None
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sample.read_text() if sample is not None else text)
    return Suite(folder)


@dataclass(frozen=True, slots=True)
class _Run:
    """One session: where it runs, and the token that marks its processes."""

    folder: Path
    cwd: Path
    private: Path
    token: str
    env: dict[str, str]

    @classmethod
    def prepare(cls, folder: Path, cwd: Path) -> _Run:
        token = str(uuid.uuid4().int).zfill(TOKEN_LENGTH)
        private = folder / f"session-{token[:8]}"
        (private / "tmp").mkdir(parents=True)
        cwd.mkdir(parents=True, exist_ok=True)
        # Variables that pytest would inherit: options, and (under tox) its cache; and Hypothesis,
        # which uses neither seeds nor a database in CI.
        inherited = ("PYTEST_", "TOX_", "__TOX_", "CI", "GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE")
        env = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
        env |= {
            "SESSION_TOKEN": token,
            "SESSION_RECORD": str(private / "record"),
            "TMPDIR": str(private / "tmp"),
            # `folder` comes after a broken copy of the package that a developer may put there.
            "PYTHONPATH": os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(folder)])),
            "COLUMNS": "200",
        }
        return cls(folder, cwd, private, token, env)

    @property
    def basetemp(self) -> Path:
        return self.private / BASETEMP

    def wait_for_fork(self, args: Sequence[str], within_s: float) -> int:
        """The exit code of `pytest *args`, forked; AssertionError when it is late."""
        with (self.private / "output").open("wb") as output:
            process = start_session(args, self.cwd, self.env, output.fileno())
        return self._wait(process, ["pytest", *args], within_s)

    def wait(self, command: Sequence[str], within_s: float) -> int:
        """The exit code of the command, run to its end; AssertionError when it is late."""
        with (self.private / "output").open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._wait(process, command, within_s)

    def _wait(
        self,
        process: subprocess.Popen[bytes] | ForkedSession,
        command: Sequence[str],
        within_s: float,
    ) -> int:
        try:
            return process.wait(within_s)
        except subprocess.TimeoutExpired as exc:
            output = self.output()[-5000:]
            raise AssertionError(f"{command} did not end in {within_s:g} s:\n{output}") from exc
        finally:
            if process.poll() is None:
                self.kill_left()
                process.wait()

    def output(self) -> str:
        return (self.private / "output").read_text(errors="replace")

    def kill_left(self) -> None:
        for process in self.processes():
            process.kill()

    def processes(self) -> list[psutil.Process]:
        """Processes with the session's token."""
        return [process for process in psutil.process_iter() if _has_token(process, self.token)]

    def left_after(self, wait_s: float) -> tuple[str, ...]:
        """Command lines of what still runs after `wait_s`; it is killed."""
        deadline = time.monotonic() + wait_s
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        commands = tuple(_command(process) for process in self.processes())
        self.kill_left()
        return commands

    def result(self, exit_code: int, elapsed_s: float) -> SessionResult:
        """Collect the session's records, and the processes and files that it left."""
        left_running = self.left_after(GONE_S)
        records = [json.loads(line) for line in self._record_lines()]
        in_tmpdir = (path.name for path in (self.private / "tmp").iterdir())
        return SessionResult(
            folder=self.folder,
            cwd=self.cwd,
            exit_code=exit_code,
            elapsed_s=elapsed_s,
            output=self.output(),
            collected=tuple(n for r in _of(records, "collected") for n in r["nodeids"]),
            reports=tuple(_report(record) for record in _of(records, "report")),
            warnings=tuple(record["text"] for record in _of(records, "warning")),
            children={k: r["children"] for k in ("loop", "finish") for r in _of(records, k)},
            pids=frozenset(record["pid"] for record in records if record["kind"] != "note"),
            notes=tuple(_of(records, "note")),
            left_running=left_running,
            left_in_tmpdir=tuple(n for n in in_tmpdir if not n.startswith(EXPECTED_IN_TMPDIR)),
        )

    def _record_lines(self) -> list[str]:
        path = self.private / "record"
        return path.read_text().splitlines() if path.exists() else []


def _of(records: Iterable[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    return (record for record in records if record["kind"] == kind)


def _report(record: Mapping[str, Any]) -> Report:
    facts = {key: value for key, value in record.items() if key != "kind"}
    for name in ("sections", "properties"):
        facts[name] = tuple(tuple(pair) for pair in facts[name])
    return Report(**facts)


def _has_token(process: psutil.Process, token: str) -> bool:
    try:
        if process.environ().get("SESSION_TOKEN") == token:
            return True
        return any(token in word for word in process.cmdline())
    except psutil.Error:  # it ended, or is another user's
        return False


def _command(process: psutil.Process) -> str:
    try:
        return f"{process.pid} ({' '.join(process.cmdline()) or process.name()})"
    except psutil.Error:
        return f"{process.pid} (gone)"
