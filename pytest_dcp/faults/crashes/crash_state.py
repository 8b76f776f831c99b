"""The public face of crash states: a recorded block, the states it allows, and the check that they
load.

with faulty_storage.record() as trace:
    dcp.save(new, checkpoint_id=folder)
for state in trace.crash_states(model="posix"):
    faulty_storage.assert_loads_one_of(state, old, new)
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_dcp.api import announce_failure, current_rank
from pytest_dcp.errors import RecordingError
from pytest_dcp.faults.crash_models import Model
from pytest_dcp.faults.crashes import folder_trees as replay
from pytest_dcp.faults.crashes.enumerate import Crash, crashes
from pytest_dcp.faults.crashes.loaders import (
    NO_VERDICT,
    Finished,
    Load,
    check_signature,
    is_own_mistake,
    is_refusal,
)
from pytest_dcp.faults.crashes.recording import Desk, Folders, Recorded, recording
from pytest_dcp.faults.options import FAULT_BUDGETS
from pytest_dcp.faults.state_differences import blank, differences
from pytest_dcp.faults.tap.operation import Operation
from pytest_dcp.tracebacks import add_note, set_cause

State = dict[str, Any]

REPLAYED, PASSED_OVER = "replayed", "passed-over"
"""Names of files in the ranks' folder, which say that some rank got the state to replay, or not."""


@dataclass(frozen=True, slots=True)
class Search:
    """The session's options for crash states, and whether the test has tried the one to replay."""

    budget: int = int(FAULT_BUDGETS["pr"])
    """Maximum number of states tried per trace."""
    replay: str | None = None
    """The id of the only state to try."""
    folder: Path | None = None
    """Where the ranks of a world note what they tried; None: not to be noted."""

    def note_states(self, count: int) -> None:
        """Note that this rank's test asked for crash states, and how many it got."""
        if self.replay is not None and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / (REPLAYED if count else PASSED_OVER)).touch()

    def has_replayed(self) -> bool | None:
        """Whether a rank tried the state to replay; None if no rank asked for states.

        The same in all ranks once every rank has ended the test's call.
        """
        notes = set() if self.folder is None else {path.name for path in self.folder.glob("*")}
        return True if REPLAYED in notes else False if PASSED_OVER in notes else None

    def limit(self, budget: str | int | None) -> int:
        """Maximum number of states. Raises ValueError if the option is not a budget."""
        if budget is None:
            return self.budget
        text = FAULT_BUDGETS.get(str(budget), str(budget))
        if not text.isdecimal() or int(text) < 1:
            names = ", ".join(FAULT_BUDGETS)
            raise ValueError(f"a budget of crash states is {names} or a number; got {text!r}")
        return int(text)


class CrashState:
    """A folder that a crash could leave."""

    def __init__(self, crash: Crash, finished: Finished | None = None) -> None:
        self._crash = crash
        self.finished = finished
        """The finished folder, on which a caller's loader is tried first; None without a recording.
        """

    @property
    def id(self) -> str:
        """Replays it: `--dcp-fault-replay=ID`."""
        return self._crash.id

    @property
    def model(self) -> Model:
        """The kind of crash and file system."""
        return self._crash.model

    @property
    def what(self) -> str:
        """For people: when the crash came, and what it lost."""
        return self._crash.what

    @property
    def done(self) -> int:
        """Operations done before the crash."""
        return self._crash.operation_count

    @property
    def returned(self) -> frozenset[int]:
        """Ranks whose recorded block had ended."""
        return self._crash.returned

    @property
    def files(self) -> dict[str, bytes]:
        """The files' bytes by path."""
        return {p: entry for p, entry in self._crash.tree.items() if isinstance(entry, bytes)}

    def restored(self) -> replay.RestoredFolder:
        """A fresh folder in this state; a test may change it.

        Pass it as a path, or open it: `with state.restored() as folder` gives a `Path` until the
        block ends. Without a block the folder lasts as long as the returned object.
        """
        return replay.restore_tree(self._crash.tree)

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<{self.id}: {self.what}>"


class Recording(Recorded):
    """A block whose operations are recorded; see `FaultyStorage.record`."""

    def __init__(self, search: Search | None = None, *, of_watched_folders: bool = False) -> None:
        """of_watched_folders: the block is expected to change one of them."""
        super().__init__()
        self._search = search or Search()
        self._of_watched_folders = of_watched_folders
        self._finished: Finished | None = None

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Operations of all ranks that change a folder or make it durable, in the order in which
        they ended.
        """
        return self.trace.operations

    def crash_states(
        self, model: Model = "posix", budget: str | int | None = None
    ) -> list[CrashState]:
        """Each distinct folder that a crash could leave, simplest crashes first.

        budget: pr, nightly or a number; by default the value of `--dcp-fault-budget`. With
        `--dcp-fault-replay`, only the state with that id; a test in which no rank finds it is
        skipped at its end.

        Raises RecordingError if the block changed no watched folder: the states would then be about
        other code than the block's.
        """
        if self._of_watched_folders and not self.operations:
            raise RecordingError(
                "nothing was recorded: no watched folder was changed. checkpoint_dir is watched "
                "from the start; faulty_storage.watch(folder) adds another"
            )
        only = self._search.replay
        found: list[Crash] = []
        if only is None or only.startswith(f"{model}-"):
            found = [*crashes(self.trace, model, self._search.limit(budget), only)]
        self._search.note_states(len(found))
        if self._finished is None:
            self._finished = Finished(self.trace)
        return [CrashState(crash, self._finished) for crash in found]


def recorded(
    workload: Callable[[Path], object], prepare: Callable[[Path], object] = lambda folder: None
) -> Recording:
    """Record what a function does to an empty folder, which is removed afterwards.

    For `pytest.mark.parametrize("state", recorded(workload).crash_states(budget=99), ids=str)`.
    prepare: called first; its operations are not recorded.

    >>> def save(folder):
    ...     (folder / "state.tmp").write_text("new")
    ...     (folder / "state.tmp").rename(folder / "state")
    >>> def old_state(folder):
    ...     (folder / "state").write_text("old")
    >>> states = recorded(save, old_state).crash_states("posix", budget=99)
    >>> {state.files["state"] for state in states} == {b"old", b"new", b"", bytes(3)}
    True

    One without the bytes: the rename reached the disk, the write did not. `restored` makes it:

    >>> empty = next(state for state in states if state.files["state"] == b"")
    >>> "its bytes lost: write state.tmp" in empty.what
    True
    >>> with empty.restored() as folder:
    ...     (folder / "state").read_text()
    ''
    """
    result = Recording()
    with tempfile.TemporaryDirectory(prefix="dcp-recorded-") as place:
        folder = Path(place, "folder")
        folder.mkdir()
        prepare(folder)
        with recording(Folders([folder]), Desk(Path(place)), result):
            workload(folder)
    return result


def recording_dir(place: Path, rank: int) -> Desk:
    """The desk of this process, in a world shared with its peers.

    place: a folder that every rank can reach and no rank watches.
    """
    world = current_rank()
    return Desk(place, rank) if world is None else Desk(place, rank, world.meet, announce_failure)


def loads_one_of(
    state: CrashState, old: State | None, new: State, load: Load | None = None, **keywords: Any
) -> Literal["old", "new", "nothing"]:
    """Which of the two states the folder holds completely; "nothing" if `old` is None and the
    folder holds no checkpoint.

    old: None where there was no checkpoint before. load: called like `dcp.load`, which is the
    default.

    Raises AssertionError if it holds neither, or if the recorded block had ended in some rank and
    it does not hold the new one. An exception of `load` that says nothing about the folder is
    raised unchanged (see `loaders`).
    """
    from torch.distributed.checkpoint.api import CheckpointException

    load, keywords = _choose_loader(state, new, load, keywords)
    problems: list[str] = []
    refusal: BaseException | None = None
    with state.restored() as folder:
        for likeness in (new,) if old is None else (new, old):
            actual = blank(likeness)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    load(actual, checkpoint_id=folder, **keywords)
            # torch's CheckpointException is no Exception
            except (Exception, CheckpointException) as error:
                passes = old is None and not state.returned
                if is_own_mistake(error) or (passes and not is_refusal(error, str(folder))):
                    add_note(error, NO_VERDICT)
                    raise
                problems.append(f"{type(error).__name__}: {error}")
                refusal = error
                continue
            unlike = next(differences(actual, new), None)
            if unlike is None:
                return "new"
            if old is not None and not state.returned and not any(differences(actual, old)):
                return "old"
            problems.append(unlike)
    if old is None and refusal is not None and not state.returned:
        return "nothing"
    broken = AssertionError(_describe_broken(state, problems))
    set_cause(broken, refusal)
    raise broken


def _choose_loader(
    state: CrashState, new: State, load: Load | None, keywords: dict[str, Any]
) -> tuple[Load, dict[str, Any]]:
    """The loader to try and its keywords: `dcp.load`, or the caller's, tried on the finished folder
    first.
    """
    if load is None:
        from pytest_dcp.checkpoint import load as load_

        return load_, {"no_dist": True} | keywords
    check_signature(load, keywords)
    if state.finished is not None:
        state.finished.prove(load, new, keywords)
    return load, keywords


def _describe_broken(state: CrashState, problems: Sequence[str]) -> str:
    if len({*problems}) == 1:  # neither state could be loaded, for one reason
        problems = problems[:1]
    expectation = "the new state alone, which had been saved" if state.returned else "old or new"
    return (
        f"{state!r}: expected {expectation}; got {'; '.join(problems)}\n"
        f"replay it with --dcp-fault-replay={state.id}"
    )
