"""Damage on disk: for any damage to a checkpoint, a load is right or reports the damage.

The checkpoint is small, so that every byte can be spoiled and every length tried. A load of
everything must give the saved tensors or raise CheckpointCorruptError, inside the one exception
that all ranks get, naming a file that is damaged.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import settings
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

import pytest_dcp.checkpoint as dcp
from pytest_dcp.checkpoint.filesystem import FileSystemReader
from pytest_dcp.errors import CheckpointCorruptError
from pytest_dcp.faults.damage import Damaged, every_truncation, fill_sector, flip_bit, swap_sectors

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]

Verify = Literal["auto", "full", "off"]
SECTOR = 512
BLOCK = 1 << 16
FLIP_EVERY = 59
"""Bits; prime, so that every position in a byte has its turn."""
IS_NIGHTLY = settings().max_examples >= 10_000
LEAST_BYTES = 16 << 10
"""Of the checkpoint of which every byte is spoiled."""


def state(fill: float = 1) -> dict[str, Any]:
    return {
        "w": torch.arange(24, dtype=torch.float32).reshape(4, 6) * fill,
        "half": torch.arange(9, dtype=torch.bfloat16) * fill,
        "scalar": torch.tensor(7 * int(fill)),
        "nothing": torch.zeros(0, 3),
        "inner": {"epoch": 3 * int(fill), "name": "run"},
    }


def blank(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: blank(inner) for key, inner in value.items()}
    return torch.full_like(value, 99) if isinstance(value, torch.Tensor) else None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def outcome(folder: Path, saved: Any, target: Any = None, verify: Verify = "auto") -> str | None:
    """None when the load is right, else which file it says is damaged; "wrong" for wrong values.

    Any other exception than CheckpointCorruptError leaves this function.
    """
    target = blank(saved) if target is None else target
    try:
        dcp.load(target, storage_reader=FileSystemReader(folder, verify=verify, thread_count=1))
    except dcp.CheckpointException as error:
        ((cause, _),) = error.failures.values()
        if not isinstance(cause, CheckpointCorruptError):
            raise
        assert cause.file is not None, cause
        return cause.file
    return None if same(target, saved) else "wrong"


class LoadByHooks:
    """The hooks that a load calls, in its order, without reporting failures to other ranks.

    Reporting takes most of the time of a failing load. Undamaged metadata is read and planned with
    only once.
    """

    def __init__(self, folder: Path, saved: dict[str, Any]) -> None:
        self.folder = folder
        self.saved = saved
        self.target, self.planner = blank(saved), dcp.DefaultLoadPlanner()
        self.reader = FileSystemReader(folder, thread_count=1)
        metadata = self.reader.read_metadata()
        self.planner.set_up_planner(self.target, metadata, is_coordinator=True)
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        local = self.reader.prepare_local_plan(self.planner.create_local_plan())
        plans = self.planner.create_global_plan([local])
        (plan,) = self.reader.prepare_global_plan(plans)
        self.items = self.planner.finish_plan(plan)

    def read(self) -> bool:
        """Whether the files hold the saved values."""
        for name, value in self.target.items():
            self.target[name] = value.fill_(99) if isinstance(value, torch.Tensor) else None
        self.reader.read_data(self.items, self.planner).wait()
        return same(self.target, self.saved)

    def outcome(self, damaged: str) -> str | None:
        """As the function `outcome`, now that this file is damaged."""
        try:
            load = LoadByHooks(self.folder, self.saved) if damaged == ".metadata" else self
            return None if load.read() else "wrong"
        except CheckpointCorruptError as error:
            return ".metadata" if error.file is None else error.file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(state(), checkpoint_id=tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def check_each(
    folder: Path,
    damaged: Callable[[bytes], Iterable[Damaged]],
    verify: Verify = "auto",
    load: LoadByHooks | None = None,
) -> dict[str, int]:
    """Load after each damage to each file; how often it was noticed, by file."""
    noticed: dict[str, int] = {}
    cases = 0
    for path in files(folder):
        whole = path.read_bytes()
        for bad in damaged(whole):
            path.write_bytes(bad.data)
            got = load.outcome(path.name) if load else outcome(folder, state(), None, verify)
            assert got in (None, path.name), (path.name, bad.what, got)
            noticed[path.name] = noticed.get(path.name, 0) + (got is not None)
            cases += 1
        path.write_bytes(whole)
    print(f"{cases} damaged checkpoints, 0 silently wrong; noticed {noticed}")
    return noticed


def some_bits(whole: bytes) -> Iterator[Damaged]:
    for number in range(0, len(whole) * 8, FLIP_EVERY):
        at, bit = divmod(number, 8)
        yield Damaged(f"bit {bit} of byte {at} flipped", flip_bit(whole, at, bit))


@pytest.mark.parametrize("verify", ["auto", "full"])
def test_no_flipped_bit_gives_a_wrong_value(folder: Path, verify: Verify) -> None:
    """A flip is noticed, or is where no load looks."""
    assert all(check_each(folder, some_bits, verify).values())


class TestEveryByte:
    """Of a larger checkpoint: nothing is left out."""

    SAVED: dict[str, Any] = {  # noqa: RUF012 - never changed
        "w": torch.arange(3_000.0).reshape(60, 50),
        "half": torch.arange(9, dtype=torch.bfloat16),
        "epoch": 3,
    }

    @pytest.fixture(autouse=True)
    def without_old_objects(self) -> Iterator[None]:
        """Errors are in cycles: to look for them among all of torch would take longest."""
        gc.freeze()
        yield
        gc.unfreeze()

    @pytest.fixture
    def large(self, tmp_path: Path) -> Path:
        dcp.save(self.SAVED, checkpoint_id=tmp_path / "checkpoint")
        assert sum(path.stat().st_size for path in files(tmp_path / "checkpoint")) >= LEAST_BYTES
        return tmp_path / "checkpoint"

    def test_no_flipped_byte_gives_a_wrong_value(self, large: Path) -> None:
        """One bit of each, at night all of them."""

        def flips(whole: bytes) -> Iterator[Damaged]:
            for at in range(len(whole)):
                for bit in range(8) if IS_NIGHTLY else (at % 8,):
                    yield Damaged(f"bit {bit} of byte {at} flipped", flip_bit(whole, at, bit))

        assert all(check_each(large, flips, load=LoadByHooks(large, self.SAVED)).values())

    def test_no_truncation_gives_a_wrong_value(self, large: Path) -> None:
        assert all(
            check_each(large, every_truncation, load=LoadByHooks(large, self.SAVED)).values()
        )

    def test_no_spoiled_sector_gives_a_wrong_value(self, large: Path) -> None:
        def sectors(whole: bytes) -> Iterator[Damaged]:
            for number in range(-(-len(whole) // SECTOR)):
                for filler in (b"\0", b"\xff", b"U"):
                    yield Damaged(f"sector {number}", fill_sector(whole, number, filler))

        assert all(check_each(large, sectors, load=LoadByHooks(large, self.SAVED)).values())

    def test_no_two_swapped_sectors_give_a_wrong_value(self, large: Path) -> None:
        def swaps(whole: bytes) -> Iterator[Damaged]:
            for one, other in combinations(range(len(whole) // SECTOR), 2):
                yield Damaged(f"{one} and {other}", swap_sectors(whole, one, other))

        assert all(check_each(large, swaps, load=LoadByHooks(large, self.SAVED)).values())


def test_every_byte_of_the_data_is_checked(folder: Path) -> None:
    (path,) = folder.glob("*.distcp")
    whole = path.read_bytes()
    for tensor in (state()["w"], state()["half"]):
        data = tensor.view(torch.uint8).numpy().tobytes()
        at = whole.index(data)
        for bit in range(0, len(data) * 8, 3):
            bad = bytearray(whole)
            bad[at + bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            assert outcome(folder, state()) == path.name


def test_bytes_put_in_or_left_out_are_noticed(folder: Path) -> None:
    def shifted(whole: bytes) -> Iterator[Damaged]:
        for at in range(0, len(whole), 101):
            yield Damaged(f"a byte more at {at}", whole[:at] + b"\0" + whole[at:])
            yield Damaged(f"byte {at} left out", whole[:at] + whole[at + 1 :])

    assert all(check_each(folder, shifted).values())


def test_a_missing_file_is_named(folder: Path) -> None:
    (path,) = folder.glob("*.distcp")
    path.unlink()
    assert outcome(folder, state()) == path.name


def test_a_data_file_of_another_save_is_noticed(folder: Path, tmp_path: Path) -> None:
    dcp.save(state(2), checkpoint_id=tmp_path / "other")
    (mine,), (other,) = folder.glob("*.distcp"), (tmp_path / "other").glob("*.distcp")
    shutil.copy(other, mine)
    assert outcome(folder, state()) == mine.name


def test_swapped_files_are_noticed(tmp_path: Path) -> None:
    saved = {"one": torch.arange(50.0), "two": torch.arange(50.0) + 1, "three": {"v": 3}}
    writer = dcp.FileSystemWriter(tmp_path, single_file_per_rank=False)
    dcp.save(saved, storage_writer=writer)
    contents = {path: path.read_bytes() for path in files(tmp_path)}
    for one, other in combinations(contents, 2):
        one.write_bytes(contents[other])
        other.write_bytes(contents[one])
        assert outcome(tmp_path, saved) in (one.name, other.name)
        one.write_bytes(contents[one])
        other.write_bytes(contents[other])


@pytest.mark.parametrize("missing", ["metadata", "data"])
def test_torchs_own_checkpoints_name_the_missing_file(tmp_path: Path, missing: str) -> None:
    torch_save({"w": torch.arange(5.0)}, checkpoint_id=tmp_path)
    (tmp_path / (".metadata" if missing == "metadata" else "__0_0.distcp")).unlink()
    target = {"w": torch.zeros(5)}
    if missing == "data":
        assert outcome(tmp_path, target) == "__0_0.distcp"
        return
    with pytest.raises(dcp.CheckpointException, match="no checkpoint in"):
        dcp.load(target, checkpoint_id=tmp_path)


@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_small_tensors_without_checks_are_right_or_the_file_ends_early(
    tmp_path: Path, writer: str
) -> None:
    saved = {f"{n:03}": torch.randn(n % 7 + 1, 60) for n in range(600)}
    (dcp.save if writer == "ours" else torch_save)(saved, checkpoint_id=tmp_path)
    assert outcome(tmp_path, saved, verify="off") is None
    (path,) = tmp_path.glob("*.distcp")
    whole = path.read_bytes()
    for length in range(0, len(whole) * 9 // 10, len(whole) // 17):
        path.write_bytes(whole[:length])
        assert outcome(tmp_path, saved, verify="off") == path.name


class OfParts(dcp.DefaultLoadPlanner):
    """Asks for some rows of a tensor of 6 columns, and again for others, as no rank with a shard
    does."""

    def __init__(self, target: torch.Tensor, *rows: tuple[int, int]) -> None:
        super().__init__()
        self.target = target
        self.rows = rows

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        (item,) = plan.items
        zeros = torch.Size([0, 0])
        plan.items = [
            dcp.planner.ReadItem(
                item.type, item.dest_index, zeros, item.storage_index,
                torch.Size([low, 0]), torch.Size([high - low, 6]),
            )
            for low, high in self.rows
        ]  # fmt: skip
        return plan

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        low = int(read_item.storage_offsets[0])
        return self.target[low : low + int(read_item.lengths[0])]


def test_parts_of_a_tensor_without_checks_may_overlap(folder: Path) -> None:
    target = torch.zeros(4, 6)
    planner = OfParts(target, (2, 3), (0, 4), (1, 2))
    reader = FileSystemReader(folder, verify="off", thread_count=1)
    dcp.load({"w": torch.zeros(4, 6)}, storage_reader=reader, planner=planner)
    assert torch.equal(target, state()["w"])


class TestTargetsOfOtherLayouts:
    """A tensor of several blocks, loaded whole into memory that is not like the file."""

    SHAPE = (96, 2048)

    @pytest.fixture
    def full(self, tmp_path: Path) -> torch.Tensor:
        full = torch.arange(96 * 2048, dtype=torch.float32).reshape(self.SHAPE)
        dcp.save({"w": full}, checkpoint_id=tmp_path)
        (path,) = tmp_path.glob("*.distcp")
        bad = bytearray(path.read_bytes())
        bad[200_000] ^= 1
        path.write_bytes(bad)
        return full

    @pytest.mark.parametrize(
        "layout",
        [
            "plain",
            "transposed",
            "double",
            pytest.param(
                "padded",
            ),
        ],
    )
    def test_auto_checks_a_tensor_that_is_read_whole(
        self, tmp_path: Path, full: torch.Tensor, layout: str
    ) -> None:
        target = {
            "plain": lambda: torch.zeros(96, 2048),
            "transposed": lambda: torch.zeros(2048, 96).t(),
            "double": lambda: torch.zeros(96, 2048, dtype=torch.float64),
            "padded": lambda: torch.zeros(96, 4096)[:, :2048],
        }[layout]()
        assert outcome(tmp_path, {"w": full}, {"w": target}) not in (None, "wrong")

    @pytest.mark.parametrize("layout", ["transposed", "double", "padded"])
    def test_full_checks_it_always(self, tmp_path: Path, full: torch.Tensor, layout: str) -> None:
        target = {
            "transposed": lambda: torch.zeros(2048, 96).t(),
            "double": lambda: torch.zeros(96, 2048, dtype=torch.float64),
            "padded": lambda: torch.zeros(96, 4096)[:, :2048],
        }[layout]()
        assert outcome(tmp_path, {"w": full}, {"w": target}, "full") not in (None, "wrong")


def test_auto_checks_blocks_on_the_edge_of_a_staging_buffer(tmp_path: Path) -> None:
    full = torch.arange(1_500_000, dtype=torch.float32).reshape(1500, 1000)
    dcp.save({"w": full}, checkpoint_id=tmp_path)
    (path,) = tmp_path.glob("*.distcp")
    whole = path.read_bytes()
    for at in range(4 << 20, (4 << 20) + 4 * BLOCK, BLOCK // 4):
        bad = bytearray(whole)
        bad[at - 2 * BLOCK] ^= 1
        path.write_bytes(bad)
        target = {"w": torch.zeros(1500, 1000, dtype=torch.float64)}
        got = outcome(tmp_path, {"w": full.double()}, target)
        assert got == path.name, at


@pytest.mark.parametrize("rows", [(0, 2), (1, 3), (2, 4)])
def test_full_checks_a_part_of_a_small_tensor(folder: Path, rows: tuple[int, int]) -> None:
    """Damage that auto may miss by design: in blocks of which only a part is read."""
    (path,) = folder.glob("*.distcp")
    whole = path.read_bytes()
    part = state()["w"][rows[0] : rows[1]]
    at = whole.index(part.numpy().tobytes())
    bad = bytearray(whole)
    bad[at + 5] ^= 4
    path.write_bytes(bad)

    target = torch.zeros(4, 6)
    reader = FileSystemReader(folder, verify="full")
    with pytest.raises(dcp.CheckpointException, match="checksum"):
        dcp.load({"w": target}, storage_reader=reader, planner=OfParts(target, rows))
