"""Ranks killed (SIGKILL) at random instants of a save: old or new, and named in time.

Each kill has a world of its own, of three processes that this one forks, and an instant drawn from
a little more than the duration of such a save. Survivors must get an error with the rank's number,
or finish; the folder must hold the whole old checkpoint or the whole new one, and the new one if a
survivor's save returned. The profile `nightly` kills 1,000 times.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from torch.distributed import FileStore  # type: ignore[attr-defined] # re-exported by torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.background import process as async_process
from pytest_dcp.checkpoint.state_dict_saver import AsyncCheckpointerType

pytestmark = pytest.mark.filterwarnings("ignore")

RANKS = 3
HEARD_S = 30.0
"""Far below the group's timeout, which is half an hour."""
LIMIT_S = 120
ELEMENTS = 20_000
IS_NIGHTLY = settings().max_examples >= 10_000

State = dict[str, Any]


def state_of(fill: float) -> State:
    return {f"w{rank}": torch.full((ELEMENTS,), fill) for rank in range(RANKS)}


def part_of(rank: int, fill: float) -> State:
    """One rank's part of the state; all ranks have the first tensor."""
    return {key: value for key, value in state_of(fill).items() if key in ("w0", f"w{rank}")}


def save_in_thread(state: State, folder: Path) -> None:
    dcp.async_save(state, checkpoint_id=folder).result(LIMIT_S)  # type: ignore[union-attr]


def save_in_process(state: State, folder: Path) -> None:
    kind = AsyncCheckpointerType.PROCESS
    begun: Any = dcp.async_save(state, checkpoint_id=folder, async_checkpointer_type=kind)
    begun.result(LIMIT_S)


def save_to_hugging_face(state: State, folder: Path) -> None:
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(state, storage_writer=writer)


def load(state: State, folder: Path) -> None:
    dcp.load(state, checkpoint_id=folder, no_dist=True)


def load_hugging_face(state: State, folder: Path) -> None:
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(state, storage_reader=reader, no_dist=True)


@dataclass(frozen=True)
class Mode:
    """A way to save, and when it is cut off."""

    save: Callable[[State, Path], object]
    load: Callable[[State, Path], object]
    lasts_s: float
    """About as long as the save: kills are drawn up to half as much again."""
    sample: int
    """Kills when tests are run daily."""
    nightly: int
    old: bool = True
    """Whether there is a checkpoint before; if not, the save is the group's first operation: some
    ranks are killed before they have called it."""


def dcp_save(state: State, folder: Path) -> None:
    dcp.save(state, checkpoint_id=folder)


MODES = {
    "save": Mode(dcp_save, load, 0.03, 3, 250),
    "thread": Mode(save_in_thread, load, 0.03, 3, 250),
    "hugging face": Mode(save_to_hugging_face, load_hugging_face, 0.03, 3, 200),
    "first operation": Mode(dcp_save, load, 0.05, 3, 200, old=False),
    "process": Mode(save_in_process, load, 0.06, 1, 100),
}


def run_rank(mode: Mode, rank: int, place: Path, ready: int, go: int) -> None:
    """Run one rank and write its result to a file.

    It reports that it is ready, and goes on when it reads a byte from `go`.
    """
    # If it hangs, print the stacks and end. faulthandler's own timer cannot be used: it would wait
    # for the timer thread that pytest started, which a fork lacks.
    faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)
    signal.alarm(2 * LIMIT_S)
    torch.set_num_threads(1)
    folder = place / "checkpoint"
    store = FileStore(str(place / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    if mode.old:
        mode.save(part_of(rank, 1.0), folder)
    dist.barrier()
    os.write(ready, b"!")
    assert os.read(go, 1)
    told: dict[str, Any] = {"error": None}
    try:
        mode.save(part_of(rank, 2.0), folder)
    except dcp.CheckpointException as error:
        told["error"] = str(error)
        told["named"] = sorted(error.failures)
    told["ended_s"] = time.monotonic()
    (place / f"told-{rank}").write_text(json.dumps(told))
    time.sleep(0.3)  # others may still receive the last step's result


@contextmanager
def forked_ranks(mode: Mode, place: Path) -> Iterator[tuple[list[int], int]]:
    """The ids of processes that are ready to save, and a pipe: one byte for each, and they do."""
    children: list[int] = []
    pipes: list[int] = []
    go, going = os.pipe()
    for rank in range(RANKS):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                run_rank(mode, rank, place, writing, go)
                code = 0
            except BaseException:  # noqa: BLE001 - told by the exit code, and in the output
                traceback.print_exc()
            os._exit(code)
        os.close(writing)
        children.append(child)
        pipes.append(reading)
    try:
        for pipe in pipes:
            assert os.read(pipe, 1), "a rank ended before it began to save"
        yield children, going
    finally:
        for pipe in (*pipes, go, going):
            os.close(pipe)
        for child in children:
            with_kill(child)


def with_kill(child: int) -> None:
    """End a child that may have been reaped."""
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def wait_for_end(child: int) -> int:
    until_s = time.monotonic() + 3 * LIMIT_S
    while time.monotonic() < until_s:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    raise TimeoutError(f"process {child} did not end")


@dataclass(frozen=True)
class Killed:
    """The result of one kill."""

    found: str
    """The checkpoint that the folder holds."""
    heard: str
    """The survivors' result: done, or the error names the killed rank."""
    heard_s: float
    """The slowest survivor's end after the kill; 0 where all were done before."""


def kill_one(mode: Mode, place: Path, chance: random.Random) -> Killed:
    victim = chance.randrange(RANKS)
    delay_s = chance.uniform(0, 1.5 * mode.lasts_s)
    with forked_ranks(mode, place) as (children, going):
        os.write(going, b"!" * RANKS)
        time.sleep(delay_s)
        killed_s = time.monotonic()
        os.kill(children[victim], signal.SIGKILL)
        statuses = [wait_for_end(child) for child in children]
    survivors = [rank for rank in range(RANKS) if rank != victim]
    instant = f"rank {victim} killed after {delay_s * 1e3:.2f} ms"
    assert [statuses[rank] for rank in survivors] == [0, 0], f"{instant}: survivors {statuses}"
    told = [json.loads((place / f"told-{rank}").read_text()) for rank in survivors]
    where = f"{instant}: {told}"
    for one in told:
        assert one["error"] is None or victim in one["named"], where
        assert one["error"] is None or f"rank {victim}" in one["error"], where
    late_s = max(one["ended_s"] for one in told) - killed_s
    assert late_s < HEARD_S, where
    done = [one["error"] is None for one in told]
    found = found_in(mode, place / "checkpoint")
    assert found == "new" or not any(done), where
    assert found in (("old", "new") if mode.old else ("nothing", "new")), where
    heard = "done" if all(done) else "named" if not any(done) else "both"
    return Killed(found, heard, max(late_s, 0.0))


def found_in(mode: Mode, folder: Path) -> str:
    target = state_of(-1.0)
    try:
        mode.load(target, folder)
    except dcp.CheckpointException:
        return "nothing"
    fills = torch.cat(list(target.values())).unique().tolist()
    return {1.0: "old", 2.0: "new"}[fills[0]] if len(fills) == 1 else f"a mixture: {fills}"


@pytest.mark.parametrize("name", MODES)
def test_a_rank_killed_at_any_instant_is_named_and_leaves_the_old_or_the_new(
    tmp_path: Path, name: str
) -> None:
    mode = MODES[name]
    chance = random.Random(2026)
    outcomes: Counter[str] = Counter()
    slowest_s = 0.0
    for number in range(mode.nightly if IS_NIGHTLY else mode.sample):
        place = tmp_path / str(number)
        place.mkdir()
        killed = kill_one(mode, place, chance)
        outcomes[f"{killed.found}, {killed.heard}"] += 1
        slowest_s = max(slowest_s, killed.heard_s)
    print(f"kills in {name}: {dict(outcomes)}, survivors were done {slowest_s:.2f} s after at most")


HARMLESS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGSTOP,
    signal.SIGWINCH,
    signal.SIGURG,
)
"""Ctrl-C and a scheduler's signals are the rank's; a stopped process goes on a moment later."""
DEADLY = (signal.SIGKILL, signal.SIGHUP, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF)
SIGNALS = 100 if IS_NIGHTLY else 3


def send(pid: int, number: int, after_s: float) -> None:
    time.sleep(after_s)
    try:
        os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(0.1)
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return


def process_of_this_rank() -> int:
    assert dist.group.WORLD is not None
    line = async_process._savers[dist.group.WORLD]._line
    assert line is not None
    return line.process.pid


@pytest.mark.world_size(2, timeout=3600)
def test_a_signal_to_a_background_process_at_any_instant_is_borne_or_named(
    checkpoint_dir: Path, rank: int
) -> None:
    """All ranks draw the same victims, signals and instants."""
    chance, fill = random.Random(14), 0.0
    save_in_process(part_of(rank, fill), checkpoint_dir)
    outcomes: Counter[str] = Counter()
    for number in range(SIGNALS):
        victim = chance.randrange(2)
        sent = chance.choice(DEADLY if number % 3 == 2 else HARMLESS)
        after_s = chance.uniform(0, 0.05)
        dist.barrier()
        kind = AsyncCheckpointerType.PROCESS
        state = part_of(rank, number + 1.0)
        begun: Any = dcp.async_save(
            state, checkpoint_id=checkpoint_dir, async_checkpointer_type=kind
        )
        if rank == victim:
            send(process_of_this_rank(), sent, after_s)
        error = begun.exception(LIMIT_S)
        told: list[Any] = [None, None]
        dist.all_gather_object(told, None if error is None else str(error))
        assert told[0] == told[1]
        if error is not None:
            assert sent in DEADLY
            assert set(error.failures) == {victim}
            assert f"was killed by {signal.Signals(sent).name}" in str(error)
        target = {key: torch.full((ELEMENTS,), -1.0) for key in ("w0", "w1")}
        load(target, checkpoint_dir)
        (found,) = torch.cat(list(target.values())).unique().tolist()
        assert found in ((number + 1.0,) if error is None else (fill, number + 1.0))
        fill = found
        outcomes[f"{signal.Signals(sent).name}: {'borne' if error is None else 'named'}"] += 1
    if rank == 0:
        print(f"signals to background processes: {dict(outcomes)}")
