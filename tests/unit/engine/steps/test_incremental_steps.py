"""Incremental steps in one process: what is shared, what is written, what a removal leaves."""

from __future__ import annotations

import itertools
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.steps import block_hash, block_matches, incremental_writer, increments
from pytest_dcp._engine.steps.file_sharing import Linking
from support.incremental_runs import (
    SHARED,
    assert_holds,
    blank_like,
    bytes_on_disk,
    data_files,
    folder_of,
    incremental,
    mostly_frozen,
    save_all,
)
from support.runs import manager_of, whole_steps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


# What is written.


class Adapted(torch.nn.Module):
    """Frozen layers with adapters of low rank, as LoRA has them."""

    def __init__(self) -> None:
        super().__init__()
        layers = range(4)
        self.frozen = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in layers)
        self.frozen.requires_grad_(False)
        self.down = torch.nn.ModuleList(torch.nn.Linear(1024, 1, bias=False) for _ in layers)
        self.up = torch.nn.ModuleList(torch.nn.Linear(1, 1024, bias=False) for _ in layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for frozen, down, up in zip(self.frozen, self.down, self.up, strict=True):
            x = frozen(x) + up(down(x))
        return x


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 1024)).square().mean().backward()
    optimizer.step()


def test_ten_steps_of_adapters_take_little_more_than_one(root: Path) -> None:
    torch.manual_seed(0)
    model = Adapted()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    manager = incremental(root)
    for step in range(10):
        train(model, optimizer)
        manager.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert bytes_on_disk(root) <= 1.1 * bytes_on_disk(folder_of(root, 0))
    assert whole_steps(manager) == list(range(10))


def test_a_state_that_has_not_changed_writes_no_data_file(root: Path) -> None:
    manager = incremental(root)
    state = {"w": SHARED, "step": 3}
    save_all(manager, {1: state, 2: state})
    assert data_files(root, 2) == data_files(root, 1)
    assert_holds(folder_of(root, 2), state)


def test_a_state_that_has_changed_everywhere_shares_nothing(root: Path) -> None:
    manager = incremental(root)
    save_all(manager, {step: {"w": SHARED * step} for step in (1, 2)})
    assert not data_files(root, 1).keys() & data_files(root, 2).keys()


def test_frozen_data_is_copied_once_at_most(root: Path) -> None:
    """Most of the first file is out of date at once; the rest of it moves to a file of its own."""
    frozen = torch.rand(400_000)
    states = {
        step: {"a": torch.rand(900_000), "frozen": frozen, "z": torch.rand(100_000)}
        for step in range(1, 6)
    }
    manager = incremental(root, keep_last=1)
    kept = []
    for step, state in states.items():
        manager.save(step, state)
        live = sum(tensor.nbytes for tensor in state.values())
        assert bytes_on_disk(root) < 2 * live
        kept.append(set(data_files(root, step)))
        assert_holds(folder_of(root, step), state)
    assert not kept[0] & kept[1]
    (apart,) = kept[1] & kept[2]
    assert all(apart in names for names in kept[1:])


def test_a_run_that_changes_a_little_everywhere_refers_to_few_files(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_matches, "MOST_FILES", 4)
    state: dict[str, Any] = {f"w{n}": torch.rand(3000) for n in range(12)}
    manager = incremental(root, keep_last=1)
    for step in range(24):
        state[f"w{step % 12}"] = torch.rand(3000)
        manager.save(step, state)
        assert len(data_files(root, step)) <= 6
        assert_holds(folder_of(root, step), state)


def test_equal_blocks_are_found_under_other_names(root: Path) -> None:
    manager = incremental(root)
    manager.save(1, {"w": SHARED})
    manager.save(2, {"renamed": SHARED.clone()})
    assert data_files(root, 2) == data_files(root, 1)
    assert_holds(folder_of(root, 2), {"renamed": SHARED})


@pytest.mark.parametrize(
    "other",
    [SHARED.view(torch.int32), SHARED.reshape(200, 300), SHARED.t().contiguous(), SHARED[:, :199]],
    ids=["dtype", "shape", "order", "length"],
)
def test_equal_bytes_of_another_kind_are_no_equal_block(root: Path, other: torch.Tensor) -> None:
    manager = incremental(root)
    manager.save(1, {"w": SHARED})
    manager.save(2, {"w": other})
    assert not data_files(root, 1).keys() & data_files(root, 2).keys()
    assert_holds(folder_of(root, 2), {"w": other})


def test_a_change_of_the_last_element_is_seen(root: Path) -> None:
    manager = incremental(root)
    changed = SHARED.clone()
    changed[-1, -1] += 1
    save_all(manager, {1: {"w": SHARED}, 2: {"w": changed}})
    assert_holds(folder_of(root, 1), {"w": SHARED})
    assert_holds(folder_of(root, 2), {"w": changed})


def test_strided_empty_and_scalar_tensors_come_back(root: Path) -> None:
    state = {
        "strided": SHARED.t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "bool": torch.tensor([True, False]),
        "half": torch.ones(70_000, dtype=torch.bfloat16),
    }
    manager = incremental(root)
    save_all(manager, dict.fromkeys((1, 2, 3), state))
    for step in (1, 2, 3):
        assert_holds(folder_of(root, step), state)
    assert data_files(root, 1).keys() & data_files(root, 3).keys()


def test_python_values_are_shared_by_their_bytes(root: Path) -> None:
    text = "text" * 50_000
    manager = incremental(root)
    save_all(manager, {1: {"text": text, "step": 1}, 2: {"text": text, "step": 2}})
    assert data_files(root, 1).keys() < data_files(root, 2).keys()
    assert_holds(folder_of(root, 2), {"text": text, "step": 2})


def test_background_saves_are_incremental(root: Path) -> None:
    manager = incremental(root)
    states = {step: mostly_frozen(step) for step in (1, 2, 3)}
    for step, state in states.items():
        manager.async_save(step, state)
    manager.wait()
    assert data_files(root, 1).keys() < data_files(root, 2).keys()
    for step, state in states.items():
        assert_holds(folder_of(root, step), state)


def test_a_background_save_within_a_budget_of_memory_is_incremental(root: Path) -> None:
    manager = incremental(root)
    states = {step: mostly_frozen(step) for step in (1, 2)}
    for step, state in states.items():
        manager.async_save(step, state, staging_budget=0)
    manager.wait()
    assert data_files(root, 1).keys() < data_files(root, 2).keys()
    assert_holds(folder_of(root, 2), states[2])


@pytest.mark.parametrize("options", [{"thread_count": 3}, {"single_file_per_rank": False}], ids=str)
def test_writers_of_several_files_share_them(
    root: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = incremental_writer.IncrementalWriter.__init__

    def with_options(self: Any, *args: Any) -> None:
        plain(self, *args, **options)

    monkeypatch.setattr(incremental_writer.IncrementalWriter, "__init__", with_options)
    manager = incremental(root)
    first = {f"w{n}": torch.rand(20_000 + n) for n in range(6)}
    second = first | {"w3": torch.rand(20_003)}
    save_all(manager, {1: first, 2: second, 3: second})
    for step, state in ((1, first), (2, second), (3, second)):
        assert_holds(folder_of(root, step), state)
    assert data_files(root, 1).keys() & data_files(root, 2).keys()
    assert data_files(root, 3) == data_files(root, 2)


def test_progress_counts_blocks_that_are_not_written(root: Path) -> None:
    manager = incremental(root)
    reports: list[Any] = []
    manager.save(1, mostly_frozen(1))
    manager.save(2, mostly_frozen(2), progress=reports.append)
    assert reports[-1].done_bytes == reports[-1].total_bytes > SHARED.nbytes


# A step's folder is a checkpoint of its own.


def test_torch_reads_a_step_alone(root: Path, tmp_path: Path) -> None:
    states = {step: mostly_frozen(step) for step in (1, 2, 3)}
    save_all(incremental(root), states)
    shutil.copytree(folder_of(root, 3), tmp_path / "copy")
    shutil.rmtree(root)
    state = blank_like(states[3])
    reader = torch_dcp.FileSystemReader(tmp_path / "copy")
    torch_dcp.load(state, storage_reader=reader, no_dist=True)
    assert torch.equal(state["frozen"], SHARED)
    assert torch.equal(state["moving"], states[3]["moving"])
    assert state["step"] == 3


def test_each_step_passes_a_check_of_every_byte(root: Path) -> None:
    manager = incremental(root)
    save_all(manager, {step: mostly_frozen(step) for step in (1, 2, 3)})
    assert [step.problem for step in manager.steps(check="checksums")] == [None] * 3


def test_a_removal_never_breaks_another_step(saved_run: Path, tmp_path: Path) -> None:
    for order in itertools.permutations(range(1, 5)):
        root = tmp_path / "-".join(map(str, order))
        subprocess.run(["cp", "-a", saved_run, root], check=True)
        manager = incremental(root)
        there = set(order)
        for step in order:
            manager._run.steps.remove(step)
            there.discard(step)
            for number in there:
                assert_holds(folder_of(root, number), shifted_state(number))
        assert bytes_on_disk(root) < 1000


def shifted_state(step: int) -> dict[str, Any]:
    """Each part changes at another step, so a step refers to files of all before it."""
    return {f"w{n}": torch.full((20_000,), float(max(step - n, 0))) for n in range(4)}


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "run"
    save_all(incremental(root), {step: shifted_state(step) for step in range(1, 5)})
    shared = [data_files(root, step).keys() for step in range(1, 5)]
    assert shared[0] & shared[1]
    assert shared[1] & shared[2]
    return root


def test_retention_frees_files_without_a_step(root: Path) -> None:
    manager = incremental(root, keep_last=1)
    for step in range(1, 6):
        manager.save(step, mostly_frozen(step))
    assert whole_steps(manager) == [5]
    assert bytes_on_disk(root) < SHARED.nbytes + 30_000


def test_measures_tell_own_bytes_from_shared_ones(root: Path) -> None:
    manager = incremental(root)
    save_all(manager, {step: mostly_frozen(step) for step in (1, 2)})
    one, two = manager.measure()
    before = bytes_on_disk(root)
    assert one.nbytes > SHARED.nbytes
    assert two.nbytes > SHARED.nbytes
    assert max(one.own_nbytes, two.own_nbytes) < 20_000
    manager.remove_after(1)
    assert before - bytes_on_disk(root) == two.own_nbytes
    (alone,) = manager.measure()
    assert alone.nbytes == alone.own_nbytes == one.nbytes


def test_a_writer_can_be_sent_to_another_process(root: Path) -> None:
    sharing = Linking(None, Folder(LocalDisk(), root))
    writer = incremental_writer.IncrementalWriter(root, "sha256", None, sharing)
    assert pickle.loads(pickle.dumps(writer)).hash_name == "sha256"


# Full steps.


def test_every_third_save_is_full_also_after_a_restart(root: Path) -> None:
    shared = []
    for step in range(1, 8):
        with incremental(root, full_every=3) as manager:
            manager.save(step, mostly_frozen(step))
        names = data_files(root, step).keys()
        shared.append(bool(step > 1 and names & data_files(root, step - 1).keys()))
    assert shared == [False, True, True, False, True, True, False]


def test_steps_saved_in_full_can_be_referred_to_once_they_have_hashes(root: Path) -> None:
    with manager_of(root) as manager:
        manager.save(1, mostly_frozen(1))
    with incremental(root) as manager:
        save_all(manager, {step: mostly_frozen(step) for step in (2, 3)})
    assert not data_files(root, 1).keys() & data_files(root, 2).keys()
    assert data_files(root, 2).keys() < data_files(root, 3).keys()
    with manager_of(root) as manager:
        manager.save(4, mostly_frozen(4))
        assert whole_steps(manager) == [1, 2, 3, 4]


def test_a_hash_that_is_not_installed_makes_one_full_step(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("blake3")
    save_all(incremental(root), {1: mostly_frozen(1)})
    makers = {"sha256": block_hash.HASH_MAKERS["sha256"]}
    for module in (block_hash, increments, incremental_writer):
        monkeypatch.setattr(module, "HASH_MAKERS", makers)
    monkeypatch.setattr(increments, "BEST_HASH", "sha256")
    save_all(incremental(root), {step: mostly_frozen(step) for step in (2, 3)})
    monkeypatch.undo()
    save_all(incremental(root), {4: mostly_frozen(4)})
    assert not data_files(root, 1).keys() & data_files(root, 2).keys()
    assert data_files(root, 2).keys() < data_files(root, 3).keys()
    assert data_files(root, 2).keys() < data_files(root, 4).keys()
    assert_holds(folder_of(root, 4), mostly_frozen(4))
