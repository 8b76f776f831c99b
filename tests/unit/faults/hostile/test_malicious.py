"""Malicious pickles: no code of theirs runs in our loads, and it does in those of the careless."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.utils.serialization.config  # noqa: F401 - torch.load imports it at its first call
from torch.distributed.checkpoint.filesystem import FileSystemReader as TorchReader
from torch.distributed.checkpoint.state_dict_loader import load as torch_load

from pytest_dcp.faults import Hostile, malicious_pickles, memory_bombs
from support.forks import forked, limited
from support.loads import blank, ending, load, load_rank, save

CASES_AT_LEAST = 2500


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("good") / "checkpoint")


@pytest.fixture(scope="module")
def canary() -> Iterator[Path]:
    """A path that is free, and short enough for a socket."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "canary"


@pytest.fixture(scope="module")
def cases(good: Path, canary: Path) -> list[Hostile]:
    return list(malicious_pickles(good, canary))


def sang(canary: Path) -> bool:
    """Whether the canary was there; it is gone then."""
    if not os.path.lexists(canary):
        return False
    if canary.is_dir() and not canary.is_symlink():
        shutil.rmtree(canary)
    else:
        canary.unlink()
    return True


OWN_ERRORS = {
    *(("pytest_dcp.errors", name) for name in ("_rebuild_corrupt", "CheckpointCorruptError")),
    ("pytest_dcp.errors", "UntrustedPickleError"),
    ("pytest_dcp._engine.unpickle.machine", "UnknownGlobalError"),
}
"""Classes that a failing load unpickles: its own error, to see whether it can be sent to other
ranks."""


OF_TRACEBACKS = {"tb_frame", "f_code"}
"""Attributes that are read when a traceback is quoted."""


class Audit:
    """Python's audit events since the last call: their names, and files opened outside the
    folder."""

    def __init__(self) -> None:
        self.usual: set[str] = set()
        self.folder: Path | None = None
        """Files in it may be opened for reading; None: events are ignored."""
        self.seen: list[str] = []
        sys.addaudithook(self._see)

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open" and not self._is_harmless(*args):
            self.seen.append(f"open{args!r}")
        elif event == "pickle.find_class":
            if args not in OWN_ERRORS:
                self.seen.append(f"{event}{args!r:.200}")
        elif event == "object.__getattr__":
            if args[1] not in OF_TRACEBACKS:
                self.seen.append(f"{event}{args!r:.200}")
        elif event not in self.usual:
            self.seen.append(f"{event}{args!r:.200}")

    def _is_harmless(self, path: object, mode: object, flags: int) -> bool:
        name = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]  # a path
        # Tracebacks quote their sources.
        known = name.startswith(f"{self.folder}") or name.endswith(".py")
        return known and not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)

    def of(self, act: Callable[[], Any], folder: Path) -> tuple[Any, list[str]]:
        """The result of the act, and the unusual events during it."""
        self.seen, self.folder = [], folder
        try:
            result = act()
        finally:
            self.folder = None
        return result, self.seen


def test_no_code_runs_in_our_loads(
    good: Path, cases: list[Hostile], canary: Path, tmp_path: Path
) -> None:
    """In a fork: an audit hook stays for ever."""

    def body(begin: Callable[[str], None]) -> dict[str, str]:
        audit = Audit()
        # Events of a load of a good checkpoint are no escapes.
        for one in (load, load):
            _, seen = audit.of(lambda one=one: ending(one, good), good)
        audit.usual = {event.partition("(")[0] for event in seen}
        escapes: dict[str, str] = {}
        for number, case in enumerate(cases):
            begin(case.name)
            made = case.make(tmp_path / str(number))
            one = load_rank if "rank 0" in case.name else load
            with limited(10):
                how, seen = audit.of(lambda one=one, made=made: ending(one, made), made)
            if how != "refused" or seen or sang(canary):
                escapes[case.name] = f"{how} {seen}"
            shutil.rmtree(made)
        return escapes

    escapes = forked(body)
    places = Counter(case.name.rpartition(" protocol ")[2][3:] for case in cases)
    print(f"{len(cases)} malicious pickles under an audit hook, {len(escapes)} escapes; {places}")
    assert len(cases) >= CASES_AT_LEAST
    assert escapes == {}


def caught(
    cases: list[Hostile], canary: Path, folder: Path, read: Callable[[Path], object]
) -> list[str]:
    """The cases whose code runs when `read` reads them, in a fork."""

    def body(begin: Callable[[str], None]) -> list[str]:
        found = []
        warnings.simplefilter("ignore")
        for number, case in enumerate(cases):
            begin(case.name)
            try:
                read(case.make(folder / str(number)))
            except BaseException as error:  # noqa: BLE001 - most fail once the code has run
                del error
            if sang(canary):
                found.append(case.name)
        return found

    names: list[str] = forked(body, 8 << 30)
    return names


def test_every_gadget_works_on_stock_pickle(
    cases: list[Hostile], canary: Path, tmp_path: Path
) -> None:
    whole = [case for case in cases if case.name.endswith("as .metadata")]
    # Gadgets that start a program are tried once.
    slow = ("subprocess", "system", "collect_env", "commands")
    tried = [case for case in whole if "protocol 2" in case.name or not case.name.startswith(slow)]

    def read(folder: Path) -> None:
        with (folder / ".metadata").open("rb") as file:
            pickle.load(file)

    assert caught(tried, canary, tmp_path, read) == [case.name for case in tried]


def test_torchs_own_reader_is_caught_wherever_it_trusts(
    cases: list[Hostile], canary: Path, tmp_path: Path
) -> None:
    some = [case for case in cases if case.name.startswith(("os.mkdir, protocol 2", "INST, pro"))]

    def read(folder: Path) -> None:
        if (folder / ".metadata").exists():
            torch_load(blank(), checkpoint_id=folder)
        else:
            TorchReader(folder).read_metadata(rank=0)

    held = {case.name for case in some} - set(caught(some, canary, tmp_path, read))
    assert held == {case.name for case in some if "the pickle of a tensor" in case.name}


ALLOWED = {
    *(("builtins", name) for name in ("bytearray", "list", "range", "set")),
    *(("_codecs", "encode"), ("torch", "Size"), ("collections", "OrderedDict")),
}


class OnlyAllowed(pickle.Unpickler):
    """Takes a list of names for safe, as many do."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def test_every_bomb_goes_off_behind_a_list_of_allowed_names(good: Path, tmp_path: Path) -> None:
    bombs = [case for case in memory_bombs(good) if case.name.endswith("as .metadata")]

    def body(begin: Callable[[str], None]) -> list[str]:
        duds = []
        for number, case in enumerate(bombs):
            begin(case.name)
            made = case.make(tmp_path / str(number))
            try:
                with (made / ".metadata").open("rb") as file:
                    OnlyAllowed(file).load()
            except MemoryError:
                continue
            duds.append(case.name)
        return duds

    assert len(bombs) >= 9
    assert forked(body, 256 << 20) == []


def test_a_list_of_allowed_names_stops_code(
    cases: list[Hostile], canary: Path, tmp_path: Path
) -> None:
    some = [case for case in cases if "protocol 4, as .metadata" in case.name]

    def read(folder: Path) -> None:
        with (folder / ".metadata").open("rb") as file:
            OnlyAllowed(file).load()

    assert caught(some, canary, tmp_path, read) == []


def test_no_two_have_one_name(cases: list[Hostile]) -> None:
    assert len({case.name for case in cases}) == len(cases)
