"""`pytest-dcp reshard`: a checkpoint cut into the parts of other ranks, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pytest_dcp.checkpoint as dcp
from pytest_dcp._cli.main import main
from pytest_dcp._engine.conversion.converted_contents import ConvertedContents
from pytest_dcp._engine.resharding.placement_texts import PlacementRules
from pytest_dcp._engine.resharding.reshard import reshard
from pytest_dcp.faults import FaultyStorage
from support.states import numbered

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "one"
    state = {
        "model": {"w": numbered(10, 6), "bias": numbered(3), "scale": torch.tensor(2.0)},
        "empty": torch.zeros(0, 4),
        "state": {0: {"step": 7}},
    }
    dcp.save(state, checkpoint_id=folder)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def read_json(command: Command, *arguments: object) -> Any:
    code, out, err = command(*arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def shapes_of(folder: Path, name: str) -> list[tuple[int, ...]]:
    with dcp.open(folder) as checkpoint:
        lazy: Any = checkpoint[name]
        return [shard.shape for shard in lazy.shards]


def test_ranks_get_their_share_of_rows(command: Command, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "four"
    found = read_json(command, "reshard", source, target, "--ranks", 4)
    assert shapes_of(target, "model.w") == [(3, 6), (3, 6), (3, 6), (1, 6)]
    assert shapes_of(target, "model.scale") == [()]
    assert (found["mesh"], found["tensors"], found["values"]) == ([4], 4, 1)
    assert found["largest_chunk_bytes"] == 3 * 6 * 4  # one part at a time is in memory
    assert command("diff", source, target)[0] == 0
    assert command("verify", target)[0] == 0
    state: dict[str, Any] = {"model": {"w": torch.zeros(10, 6)}, "state": {0: {"step": 0}}}
    dcp.load(state, checkpoint_id=target)
    assert torch.equal(state["model"]["w"], numbered(10, 6))
    assert state["state"] == {0: {"step": 7}}
    code, out, _ = command("reshard", target, tmp_path / "one", "--ranks", 1)
    assert (code, out.endswith("4 tensors in 4 parts, 1 values, 256 B, of 1 ranks\n")) == (0, True)


def test_a_mesh_with_placements(command: Command, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "mesh"
    options = ["--mesh", "2x3", "--placements", "S0,S(1)", "--placements", "*.bias=R,R"]
    read_json(command, "reshard", source, target, *options)
    assert shapes_of(target, "model.w") == [(5, 2)] * 6
    assert shapes_of(target, "model.bias") == [(3,)]
    assert command("diff", source, target)[0] == 0
    # In place: the parts are read from files that stay until the commit.
    read_json(command, "reshard", target, target, "--ranks", 2)
    assert shapes_of(target, "model.w") == [(5, 6)] * 2
    assert command("diff", source, target)[0] == 0


def test_other_formats_are_cut_too(command: Command, tmp_path: Path) -> None:
    save_file({"w": numbered(4, 2)}, tmp_path / "w.safetensors")
    read_json(command, "reshard", tmp_path / "w.safetensors", tmp_path / "two", "--ranks", 2)
    assert shapes_of(tmp_path / "two", "w") == [(2, 2)] * 2


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_failure_leaves_the_target_as_it_was(
    command: Command,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    *,
    is_there: bool,
) -> None:
    target = tmp_path / "target"
    if is_there:
        dcp.save({"old": torch.ones(3)}, checkpoint_id=target)
    before = sorted(os.listdir(target)) if is_there else None
    read, count = ConvertedContents.read_parts, 0

    def fail_late(contents: ConvertedContents, parts: Any) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise error
        read(contents, parts)

    monkeypatch.setattr(ConvertedContents, "read_parts", fail_late)
    code, out, _ = command("reshard", source, target, "--ranks", 4)
    assert (code, out) == (130 if isinstance(error, KeyboardInterrupt) else 2, "")
    assert count == 6
    if is_there:
        assert sorted(os.listdir(target)) == before
        assert command("ls", target)[1].splitlines()[1].startswith("old")
    else:
        assert not target.exists()


def test_a_crash_leaves_the_old_target_or_the_new_one(
    faulty_storage: FaultyStorage, checkpoint_dir: Path, tmp_path: Path
) -> None:
    old, new = {"w": numbered(6, 4)}, {"w": numbered(6, 4, start=100)}
    dcp.save(new, checkpoint_id=tmp_path / "new")
    target = checkpoint_dir / "target"
    dcp.save(old, checkpoint_id=target)
    with faulty_storage.record() as trace:
        reshard(tmp_path / "new", target, (3,), PlacementRules.parse(["S0"], 1))

    def load(state: dict[str, Any], checkpoint_id: Path) -> None:
        state.clear()
        with dcp.open(checkpoint_id / "target") as opened:
            state.update(opened.read(list(opened)))

    count = 0
    for state in trace.crash_states(model="posix", budget=60):
        faulty_storage.assert_loads_one_of(state, old, new, load=load)
        count += 1
    assert count >= 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "takes --ranks N, or --mesh"),
        (["--ranks", "2", "--mesh", "2"], "takes --ranks N, or --mesh"),
        (["--mesh", "2x2"], "needs --placements"),
        (["--mesh", "2*2", "--placements", "S0,R"], "a mesh is its sides"),
        (["--mesh", "2x2", "--placements", "S0"], "one for each"),
        (["--ranks", "2", "--placements", "T0"], "'T0'"),
        (["--ranks", "2", "--placements", "none*=R"], "match no tensor"),
        (["--ranks", "2", "--placements", "*.bias=S1"], "model.bias"),
        (["--ranks", "2", "--placements", "S0", "--placements", "S1"], "given twice"),
        (["--ranks", "10000000"], "cannot be simulated"),
    ],
)
def test_refusals(
    command: Command,
    source: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    code, out, err = command("reshard", source, tmp_path / "x", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert list(tmp_path.iterdir()) == []
    code, _, err = command("reshard", source, "s3://bucket/x", "--ranks", 2)
    assert (code, "is a URL" in err) == (2, True)
