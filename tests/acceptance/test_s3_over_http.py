"""S3 over HTTP, by s3fs: saves, loads, ranges, the command line, and a run's steps; with refusals
(503 Slow Down) and with listings that are out of date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import pytest_dcp.checkpoint as dcp
from pytest_dcp._cli.main import main
from pytest_dcp.checkpoint import CheckpointManager
from pytest_dcp.checkpoint.convert import to_dcp, to_safetensors, to_torch_save
from support.s3_server import BUCKET, S3Server, close_clients, serve_s3, set_credentials

NEEDED = ("s3fs", "moto", "flask", "flask_cors")
MISSING = [name for name in NEEDED if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs the extra s3: {MISSING}"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((64, 32), float(step)), "step": step}


def blank() -> dict[str, Any]:
    return {"w": torch.zeros(64, 32), "step": -1}


def loaded_step(url: str) -> int:
    """The step of the checkpoint at a URL, whose bytes are those of this step."""
    state = blank()
    dcp.load(state, checkpoint_id=url)
    assert torch.equal(state["w"], state_of(state["step"])["w"])
    step: int = state["step"]
    return step


@pytest.fixture(scope="module")
def module_server() -> Iterator[S3Server]:
    import s3fs

    with pytest.MonkeyPatch.context() as patch, serve_s3() as server:
        set_credentials(patch, server.url)
        patch.setattr(s3fs.S3FileSystem, "retries", 2)  # of 5: refused for good is known sooner
        yield server
        close_clients()


@pytest.fixture
def server(module_server: S3Server) -> Iterator[S3Server]:
    module_server.reset()
    yield module_server
    module_server.reset()


@pytest.fixture
def url(server: S3Server, request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name}"


# Checkpoints.


def test_a_checkpoint_is_saved_and_overwritten_by_its_url(server: S3Server, url: str) -> None:
    for step in (1, 2):
        dcp.save(state_of(step), checkpoint_id=url)
        assert loaded_step(url) == step
    names = [key for key in server.objects() if key.startswith(url.removeprefix(f"s3://{BUCKET}/"))]
    assert len(names) == 2  # the index and one data file: the first save's is removed


@pytest.mark.world_size(2)
def test_two_ranks_save_and_load_by_url(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    with serve_s3() if rank == 0 else nullcontext() as server:
        address = [server.url if server else ""]
        dist.broadcast_object_list(address, src=0)
        set_credentials(monkeypatch, address[0])
        url = f"s3://{BUCKET}/both"
        mesh = DeviceMesh("cpu", list(range(2)))
        for step in (1, 2):
            whole = torch.arange(600.0).reshape(30, 20) + step
            state = {"w": distribute_tensor(whole, mesh, [Shard(0)]), f"own{rank}": step + rank}
            dcp.save(state, checkpoint_id=url)
            target = {"w": distribute_tensor(torch.zeros(30, 20), mesh, [Shard(1)])}
            dcp.load(target, checkpoint_id=url, keys="w")
            assert torch.equal(target["w"].full_tensor(), whole)
            assert dcp.load_without_template({f"own{1 - rank}"}, checkpoint_id=url) == {
                f"own{1 - rank}": step + 1 - rank
            }
        with CheckpointManager(f"s3://{BUCKET}/run", keep_last=2) as manager:
            for step in (1, 2, 3):
                manager.save(step, state_of(step))
            assert [step.number for step in manager.steps()] == [2, 3]
            state = blank()
            assert manager.load_latest(state).number == state["step"] == 3
        close_clients()
        dist.barrier()


def test_slices_of_an_opened_checkpoint_are_read_by_ranges(server: S3Server, url: str) -> None:
    big = torch.arange(3_000_000, dtype=torch.float32).reshape(3000, 1000)
    dcp.save({"big": big, "other": big + 1}, checkpoint_id=url)
    with dcp.open_checkpoint(url) as checkpoint:
        server.forget()
        assert torch.equal(checkpoint["big"][700:710], big[700:710])
    ranges = [one.range for one in server.requests if one.method == "GET"]
    (first, last) = (int(end) for end in ranges[0].removeprefix("bytes=").split("-"))
    assert len(ranges) == 1
    assert last + 1 - first == 10 * 1000 * 4


def test_a_long_file_is_sent_in_parts(server: S3Server, url: str) -> None:
    big = torch.arange(5_000_000, dtype=torch.float32)
    writer = dcp.FsspecWriter(url, default_block_size=6 << 20)
    dcp.save({"big": big}, storage_writer=writer)
    parts = [one for one in server.requests if one.method == "PUT" and ".distcp" in one.path]
    assert len(parts) == 4
    target = {"big": torch.zeros(5_000_000)}
    dcp.load(target, checkpoint_id=url)
    assert torch.equal(target["big"], big)


def test_the_command_line_takes_the_url(
    server: S3Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dcp.save(state_of(1), checkpoint_id=url)
    assert main(["ls", url, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed["names"]] == ["w", "step"]
    assert main(["verify", url, "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["problems"] == verified["strays"] == []
    assert verified["bytes_read"] >= 64 * 32 * 4
    assert main(["ls", f"{url}-none"]) == 2


def test_a_checkpoint_is_converted_from_the_url(server: S3Server, url: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    dcp.save(state_of(3), checkpoint_id=url)
    to_safetensors(url, tmp_path / "converted", skip_values=True)
    (file,) = (tmp_path / "converted").glob("*.safetensors")
    assert torch.equal(load_file(file)["w"], state_of(3)["w"])


CONVERSIONS = {"a[1].safetensors": to_safetensors, "folder": to_safetensors, "a*.pt": to_torch_save}


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("a[1].safetensors", ("PUT", "tmp")),
        ("a[1].safetensors", ("PUT", "")),
        ("a[1].safetensors", ("DELETE", "tmp")),
        ("folder", ("PUT", "")),
        ("a*.pt", ("PUT", "")),
    ],
)
def test_a_conversion_to_the_url_leaves_the_old_target_or_the_new_one(
    server: S3Server, url: str, tmp_path: Path, name: str, refused: tuple[str, str]
) -> None:
    states = [state_of(step) for step in (1, 2)]
    for number, state in enumerate(states):
        dcp.save(state, checkpoint_id=tmp_path / str(number))
    target, convert = f"{url}/{name}", CONVERSIONS[name]
    convert(tmp_path / "0", target, include="w")
    method, word = refused
    folder = url.removeprefix("s3://")
    server.refuses = lambda number, request: (
        request.method == method and ("tmp" in request.path) == bool(word)
    )
    with pytest.raises(OSError, match=r"reduce your request rate|503|Slow Down"):
        convert(tmp_path / "1", target, include="w")
    server.reset()
    found = read_target(target)
    assert any(torch.equal(found, state["w"]) for state in states[: 1 + (method == "DELETE")])
    convert(tmp_path / "1", target, include="w")
    assert torch.equal(read_target(target), states[1]["w"])
    left = [key for key in server.objects() if key.startswith(folder.partition("/")[2])]
    assert len([key for key in left if "tmp" not in key]) == (2 if name == "folder" else 1)


def read_target(target: str) -> torch.Tensor:
    with dcp.open(target) as opened:
        return opened.read(["w"])["w"]


# Refusals.


def test_a_save_and_a_load_get_past_single_refusals(server: S3Server, url: str) -> None:
    dcp.save(state_of(1), checkpoint_id=url)
    server.forget()
    server.refuses = lambda number, request: number % 4 == 0
    dcp.save(state_of(2), checkpoint_id=url)
    assert loaded_step(url) == 2
    assert server.refused >= 2


@pytest.mark.parametrize("name", [".metadata", ".distcp"])
def test_a_save_that_is_refused_leaves_the_old_checkpoint(
    server: S3Server, url: str, name: str
) -> None:
    dcp.save(state_of(1), checkpoint_id=url)
    server.refuses = lambda number, request: request.method == "PUT" and name in request.path
    with pytest.raises(dcp.CheckpointException, match="reduce your request rate"):
        dcp.save(state_of(2), checkpoint_id=url)
    server.reset()
    assert loaded_step(url) == 1
    dcp.save(state_of(3), checkpoint_id=url)
    assert loaded_step(url) == 3


def test_a_load_that_is_refused_says_so(server: S3Server, url: str) -> None:
    dcp.save(state_of(1), checkpoint_id=url)
    server.refuses = lambda number, request: bool(request.range)
    with pytest.raises(dcp.CheckpointException, match="reduce your request rate"):
        dcp.load(blank(), checkpoint_id=url)


# The steps of a run.


def numbers(manager: CheckpointManager) -> list[int]:
    return [step.number for step in manager.steps() if step.is_whole]


def manager_of(url: str, **options: Any) -> CheckpointManager:
    return CheckpointManager(url, no_dist=True, **options)


def save_steps(url: str, *steps: int, **options: Any) -> CheckpointManager:
    manager = manager_of(url, **options)
    for step in steps:
        manager.save(step, state_of(step), metrics={"loss": 1 / (1 + step)})
    return manager


def load_latest(url: str) -> int | None:
    """The step that a new process would go on from."""
    state = blank()
    loaded = manager_of(url).load_latest(state)
    assert loaded is None or loaded.number == state["step"]
    return loaded.number if loaded else None


def test_steps_are_kept_by_the_rules_and_removed_without_a_rest(server: S3Server, url: str) -> None:
    assert load_latest(url) is None
    manager = save_steps(url, 1, 2, 3, 4, keep_last=2)
    assert numbers(manager) == [3, 4]
    assert load_latest(url) == 4
    folder = url.removeprefix(f"s3://{BUCKET}/")
    found = {key.removeprefix(folder).split("/")[1] for key in server.objects() if folder in key}
    assert found == {"step-00000003", "step-00000004", "latest.json"}


def test_a_damaged_step_is_passed_over(server: S3Server, url: str) -> None:
    save_steps(url, 1, 2)
    import s3fs

    fs = s3fs.S3FileSystem()
    (data,) = fs.glob(f"{url}/step-00000002/*.distcp")
    fs.pipe_file(data, bytes(fs.info(data)["size"]))
    with pytest.warns(UserWarning, match="step 2 in .* is passed over"):
        assert load_latest(url) == 1
    fs.rm_file(data)
    with pytest.warns(UserWarning, match="step 2 in .* is missing"):
        assert load_latest(url) == 1


def test_the_newest_step_is_found_while_listings_lack_it(server: S3Server, url: str) -> None:
    save_steps(url, 1, keep_last=1)
    server.freeze_listings()
    manager = save_steps(url, 2, 3, keep_last=1)
    assert load_latest(url) == 3
    assert numbers(manager) == [3]
    with pytest.raises(dcp.CheckpointExistsError, match="step 3"):
        save_steps(url, 3)
    assert load_latest(url) == 3


def test_a_removal_under_a_listing_that_is_out_of_date_leaves_no_files(
    server: S3Server, url: str
) -> None:
    server.freeze_listings()
    save_steps(url, 1, 2, keep_last=1)
    step = f"{url.removeprefix(f's3://{BUCKET}/')}/step-00000001"
    assert not [key for key in server.objects() if key.startswith(step)]


def test_steps_get_past_single_refusals(server: S3Server, url: str) -> None:
    server.refuses = lambda number, request: number % 12 == 0
    manager = save_steps(url, 1, 2, keep_last=1)
    assert load_latest(url) == 2
    assert server.refused >= 2
    server.reset()
    assert numbers(manager) == [2]


def test_an_earlier_step_is_never_loaded_because_a_request_was_refused(
    server: S3Server, url: str
) -> None:
    manager = save_steps(url, 1, 2)
    server.refuses = lambda number, request: "02/" in request.path
    with pytest.raises(OSError, match=r"reduce your request rate|503|Slow Down"):
        load_latest(url)
    server.reset()
    assert load_latest(url) == 2
    assert numbers(manager) == [1, 2]


def test_a_refused_removal_is_a_warning_and_ends_with_the_next_save(
    server: S3Server, url: str
) -> None:
    manager = save_steps(url, 1, keep_last=1)
    server.refuses = lambda number, request: request.method == "DELETE" and "01/" in request.path
    with pytest.warns(UserWarning, match="old steps in .* were not removed"):
        manager.save(2, state_of(2))
    server.reset()
    assert load_latest(url) == 2
    manager.save(3, state_of(3))
    assert numbers(manager) == [3]


@pytest.fixture
def options(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Options that lead to the server, which the environment no longer names."""
    close_clients()  # clients are shared by their options, and these have seen the address
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # refuses connections
    yield {"endpoint_url": server.url, "key": "nothing", "secret": "secret"}
    close_clients()


def test_storage_options_reach_every_part_of_the_manager(url: str, options: dict[str, Any]) -> None:
    manager = save_steps(url, 1, 2, keep_last=1, check="checksums", storage_options=options)
    manager.async_save(3, state_of(3))
    manager.wait()
    state = blank()
    loaded = manager.load_latest(state)
    assert loaded is not None
    assert loaded.number == state["step"] == 3
    assert [step.number for step in manager.steps()] == [3]


def test_storage_options_reach_every_verb(url: str, options: dict[str, Any]) -> None:
    at_url: dict[str, Any] = {"checkpoint_id": url, "storage_options": options}
    dcp.save(state_of(1), **at_url)
    dcp.async_save(state_of(2), **at_url).result()
    state = blank()
    dcp.load(state, **at_url)
    assert state["step"] == 2
    assert dcp.load_without_template("step", **at_url) == {"step": 2}
    with dcp.open(url, storage_options=options) as checkpoint:
        assert torch.equal(checkpoint["w"][:1], state["w"][:1])


def test_storage_options_reach_the_source_and_the_target_of_a_conversion(
    url: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to: dict[str, Any] = {"storage_options": options}
    dcp.save(state_of(1), checkpoint_id=url, **to)
    to_safetensors(url, f"{url}/folder", include="w", **to)
    to_torch_save(f"{url}/folder", f"{url}/state.pt", **to)
    to_dcp(f"{url}/state.pt", f"{url}/again", **to)
    given = [f"--storage-option={key}={value}" for key, value in options.items()]
    target = tmp_path / "a.safetensors"
    assert main(["convert", f"{url}/again", str(target), *given]) == 0
    assert main(["convert", str(target), f"{url}/b.safetensors", *given]) == 0
    with dcp.open(f"{url}/b.safetensors", **to) as opened:
        assert torch.equal(opened.read(["w"])["w"], state_of(1)["w"])
    with pytest.raises(ValueError, match="is on a local disk"):
        to_safetensors(target, tmp_path / "b.safetensors", **to)
    capsys.readouterr()


def test_storage_options_reach_the_process_of_a_background_save(
    url: str, options: dict[str, Any]
) -> None:
    process = dcp.AsyncCheckpointerType.PROCESS
    at_url: dict[str, Any] = {"checkpoint_id": url, "storage_options": options}
    dcp.async_save(state_of(4), async_checkpointer_type=process, **at_url).result()
    assert dcp.load_without_template("step", **at_url) == {"step": 4}


def test_storage_options_reach_every_command(
    url: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{url}/run"
    for step in (1, 2):
        target = f"{run}/step-{step}"
        dcp.save(state_of(step), checkpoint_id=target, storage_options=options)
        dcp.save(state_of(step), checkpoint_id=tmp_path / f"step-{step}")
    one, two = f"{run}/step-1", f"{run}/step-2"
    flags = [f"--storage-option={key}={value}" for key, value in options.items()]
    for code, words in [
        (0, ["ls", one]),
        (0, ["show", one, "w"]),
        (0, ["show", one, "--html", str(tmp_path / "page.html")]),
        (0, ["verify", one]),
        (1, ["diff", one, two]),
        (0, ["diff", one, str(tmp_path / "step-1")]),  # the options are for the URL alone
        (0, ["diff", str(tmp_path / "step-2"), two]),
        (0, ["reshard", one, str(tmp_path / "resharded"), "--ranks", "2"]),
        (0, ["bisect", run, "--name", "w", "--test", "norm>50"]),
    ]:
        assert main([*words, *flags]) == code, (words, capsys.readouterr())
    assert "step-2: w" in capsys.readouterr().out


def test_incremental_steps_share_files(url: str) -> None:
    frozen = torch.arange(100_000.0)
    with CheckpointManager(url, incremental=True, keep_last=2, no_dist=True) as manager:
        for step in (1, 2, 3):
            manager.save(step, state_of(step) | {"frozen": frozen})
        state = blank() | {"frozen": torch.zeros(100_000)}
        loaded = manager.load_latest(state)
        assert loaded is not None
        assert (loaded.number, state["step"]) == (3, 3)
        assert torch.equal(state["frozen"], frozen)
        assert [step.checked for step in manager.steps(check="checksums")] == ["checksums"] * 2
        second, third = manager.measure()
    assert second.own_nbytes + third.own_nbytes < frozen.nbytes < third.nbytes
    assert main(["verify", f"{url}/step-00000003"]) == 0
    assert main(["diff", f"{url}/step-00000002", f"{url}/step-00000002"]) == 0
    assert main(["gc", url, "--idle"]) == 0
