"""Bytes that several ranks want are read by one of them: `load(read="shared")`."""

from __future__ import annotations

import contextlib
import select
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard

import pytest_dcp.checkpoint as dcp
import pytest_dcp.properties as props
from pytest_dcp._engine.coordinate import StepError, byte_exchange, rendezvous
from pytest_dcp._engine.coordinate.connection import Connection
from pytest_dcp._engine.coordinate.hello import BYTES, Hello, greet
from pytest_dcp._engine.coordinate.peer_listener import peer_listener
from pytest_dcp._engine.io import bucket_reading, shared_reading
from pytest_dcp._engine.plan import shared_reads
from pytest_dcp._harness.rank.world_fixture import RankWorld
from pytest_dcp.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from support import object_store
from support.object_store import requests, settle
from support.states import (
    DISABLED,
    blank,
    numbered,
    same,
    spread,
    torch_dcp,
    without_warnings,
)
from support.storages import FolderReader, FolderWriter
from support.unsynced import UNSYNCED

pytestmark = [
    pytest.mark.world_size(4, isolation="module"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SILENCE_S = 4
TURNED_AWAY_S = 60
URL = f"{object_store.PROTOCOL}://runs/last"
Layout = tuple[Placement, ...]

LAYOUTS: dict[str, tuple[tuple[int, ...], Layout]] = {
    "replicated": ((4,), (Replicate(),)),
    "hsdp": ((2, 2), (Replicate(), Shard(0))),
    "hsdp by columns": ((2, 2), (Replicate(), Shard(1))),
    "rows": ((4,), (Shard(0),)),
    "columns": ((4,), (Shard(1),)),
}


def mesh_of(sizes: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes)


def laid_out(layout: str) -> dict[str, Any]:
    """Tensors in a layout, and data that is the same on all ranks."""
    sizes, placements = LAYOUTS[layout]
    mesh = mesh_of(sizes)
    return {
        "large": spread(numbered(700, 1000), mesh, *placements),
        "odd": spread(numbered(13, 7, 3, dtype=torch.float64), mesh, *placements),
        "half": spread(numbered(64, 33, dtype=torch.bfloat16), mesh, *placements),
        "plain": numbered(300, 5),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 3),
        "many": {str(n): numbered(5, start=n) for n in range(40)},
        "value": {"text": "x" * 1000, "list": [1, 2.5, None]},
    }


def shared(state: dict[str, Any], **where: Any) -> tuple[dict[str, Any], Any]:
    """What a shared load puts in a state like this one, and its report."""
    target: dict[str, Any] = blank(state)
    report = dcp.load(target, read="shared", **where)
    return target, report


@pytest.fixture
def store(checkpoint_dir: Path) -> Path:
    """The root of an empty object store that all ranks share."""
    settle(checkpoint_dir)
    return checkpoint_dir


def bytes_fetched(store: Path) -> int:
    """Bytes of data files that the ranks have fetched, since the last look."""
    dist.barrier()
    fetched = sum(size for what, name, *sizes in requests(store) for size in sizes
                  if what == "get" and name.endswith(".distcp"))  # fmt: skip
    dist.barrier()
    return fetched


def bytes_stored(store: Path) -> int:
    return sum(path.stat().st_size for path in (store / "objects").glob("*.distcp"))


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("of", ["replicated", "hsdp", "rows", "columns"])
def test_loads_the_same_bits_in_any_layout(checkpoint_dir: Path, of: str, to: str) -> None:
    dcp.save(laid_out(of), checkpoint_id=checkpoint_dir)
    wanted = laid_out(to)
    loaded, _ = shared(wanted, checkpoint_id=checkpoint_dir)
    assert same(loaded, wanted)


@pytest.mark.parametrize("layout", ["replicated", "hsdp"])
def test_each_stored_byte_is_read_once(store: Path, layout: str) -> None:
    wanted = laid_out(layout)
    dcp.save(wanted, storage_writer=FsspecWriter(URL, root=str(store)))
    loaded, _ = shared(wanted, storage_reader=FsspecReader(URL, root=str(store)))
    assert same(loaded, wanted)
    assert bytes_fetched(store) / bytes_stored(store) == pytest.approx(1.00, abs=0.01)


def test_auto_shares_in_a_store_and_local_reads_all_on_each_rank(store: Path) -> None:
    wanted = laid_out("replicated")
    dcp.save(wanted, storage_writer=FsspecWriter(URL, root=str(store)))
    reads = {}
    for read in ("auto", "local"):
        before, target = bytes_fetched(store), blank(wanted)
        dcp.load(target, storage_reader=FsspecReader(URL, root=str(store)), read=read)
        assert same(target, wanted)
        reads[read] = (bytes_fetched(store) - before) / bytes_stored(store)
    assert reads == pytest.approx({"auto": 1.0, "local": 4.0}, abs=0.02)


def test_a_load_without_template_is_shared_too(store: Path) -> None:
    saved = {"w": numbered(900, 400), "value": {"n": [1, "two"]}}
    dcp.save(saved, storage_writer=FsspecWriter(URL, root=str(store)))
    loaded = dcp.load_without_template(storage_reader=FsspecReader(URL, root=str(store)))
    assert same(loaded, saved)
    assert bytes_fetched(store) / bytes_stored(store) == pytest.approx(1.00, abs=0.01)


def test_auto_shares_nothing_on_a_local_disk_nor_where_little_is_wanted_twice(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_reading.BucketReader, "__init__", refuse_buckets)
    wanted = laid_out("replicated")
    dcp.save(wanted, checkpoint_id=store / "local")
    target = blank(wanted)
    dcp.load(target, checkpoint_id=store / "local")
    assert same(target, wanted)
    wanted = laid_out("rows")
    dcp.save(wanted, storage_writer=FsspecWriter(URL, root=str(store)))
    target = blank(wanted)
    dcp.load(target, storage_reader=FsspecReader(URL, root=str(store)))
    assert same(target, wanted)


def refuse_buckets(*_: object) -> None:
    raise AssertionError("a bucket was to be read")


def test_the_reports_of_all_ranks_count_each_byte_once(checkpoint_dir: Path) -> None:
    wanted = laid_out("replicated")
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    _, report = shared(wanted, checkpoint_id=checkpoint_dir)
    counts = torch.tensor([report.bytes_read, report.bytes_verified, report.bytes_needed])
    dist.all_reduce(counts)
    assert counts.tolist() == [report.bytes_needed, report.bytes_needed, 4 * report.bytes_needed]


def test_progress_reaches_the_whole_on_each_rank(checkpoint_dir: Path) -> None:
    wanted = laid_out("replicated")
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    seen = []
    dcp.load(blank(wanted), checkpoint_id=checkpoint_dir, read="shared", progress=seen.append)
    assert seen[-1].done_bytes == seen[-1].total_bytes > 2_800_000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torchs_checkpoints_are_shared(checkpoint_dir: Path, layout: str) -> None:
    torch_dcp.save(laid_out("hsdp"), checkpoint_id=checkpoint_dir)
    wanted = laid_out(layout)
    loaded, _ = shared(wanted, checkpoint_id=checkpoint_dir)
    assert same(loaded, wanted)


def test_ranks_together_read_no_more_of_torchs_checkpoint_than_one_rank(
    store: Path, rank: int
) -> None:
    """Beside the tensors that is a little at the end of each entry, to find them."""
    wanted = {f"w{n}": numbered(1000, 300, start=n) for n in range(4)}
    torch_dcp.save(wanted, checkpoint_id=store / "local")
    if rank == 0:
        (store / "objects").mkdir(exist_ok=True)
        for path in (store / "local").iterdir():
            path.rename(store / "objects" / f"runs\\last\\{path.name}")
        settle(store)
        (store / "requests").touch()
    dist.barrier()
    loaded, _ = shared(wanted, storage_reader=FsspecReader(URL, root=str(store)))
    assert same(loaded, wanted)
    together = bytes_fetched(store)
    if rank == 0:
        with without_warnings(DISABLED):
            reader = FsspecReader(URL, root=str(store))
            dcp.load(blank(wanted), storage_reader=reader, no_dist=True)
    alone = bytes_fetched(store) - together
    assert together / alone == pytest.approx(1.00, abs=0.01)
    assert alone / bytes_stored(store) < 1.25


def test_tensors_that_torch_stored_column_by_column(checkpoint_dir: Path) -> None:
    stored = {"w": numbered(300, 200).T, "b": numbered(300)}
    torch_dcp.save(stored, checkpoint_id=checkpoint_dir)
    loaded, _ = shared({"w": numbered(200, 300), "b": numbered(300)}, checkpoint_id=checkpoint_dir)
    assert same(loaded, {"w": stored["w"].contiguous(), "b": stored["b"]})


@pytest.mark.parametrize("layout", ["replicated", "hsdp by columns"])
def test_hugging_face_folders_are_shared(checkpoint_dir: Path, rank: int, layout: str) -> None:
    whole = {"w": numbered(300, 200), "b": numbered(17).half()}
    if rank == 0:
        writer = dcp.HuggingFaceStorageWriter(str(checkpoint_dir))
        with without_warnings(DISABLED):
            dcp.save(whole, storage_writer=writer, no_dist=True)
    dist.barrier()
    sizes, placements = LAYOUTS[layout]
    wanted = {"w": spread(whole["w"], mesh_of(sizes), *placements), "b": whole["b"]}
    reader = dcp.HuggingFaceStorageReader(str(checkpoint_dir))
    loaded, report = shared(wanted, storage_reader=reader)
    assert same(loaded, wanted)
    read = torch.tensor(report.bytes_read)
    dist.all_reduce(read)
    assert read == 300 * 200 * 4 + 17 * 2


def test_compressed_entries_are_read_once_and_decoded_by_each(store: Path) -> None:
    extension = pytest.importorskip("torch.distributed.checkpoint._extension")
    pytest.importorskip("zstandard")
    wanted = laid_out("replicated")
    extensions = [extension.ZStandard()]
    writer = FsspecWriter(URL, root=str(store), _extensions=extensions)
    dcp.save(wanted, storage_writer=writer)
    loaded, _ = shared(wanted, storage_reader=FsspecReader(URL, root=str(store)))
    assert same(loaded, wanted)
    # torch's metadata says nothing of the data in a compressed entry: each rank looks at its start.
    assert bytes_fetched(store) / bytes_stored(store) == pytest.approx(1.00, abs=0.05)


class TransformingPlanner(dcp.DefaultLoadPlanner):
    """Fills buffers of its own."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.zeros(read_item.lengths, dtype=torch.float64)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        place = self.lookup_tensor(read_item.dest_index)
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(dim, start, length)
        place.copy_(tensor * 2)


def test_a_planner_with_hooks_of_its_own_is_asked_as_always(checkpoint_dir: Path) -> None:
    dcp.save({"w": numbered(300, 200), "n": 5}, checkpoint_id=checkpoint_dir)
    target = {"w": torch.zeros(300, 200), "n": 0}
    dcp.load(target, checkpoint_id=checkpoint_dir, planner=TransformingPlanner(), read="shared")
    assert same(target, {"w": numbered(300, 200) * 2, "n": 5})


def test_other_dtypes_and_strided_targets(checkpoint_dir: Path) -> None:
    dcp.save({"w": numbered(301, 200), "v": numbered(77, 3)}, checkpoint_id=checkpoint_dir)
    target = {"w": torch.zeros(200, 301).T, "v": torch.zeros(77, 3, dtype=torch.float64)}
    dcp.load(target, checkpoint_id=checkpoint_dir, strict=False, read="shared")
    assert torch.equal(target["w"], numbered(301, 200))
    assert torch.equal(target["v"], numbered(77, 3, dtype=torch.float64))


def test_bytes_that_one_rank_wants_beside_those_it_shares(checkpoint_dir: Path, rank: int) -> None:
    """Rank 1 wants the second quarter of a tensor, rank 2 all of it."""
    full = numbered(3000, 1000)
    dcp.save({"w": full}, checkpoint_id=checkpoint_dir)
    quarter = spread(full, mesh_of((4,)), Shard(0))
    wanted: dict[str, Any] = {1: {"w": quarter}, 2: {"w": full}}.get(rank, {})
    loaded, report = shared(wanted, checkpoint_id=checkpoint_dir)
    assert same(loaded, wanted)
    counts = torch.tensor(report.bytes_read)
    dist.all_reduce(counts)
    assert counts == full.nbytes


def test_two_loads_at_once_in_threads_and_groups_of_their_own(checkpoint_dir: Path) -> None:
    states = [{"w": numbered(900, 1000, start=n)} for n in range(2)]
    for n, state in enumerate(states):
        dcp.save(state, checkpoint_id=checkpoint_dir / str(n))
    groups = [dist.new_group() for _ in states]

    def load(n: int) -> dict[str, Any]:
        place = checkpoint_dir / str(n)
        return shared(states[n], checkpoint_id=place, process_group=groups[n])[0]

    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(load, range(2)))
    assert same(loaded, states)


def test_ranks_that_have_different_keys(checkpoint_dir: Path, rank: int) -> None:
    dcp.save({f"t{n}": numbered(500, 400, start=n) for n in range(6)}, checkpoint_id=checkpoint_dir)
    target = {f"t{n}": torch.zeros(500, 400) for n in range(6) if n % 3 != rank}
    dcp.load(target, checkpoint_id=checkpoint_dir, read="shared")
    assert same(target, {f"t{n}": numbered(500, 400, start=n) for n in range(6) if n % 3 != rank})


@settings(max_examples=25, deadline=None)
@given(
    state=props.state_dicts(),
    saved=props.arrangements(world_size=4),
    loaded=props.arrangements(world_size=4),
)
def test_any_layout_is_loaded_in_any_other(
    state: props.StateSpec, saved: Any, loaded: Any, checkpoint_dir: Path
) -> None:
    props.assert_round_trip(state.on(*saved), state.on(*loaded), checkpoint_dir, dcp=Sharing())


class Sharing:
    """The engine, with loads that share, in buckets so small that tensors are cut anywhere."""

    save = staticmethod(UNSYNCED.save)

    @staticmethod
    def load(*args: Any, **kwargs: Any) -> Any:
        sizes = {"BLOCK_BYTES": 16, "LARGEST_BUCKET_BYTES": 48}
        with (
            mock.patch.multiple(shared_reads, SMALLEST_BUCKET_BYTES=32, **sizes),
            mock.patch.multiple(shared_reading, **sizes),
        ):
            return dcp.load(*args, **kwargs, read="shared")


# Misuse and failures.


def test_damage_that_one_rank_reads_fails_all_with_the_files_name(
    checkpoint_dir: Path, rank: int
) -> None:
    wanted = laid_out("replicated")
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    if rank == 0:
        file = max(checkpoint_dir.glob("*.distcp"), key=lambda path: path.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    dist.barrier()
    with pytest.raises(CheckpointException, match=r"the checksum .*\.distcp'") as caught:
        shared(wanted, checkpoint_id=checkpoint_dir)
    assert len(caught.value.failures) == 1
    assert torch.equal(torch.tensor(list(caught.value.failures)), agreed(caught.value.failures))


def agreed(failures: Any) -> torch.Tensor:
    """Rank 0's."""
    ranks = torch.tensor(list(failures))
    dist.broadcast(ranks, 0)
    return ranks


def test_a_load_after_a_failed_one_is_as_good_as_new(checkpoint_dir: Path, rank: int) -> None:
    wanted = laid_out("replicated")
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    wrong = wanted | {"plain": torch.zeros(2)} if rank == 2 else wanted
    with pytest.raises(CheckpointException, match="for plain"):
        shared(wrong, checkpoint_id=checkpoint_dir)
    loaded, _ = shared(wanted, checkpoint_id=checkpoint_dir)
    assert same(loaded, wanted)


def test_a_value_that_does_not_fit_changes_no_target(checkpoint_dir: Path, rank: int) -> None:
    wanted = laid_out("replicated")
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    target = blank(wanted)
    target["value"] = torch.zeros(3) if rank == 1 else target["value"]
    with pytest.raises(CheckpointException, match="'value"):
        dcp.load(target, checkpoint_id=checkpoint_dir, read="shared")
    assert same(target["plain"], blank(wanted)["plain"])


def test_an_unknown_word_and_a_reader_that_reads_in_its_own_way_are_refused(
    checkpoint_dir: Path,
) -> None:
    state = {"w": torch.zeros(3)}
    dcp.save(state, storage_writer=FolderWriter(checkpoint_dir))
    with pytest.raises(ValueError, match=r"'auto', 'local' or 'shared', got 'once'"):
        dcp.load(state, checkpoint_id=checkpoint_dir, read="once")  # type: ignore[arg-type]
    dist.barrier()
    with pytest.raises(ValueError, match="FolderReader reads in its own way"):
        dcp.load(state, storage_reader=FolderReader(checkpoint_dir), read="shared")
    dist.barrier()
    dcp.load(state, storage_reader=FolderReader(checkpoint_dir), read="auto")


def test_ranks_that_differ_in_read_are_refused(checkpoint_dir: Path, rank: int) -> None:
    state = {"w": torch.zeros(3)}
    dcp.save(state, checkpoint_id=checkpoint_dir)
    with pytest.raises(CheckpointException, match=r"'shared' on ranks 0,2, 'local' on ranks 1,3"):
        dcp.load(state, checkpoint_id=checkpoint_dir, read="local" if rank % 2 else "shared")


def test_a_rank_that_connects_after_an_exchange_is_turned_away(
    checkpoint_dir: Path, rank: int
) -> None:
    """It proves that it is a rank, but nothing will ever ask for its connection."""
    wanted = {"w": numbered(500, 400)}
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    shared(wanted, checkpoint_id=checkpoint_dir)
    group = dist.group.WORLD
    assert group is not None
    if rank == 1:
        address = rendezvous.look_up(group, 0, until_s=0.0)
        assert address is not None
        connection = Connection(byte_exchange.connect(address))
        greet(connection, Hello("a group/0/4/an old token", BYTES, 0, rank), address.key())
    dist.barrier()
    if rank == 0:
        until_s = time.monotonic() + TURNED_AWAY_S
        while peer_listener()._handshaking or not is_quiet():
            peer_listener().arrivals("another group", "load")
            assert time.monotonic() < until_s
        assert not peer_listener()._waiting
    dist.barrier()
    if rank == 1:
        until_s = time.monotonic() + TURNED_AWAY_S
        while not connection.over:
            assert time.monotonic() < until_s
            connection.receive()
        connection.close()


def is_quiet() -> bool:
    """Whether no new connection waits in the listener's queue."""
    return not select.select([peer_listener().fileno()], [], [], 0.2)[0]


def refuse_connection(_: object) -> None:
    raise TimeoutError("no answer")


@pytest.mark.parametrize("read", ["auto", "shared"])
def test_ranks_that_cannot_connect_to_each_other(
    store: Path, rank: int, monkeypatch: pytest.MonkeyPatch, read: Any
) -> None:
    wanted = laid_out("replicated")
    dcp.save(wanted, storage_writer=FsspecWriter(URL, root=str(store)))
    if rank == 1:
        monkeypatch.setattr(byte_exchange, "connect", refuse_connection)
    target, reader = blank(wanted), FsspecReader(URL, root=str(store))
    if read == "shared":
        with pytest.raises(CheckpointException, match="rank 0 cannot be reached from rank 1"):
            dcp.load(target, storage_reader=reader, read=read)
        return
    with contextlib.ExitStack() as warns:
        if rank == 1:
            warns.enter_context(pytest.warns(UserWarning, match="each rank reads .* itself"))
        dcp.load(target, storage_reader=reader, read=read)
    assert same(target, wanted)


def test_alone_a_rank_shares_with_no_other(checkpoint_dir: Path) -> None:
    wanted = {"w": numbered(5)}
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    with without_warnings(DISABLED):
        loaded, _ = shared(wanted, checkpoint_id=checkpoint_dir, no_dist=True)
    assert same(loaded, wanted)


@pytest.mark.world_size(4)
def test_ranks_with_a_shared_key_seal_the_buckets(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DCP_SHARED_KEY", "0123456789abcdef")
    wanted = laid_out("replicated")
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    loaded, _ = shared(wanted, checkpoint_id=checkpoint_dir)
    assert same(loaded, wanted)


@pytest.mark.world_size(4)
def test_a_rank_that_stops_is_named_once_the_groups_timeout_is_over(
    world: RankWorld, rank: int, checkpoint_dir: Path
) -> None:
    wanted = {"w": numbered(4000, 1000)}
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    group = dist.new_group(timeout=timedelta(seconds=SILENCE_S))
    world.pause(2, at="pytest_dcp._engine.io.bucket_reading:BucketReader.release")
    with pytest.raises(StepError, match=r"rank 2 .*was silent for"):
        shared(wanted, checkpoint_id=checkpoint_dir, process_group=group)


@pytest.mark.world_size(4)
def test_a_rank_may_read_its_own_part_for_longer_than_the_groups_timeout(
    rank: int, checkpoint_dir: Path
) -> None:
    wanted = {"w": numbered(4000, 1000), "alone": numbered(40)}
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    group = dist.new_group(timeout=timedelta(seconds=SILENCE_S))
    read_copies = shared_reading.read_copies

    def read_slowly(request: Any) -> Any:
        time.sleep(SILENCE_S + 1)
        return read_copies(request)

    mine = wanted if rank == 0 else {"w": wanted["w"]}
    read = read_slowly if rank == 0 else read_copies
    with mock.patch.object(shared_reading, "read_copies", read):
        loaded, _ = shared(mine, checkpoint_id=checkpoint_dir, process_group=group)
    assert same(loaded, mine)


@pytest.mark.world_size(4)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_dies_after_its_first_bucket_fails_all_others(
    world: RankWorld, rank: int, checkpoint_dir: Path, victim: int
) -> None:
    wanted = {"w": numbered(4000, 1000)}
    dcp.save(wanted, checkpoint_id=checkpoint_dir)
    world.kill(victim, at="pytest_dcp._engine.io.bucket_reading:BucketReader.release")
    with pytest.raises(StepError, match=rf"rank {victim} .*ended in step 'read'") as caught:
        shared(wanted, checkpoint_id=checkpoint_dir)
    assert set(caught.value.failures) == {victim}
