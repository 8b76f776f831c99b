"""Every crash state of many kinds of our engine's saves: the whole old checkpoint or the new.

Each workload is recorded, and every folder that a crash could leave, by any of the models, is
loaded: at most `--dcp-fault-budget` of each model, each different folder once. The minima of the
workloads add up to more than 10,000 folders; the counts are printed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from pytest_dcp.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from pytest_dcp.faults import CrashState, FaultyStorage, Recording, recorded
from pytest_dcp.faults.crash_models import MODELS
from pytest_dcp.faults.crashes.crash_state import loads_one_of
from pytest_dcp.faults.crashes.enumerate import crashes
from pytest_dcp.faults.crashes.trace import Trace
from pytest_dcp.faults.state_differences import blank, differences

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

State = dict[str, Any]
Outcomes = Counter[str]


def state(fill: float, tensors: int = 2, size: int = 3) -> State:
    return {
        **{f"w{n}": torch.full((size,), fill + n) for n in range(tensors)},
        "epoch": int(fill),
    }


def different(traces: Iterable[Recording]) -> Iterator[CrashState]:
    """The states of all models, each folder once."""
    seen = set()
    for trace in traces:
        for model in MODELS:
            for one in trace.crash_states(model):
                key = (bool(one.returned), frozenset(one.files.items()))
                if key not in seen:
                    seen.add(key)
                    yield one


def load(target: State, checkpoint_id: Path) -> None:
    """By one thread, which is faster for checkpoints as small as these."""
    reader = FileSystemReader(checkpoint_id, thread_count=1)
    dcp.load(target, storage_reader=reader, no_dist=True)


def searched(
    storage: FaultyStorage,
    save: Callable[[Path], object],
    before: Callable[[Path], object] | None,
    old: State | None,
    new: State,
) -> Outcomes:
    """Contents of the folders that crashes of a save leave."""
    if before is not None:
        before(storage.checkpoint_dir)
    with storage.record() as trace:
        save(storage.checkpoint_dir)
    outcomes: Outcomes = Counter()
    for one in different([trace]):
        found = storage.assert_loads_one_of(one, old, new, load=load)
        assert found != "nothing" or ".metadata" not in one.files, one
        outcomes[found] += 1
    return outcomes


Tell = Callable[[str, Outcomes, int], None]


@pytest.fixture
def tell(pytestconfig: pytest.Config) -> Tell:
    """Prints what was found, and fails when a search has become too small to prove anything."""
    chosen = [pytestconfig.getoption(f"dcp_fault_{name}") for name in ("budget", "replay")]

    def told(name: str, outcomes: Outcomes, least: int) -> None:
        total = sum(outcomes.values())
        print(f"crash states of {name}: {total} folders, {dict(outcomes)}, 0 violations")
        assert total >= least or chosen != [None, None]

    return told


def saver(values: State, **options: Any) -> Callable[[Path], object]:
    together = options.pop("use_collectives", True)
    return lambda folder: dcp.save(
        values, storage_writer=FileSystemWriter(folder, **options), use_collectives=together
    )


OLD, NEW = state(1), state(2)
MANY_OLD, MANY_NEW = state(1, 12), state(2, 12)
PER_ITEM = {"single_file_per_rank": False}
ALONE = {"use_collectives": False}


@dataclass(frozen=True)
class Workload:
    """A save, perhaps over an older one."""

    old: State | None
    new: State
    least: int
    """Different folders that its crashes leave."""
    options: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] | None = None
    """Options of the older save, if they are others."""


WORKLOADS = {
    "a fresh save": Workload(None, NEW, 20),
    "a save over one of the same shape": Workload(OLD, NEW, 20),
    "a save over one of another shape": Workload(state(1, 5, 7), NEW, 20),
    "threads": Workload(MANY_OLD, MANY_NEW, 100, {"thread_count": 4}),
    "values only": Workload({"epoch": 1, "name": "old"}, {"epoch": 2, "name": "new"}, 20),
    "a large tensor": Workload(state(1, 1, 400_000), state(2, 1, 400_000), 100),
    "a rank on its own": Workload(OLD, NEW, 20, ALONE),
    "a save over parts that ranks saved on their own": Workload(OLD, NEW, 25, {}, ALONE),
    "a file for each item": Workload(MANY_OLD, MANY_NEW, 1000, PER_ITEM),
    "a file for each item of another shape": Workload(state(1, 14, 9), MANY_NEW, 1000, PER_ITEM),
    "a file for each item, fresh": Workload(None, MANY_NEW, 900, PER_ITEM),
    "a file for each item, by threads": Workload(
        MANY_OLD, MANY_NEW, 1000, PER_ITEM | {"thread_count": 3}
    ),
    "a file for each item, by threads, fresh": Workload(
        None, MANY_NEW, 1000, PER_ITEM | {"thread_count": 2}
    ),
    "a file for each item, and fewer than before": Workload(MANY_OLD, state(2, 3), 500, PER_ITEM),
    "a file for each item, of a rank on its own": Workload(
        MANY_OLD, MANY_NEW, 1000, PER_ITEM | ALONE
    ),
    "a file for each item, over a rank's own": Workload(
        MANY_OLD, MANY_NEW, 1000, PER_ITEM, PER_ITEM | ALONE
    ),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_crash_leaves_the_old_or_the_new_checkpoint(
    faulty_storage: FaultyStorage, tell: Tell, name: str
) -> None:
    work = WORKLOADS[name]
    options = work.options if work.before is None else work.before
    before = None if work.old is None else saver(work.old, **options)
    save = saver(work.new, **work.options)
    outcomes = searched(faulty_storage, save, before, work.old, work.new)
    tell(name, outcomes, work.least)


def test_a_new_folder_lasts_when_the_save_has_returned(
    faulty_storage: FaultyStorage, tell: Tell
) -> None:
    """Its own name is one in the folder above it, and that one's in the next."""

    def below(target: State, checkpoint_id: Path) -> None:
        load(target, checkpoint_id / "run" / "step")

    with faulty_storage.record() as trace:
        saver(NEW)(faulty_storage.checkpoint_dir / "run" / "step")
    outcomes = Counter(
        faulty_storage.assert_loads_one_of(one, None, NEW, load=below) for one in different([trace])
    )
    tell("a save to a new folder", outcomes, 20)


@pytest.mark.parametrize("options", [PER_ITEM, ALONE], ids=["a file for each item", "alone"])
def test_the_next_save_cleans_up_after_any_crash(options: dict[str, Any]) -> None:
    few_old, few_new, newer = (state(fill, 3) for fill in (1, 2, 3))
    for crashed in different([recorded(saver(few_new, **options), saver(few_old, **options))]):
        with crashed.restored() as folder:
            saver(newer, sync_files=False, **ALONE if options is ALONE else {})(folder)
            target = blank(newer)
            load(target, folder)
            assert not list(differences(target, newer))
            assert len(list(folder.iterdir())) == 2, crashed


def test_a_save_after_a_crash_can_crash_too(tell: Tell) -> None:
    """After each crash of a save another one is made, and every crash of that is looked at."""
    newer = state(3)
    first = recorded(saver(NEW), saver(OLD))
    outcomes: Outcomes = Counter()
    for crashed in different([first]):
        survivor = OLD if loads_one_of(crashed, OLD, NEW) == "old" else NEW

        def put(folder: Path, files: dict[str, bytes] = crashed.files) -> None:
            for name, data in files.items():
                (folder / name).write_bytes(data)

        second = recorded(saver(newer), put)
        outcomes += Counter(loads_one_of(one, survivor, newer, load) for one in different([second]))
        *_, whole = second.crash_states("kill")
        assert len(whole.files) == 2, f"{crashed!r} left files that the next save did not remove"
    tell("saves after crashes", outcomes, 800)


def test_a_save_in_the_background(faulty_storage: FaultyStorage, tell: Tell) -> None:
    def save(folder: Path) -> None:
        dcp.async_save(MANY_NEW, storage_writer=FileSystemWriter(folder, **PER_ITEM)).result()

    outcomes = searched(faulty_storage, save, saver(MANY_OLD), MANY_OLD, MANY_NEW)
    tell("a save in the background", outcomes, 500)


def test_a_reader_beside_a_save_is_no_part_of_it(faulty_storage: FaultyStorage, tell: Tell) -> None:
    """It loads again and again; each load gives one checkpoint, and so does each crash."""
    read: list[int] = []

    def save(folder: Path) -> None:
        stop = threading.Event()

        def reads() -> None:
            while not stop.is_set():
                target = state(0)
                load(target, folder)
                read.append(target["epoch"])

        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(reads)
            try:
                while not read and not reader.done():
                    stop.wait(0.001)
                saver(NEW)(folder)
            finally:
                stop.set()
            reader.result()

    tell("a save beside a reader", searched(faulty_storage, save, saver(OLD), OLD, NEW), 20)
    assert set(read) <= {1, 2}
    assert read == sorted(read)


MAPPING = {"fqn_to_index_mapping": {f"w{n}": 1 + n % 3 for n in range(4)}}
SHARDS = {"save_distributed": True}
FULL = {"enable_consolidation": True}


@dataclass(frozen=True)
class Folder:
    """Saves to a Hugging Face folder, one over the other."""

    old: dict[str, Any] | None
    """Options of the older save; None: another program wrote a single `model.safetensors`."""
    new: dict[str, Any]
    least: int


HUGGING_FACE = {
    "one file": Folder({}, {}, 20),
    "three files": Folder(MAPPING, MAPPING, 80),
    "one file over three": Folder(MAPPING, {}, 30),
    "three files over one": Folder({}, MAPPING, 70),
    "a file of shards": Folder(SHARDS, SHARDS, 12),
    "three files of shards": Folder(SHARDS | MAPPING, SHARDS | MAPPING, 75),
    "shards over whole tensors": Folder(MAPPING, SHARDS | MAPPING, 75),
    "whole tensors over shards": Folder(SHARDS | MAPPING, MAPPING, 80),
    "another program's file": Folder(None, MAPPING, 70),
    "full tensors of shards": Folder(SHARDS | FULL | MAPPING, SHARDS | FULL | MAPPING, 400),
}


def hugging_face_saver(values: State, options: dict[str, Any]) -> Callable[[Path], object]:
    return lambda folder: dcp.save(
        values, storage_writer=HuggingFaceStorageWriter(str(folder), **options)
    )


def load_hugging_face(target: State, checkpoint_id: Path) -> None:
    reader = HuggingFaceStorageReader(str(checkpoint_id))
    dcp.load(target, storage_reader=reader, no_dist=True)


def hugging_face_states(folder: Folder, old: State, new: State) -> Iterator[CrashState]:
    def by_another_program(place: Path) -> None:
        safetensors.torch.save_file(old, place / "model.safetensors", {"format": "pt"})

    before = by_another_program
    if folder.old is not None:
        before = hugging_face_saver(old, folder.old)
    return different([recorded(hugging_face_saver(new, folder.new), before)])


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_crash_leaves_the_old_or_the_new_hugging_face_folder(tell: Tell, name: str) -> None:
    """An index names the old files or the new ones; of shards all are there, or not."""
    old, new = ({f"w{n}": torch.full((3,), fill + n) for n in range(4)} for fill in (1.0, 2.0))
    states = hugging_face_states(HUGGING_FACE[name], old, new)
    outcomes = Counter(loads_one_of(one, old, new, load_hugging_face) for one in states)
    assert {"old", "new"} <= outcomes.keys()
    tell(f"Hugging Face folders, {name}", outcomes, HUGGING_FACE[name].least)


@pytest.mark.parametrize("name", ["three files", "three files of shards", "one file"])
def test_the_next_save_cleans_a_hugging_face_folder_after_any_crash(name: str) -> None:
    old, new = ({f"w{n}": torch.full((3,), fill + n) for n in range(4)} for fill in (1.0, 2.0))
    newer = {f"w{n}": torch.full((3,), 9.0 + n) for n in range(4)}
    folder = HUGGING_FACE[name]
    wanted = (3 if MAPPING.items() <= folder.new.items() else 1) + ("shards" not in name)
    for crashed in list(hugging_face_states(folder, old, new))[::3]:
        with crashed.restored() as place:
            writer = HuggingFaceStorageWriter(str(place), **folder.new)
            writer.sync_files = False
            dcp.save(newer, storage_writer=writer)
            target = blank(newer)
            load_hugging_face(target, place)
            assert not list(differences(target, newer))
            assert len(list(place.iterdir())) == wanted, crashed


@pytest.mark.parametrize("options", [{}, MAPPING, SHARDS | MAPPING], ids=str)
def test_a_crash_of_a_first_save_leaves_no_part_of_a_hugging_face_folder(
    options: dict[str, Any],
) -> None:
    new = {f"w{n}": torch.full((3,), 2.0 + n) for n in range(4)}

    def load_all(target: State, checkpoint_id: Path) -> None:
        reader = HuggingFaceStorageReader(str(checkpoint_id))
        target.update(dcp.load_without_template(storage_reader=reader, no_dist=True))

    for one in different([recorded(hugging_face_saver(new, options))]):
        assert loads_one_of(one, None, new, load_all) in ("new", "nothing")


# ---- several ranks: each looks at its share of the states


def in_shares(
    storage: FaultyStorage, trace: Recording, old: State, new: State, rank: int, size: int
) -> Outcomes:
    """Outcomes of all ranks, each of which checks its share of the states."""
    states = list(different([trace]))
    mine = Counter(
        storage.assert_loads_one_of(one, old, new, load=load) for one in states[rank::size]
    )
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, mine)
    return sum(gathered, Counter())


def whole(fill: float, size: int, tensors: int = 1) -> State:
    parts = {f"{rank} {n}": torch.full((3,), fill) for rank in range(size) for n in range(tensors)}
    return {**parts, "both": torch.full((2,), fill), "epoch": int(fill)}


def mine(values: State, rank: int) -> State:
    return {key: value for key, value in values.items() if key[:2] in (f"{rank} ", "bo", "ep")}


@pytest.mark.parametrize(
    ("options", "least"),
    [({}, (35, 100)), (PER_ITEM, (200, 600)), ({"thread_count": 2}, (100, 400))],
    ids=["one file", "a file for each item", "threads"],
)
@pytest.mark.world_size([2, 4])
def test_a_crash_of_all_ranks_leaves_the_old_or_the_new(
    faulty_storage: FaultyStorage,
    tell: Tell,
    rank: int,
    world_size: int,
    options: Any,
    least: tuple[int, int],
) -> None:
    old, new = (whole(fill, world_size, 2) for fill in (1, 2))
    folder = faulty_storage.checkpoint_dir
    saver(mine(old, rank), **options)(folder)
    with faulty_storage.record() as trace:
        saver(mine(new, rank), **options)(folder)
    outcomes = in_shares(faulty_storage, trace, old, new, rank, world_size)
    if rank == 0:
        tell(f"{world_size} ranks, {options}", outcomes, least[world_size == 4])


@pytest.mark.world_size(2)
def test_a_rank_may_be_far_ahead_of_the_other(
    faulty_storage: FaultyStorage, tell: Tell, rank: int
) -> None:
    """Other orders than the recorded one: all of rank 1's writing before rank 0's, or after it."""
    old, new = (whole(fill, 2) for fill in (1, 2))
    folder = faulty_storage.checkpoint_dir
    saver(mine(old, rank))(folder)
    with faulty_storage.record() as recording:
        saver(mine(new, rank))(folder)
    trace = recording.trace
    first, second = ([op for op in trace.operations if op.rank == n] for n in (0, 1))
    met = next(n for n, op in enumerate(first) if op.kind == "sync_folder")
    outcomes: Outcomes = Counter()
    for order in ([*second, *first], [*first[:met], *second, *first[met:]]):
        timed = [replace(op, started_ns=2 * n, ended_ns=2 * n + 1) for n, op in enumerate(order, 1)]
        end = dict.fromkeys((0, 1), 2 * len(timed) + 2)
        for crash in crashes(Trace.of([trace.base], timed, end), "posix"):
            outcomes[loads_one_of(CrashState(crash), old, new, load)] += 1
    if rank == 0:
        tell("two ranks in other orders", outcomes, 60)


@pytest.mark.world_size(4)
def test_a_crash_of_a_save_in_another_layout(
    faulty_storage: FaultyStorage, tell: Tell, device_mesh: DeviceMesh, rank: int
) -> None:
    def laid_out(fill: float, *placements: Any) -> State:
        return {
            f"w{n}": distribute_tensor(torch.full((8, 4), fill + n), device_mesh, [placement])
            for n, placement in enumerate(placements)
        }

    saver(laid_out(1.0, Shard(0), Replicate(), Shard(1)))(faulty_storage.checkpoint_dir)
    with faulty_storage.record() as trace:
        saver(laid_out(2.0, Shard(1), Shard(0), Replicate()))(faulty_storage.checkpoint_dir)
    old, new = ({f"w{n}": torch.full((8, 4), fill + n) for n in range(3)} for fill in (1.0, 2.0))
    outcomes = in_shares(faulty_storage, trace, old, new, rank, 4)
    if rank == 0:
        tell("another layout", outcomes, 80)


@pytest.mark.world_size(2)
def test_a_crash_of_ranks_on_their_own_is_never_a_mix(
    faulty_storage: FaultyStorage, tell: Tell, rank: int
) -> None:
    """Each commits its own part: between the two a load says that they are of different saves."""
    old, new = (whole(fill, 2) for fill in (1, 2))
    folder = faulty_storage.checkpoint_dir
    saver(mine(old, rank), **ALONE)(folder)
    with faulty_storage.record() as trace:
        saver(mine(new, rank), **ALONE)(folder)
    outcomes: Outcomes = Counter()
    for one in different([trace]):
        found = loaded_together(one, mine(old, rank), mine(new, rank), rank)
        assert found in ({"old"}, {"new"}, {"refused"}), one
        assert found == {"new"} or len(one.returned) < 2, one
        outcomes += Counter(found)
    if rank == 0:
        tell("two ranks on their own", outcomes, 30)


def loaded_together(one: CrashState, old: State, new: State, rank: int) -> set[str]:
    """Outcomes on all ranks when they load the folder as one world."""
    with one.restored() if rank == 0 else nullcontext() as folder:
        told = [folder]
        dist.broadcast_object_list(told)
        target = blank(new)
        try:
            dcp.load(target, checkpoint_id=told[0])
        except dcp.CheckpointException:
            found = "refused"
        else:
            unlike = {"old": any(differences(target, old)), "new": any(differences(target, new))}
            found = next((name for name, is_unlike in unlike.items() if not is_unlike), "a mix")
        every: list[Any] = [None, None]
        dist.all_gather_object(every, found)
    return set(every)
