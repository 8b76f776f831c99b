"""Checkpoints converted between formats, read back by the formats' own readers; interruptions."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.conversion import whole_file
from pytest_dcp._engine.huggingface.consolidated_folder import ConsolidatedFolder
from pytest_dcp._engine.io.folder import Folder
from pytest_dcp._engine.io.local_disk import LocalDisk
from pytest_dcp._engine.io.local_file import LocalOut
from pytest_dcp.checkpoint import convert
from pytest_dcp.errors import CheckpointMismatchError
from pytest_dcp.faults import FaultyStorage
from support.checkpoint_formats import VALUES, nest_model, save_in_each_format
from support.states import bits, numbered, same, torch_dcp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
ENDS = re.compile("No space left|KeyboardInterrupt")


def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.layers.0.wq": numbered(40, 30),
        "model.layers.1.wq": numbered(6, 5, 4, start=500),
        "model.bfloat16": numbered(9, dtype=torch.bfloat16),
        "model.scalar": torch.tensor(2.5, dtype=torch.float64),
        "model.empty": torch.empty(0, 3),
        "model.mask": torch.tensor([True, False]),
        "model.float8": torch.ones(5).to(torch.float8_e4m3fn),
    }


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint of each format."""
    return save_in_each_format(tmp_path_factory.mktemp("samples"), tensors())


SOURCES = ["ours", "torchs", "state.pt", "one.safetensors", "hf"]


def equal_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        (one[k].dtype, one[k].shape) == (other[k].dtype, other[k].shape)
        and torch.equal(bits(one[k]), bits(other[k]))
        for k in one
    )


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face folder, by its index and the format's own reader."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name, file in weight_map.items():
        with safe_open(folder / file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            found[name] = opened.get_tensor(name)
    assert {*weight_map.values()} == {file.name for file in folder.glob("*.safetensors")}
    return found


def read_dcp(folder: Path) -> dict[str, Any]:
    with dcp.open(folder) as opened:
        return {k: v.value() if isinstance(v, dcp.LazyValue) else v.tensor()
                for k, v in opened.items()}  # fmt: skip


class TestFormats:
    @pytest.mark.parametrize("source", SOURCES)
    def test_to_one_safetensors_file(self, samples: Path, tmp_path: Path, source: str) -> None:
        target = tmp_path / "all.safetensors"
        report = convert.to_safetensors(samples / source, target, skip_values=True)
        assert equal_bits(load_file(target), tensors())
        assert os.listdir(tmp_path) == [target.name]
        assert (report.tensors, report.values) == (len(tensors()), 0)
        assert set(report.left_out) == (
            set() if "safetensors" in source or source == "hf" else {*VALUES}
        )
        assert report.nbytes == sum(t.numel() * t.itemsize for t in tensors().values())
        assert not report.converted_dtypes

    @pytest.mark.parametrize("source", SOURCES)
    def test_to_a_folder_of_hugging_face(self, samples: Path, tmp_path: Path, source: str) -> None:
        target = tmp_path / "folder"
        convert.to_safetensors(
            samples / source, target, skip_values=True, max_file_bytes=3000, thread_count=2
        )
        assert equal_bits(read_folder(target), tensors())
        assert len(list(target.glob("*.safetensors"))) > 1

    @pytest.mark.parametrize("source", SOURCES)
    def test_to_a_folder_of_dcp(self, samples: Path, tmp_path: Path, source: str) -> None:
        report = convert.to_dcp(samples / source, tmp_path / "step")
        found = read_dcp(tmp_path / "step")
        values = {name: found.pop(name) for name in VALUES if name in found}
        assert values == ({} if "safetensors" in source or source == "hf" else VALUES)
        assert equal_bits(found, tensors())
        assert (report.tensors, report.values) == (len(found), len(values))
        targets = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
        torch_dcp.load(targets, checkpoint_id=tmp_path / "step")
        assert equal_bits(targets, tensors())

    @pytest.mark.parametrize("source", SOURCES)
    def test_to_a_file_of_torch_save(self, samples: Path, tmp_path: Path, source: str) -> None:
        report = convert.to_torch_save(samples / source, tmp_path / "state.pt")
        found = torch.load(tmp_path / "state.pt", weights_only=True)
        is_flat = "safetensors" in source or source == "hf"
        assert equal_bits(found, tensors()) if is_flat else same(found, nest_model(tensors()))
        assert report.values == (0 if is_flat else len(VALUES))
        assert os.listdir(tmp_path) == ["state.pt"]

    @pytest.mark.parametrize("source", SOURCES)
    def test_urls_are_sources_and_targets(self, samples: Path, tmp_path: Path, source: str) -> None:
        import fsspec

        memory = fsspec.filesystem("memory")
        memory.put(str(samples / source), f"/converted/{source}", recursive=True)
        try:
            origin, url = f"memory://converted/{source}", "memory://converted"
            for name, function in TARGETS.items():
                function(origin, f"{url}/{name}", include="model.*")
                names = memory.ls(f"/converted/{name}", detail=False)
                assert not [one for one in names if ".tmp" in one]
            convert.to_safetensors(f"{url}/folder", tmp_path / "a.safetensors")
            assert equal_bits(load_file(tmp_path / "a.safetensors"), tensors())
            for name in ("a.safetensors", "step"):
                with dcp.open(f"{url}/{name}") as opened:
                    assert equal_bits(opened.read(list(opened)), tensors())
            memory.get("/converted/state.pt", str(tmp_path / "state.pt"))
            for place in (f"{url}/state.pt", tmp_path / "state.pt"):
                with dcp.open(place) as opened:
                    assert equal_bits(opened.read(list(opened)), tensors())
        finally:
            memory.rm("/converted", recursive=True)

    def test_an_open_checkpoint_is_a_source_and_stays_open(
        self, samples: Path, tmp_path: Path
    ) -> None:
        with dcp.open(samples / "ours") as opened:
            convert.to_dcp(opened, tmp_path / "step")
            convert.to_torch_save(opened, tmp_path / "state.pt")
            assert same(opened["model.layers.0.wq"].tensor(), numbered(40, 30))  # type: ignore[union-attr]  # a tensor

    def test_containers_survive_the_way_there_and_back(self, tmp_path: Path) -> None:
        state = {
            "model": OrderedDict(w=torch.ones(3), b=torch.zeros(2)),
            "optim": {"state": {0: {"exp": torch.randn(7), "step": 3}, 1: {}}, "groups": []},
            "list": [torch.ones(2), {"deep": torch.zeros(1)}],
        }
        dcp.save(state, checkpoint_id=tmp_path / "first")
        convert.to_torch_save(tmp_path / "first", tmp_path / "state.pt")
        convert.to_dcp(tmp_path / "state.pt", tmp_path / "second")
        convert.to_dcp(tmp_path / "second", tmp_path / "third")
        whole = torch.load(tmp_path / "state.pt", weights_only=True)
        for found in (whole, dcp.load_without_template(checkpoint_id=tmp_path / "third")):
            assert same(found, state)
            assert type(found["model"]) is OrderedDict
            assert found["optim"]["state"].keys() == {0, 1}

    def test_a_checkpoint_can_be_converted_in_its_own_folder(self, tmp_path: Path) -> None:
        torch_dcp.save(nest_model(tensors()), checkpoint_id=tmp_path)
        convert.to_dcp(tmp_path, tmp_path, dtype=torch.float64)
        assert read_dcp(tmp_path)["model.layers.0.wq"].dtype is torch.float64
        assert "__0_0.distcp" not in os.listdir(tmp_path)


TARGETS: dict[str, Callable[..., convert.ConversionReport]] = {
    "a.safetensors": convert.to_safetensors,
    "folder": convert.to_safetensors,
    "step": convert.to_dcp,
    "state.pt": convert.to_torch_save,
}


def read_target(path: Path) -> dict[str, Any]:
    if path.name == "a.safetensors":
        return dict(load_file(path))
    if path.name == "folder":
        return dict(read_folder(path))
    return read_dcp(path)


class TestChanges:
    @pytest.mark.parametrize("target", TARGETS)
    def test_names_are_chosen_and_renamed_and_dtypes_cast(
        self, samples: Path, tmp_path: Path, target: str
    ) -> None:
        report = TARGETS[target](
            samples / "ours",
            tmp_path / target,
            include="model.*",
            exclude=["*.float8"],
            rename={"model.": "", "model.layers.1.wq": "second"},
            dtype=torch.bfloat16,
        )
        expected = {}
        for name, tensor in tensors().items():
            if name != "model.float8":
                new = "second" if name == "model.layers.1.wq" else name.removeprefix("model.")
                expected[new] = tensor.bfloat16() if tensor.is_floating_point() else tensor
        assert equal_bits(read_target(tmp_path / target), expected)
        assert set(report.converted_dtypes) == expected.keys() - {"mask", "bfloat16"}

    @pytest.mark.parametrize("target", TARGETS)
    def test_dtypes_by_pattern(self, samples: Path, tmp_path: Path, target: str) -> None:
        dtypes = {"*.scalar": torch.float32, "model.layers.*": torch.float16}
        TARGETS[target](samples / "hf", tmp_path / target, dtype=dtypes)
        found = read_target(tmp_path / target)
        assert found["model.scalar"].dtype is torch.float32
        assert torch.equal(found["model.layers.0.wq"], numbered(40, 30).half())
        assert found["model.bfloat16"].dtype is torch.bfloat16

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"include": "nothing.*"}, "include=['nothing.*'] match nothing in"),
            ({"exclude": ["model.*", "modl"]}, "exclude=['modl'] match nothing in"),
            ({"dtype": {"modl": torch.half}}, "dtype=['modl'] match nothing in"),
            ({"include": "model.*", "exclude": "model.*"}, "is left to convert"),
            ({"rename": {"modl.": "net."}}, "rename changes none of the"),
            ({"rename": lambda name: "w"}, "rename gives 'w' for both"),
            ({"rename": lambda name: ""}, "which is no name"),
        ],
    )
    def test_mistaken_changes_are_refused_in_one_line_before_anything_is_written(
        self, samples: Path, tmp_path: Path, options: dict[str, Any], words: str
    ) -> None:
        for target, function in TARGETS.items():
            with pytest.raises(CheckpointMismatchError) as raised:
                function(samples / "hf", tmp_path / target, **options)
            assert words in str(raised.value)
            assert "\n" not in str(raised.value)
        assert os.listdir(tmp_path) == []

    def test_values_and_foreign_dtypes_do_not_go_to_safetensors(
        self, samples: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointMismatchError, match="hold tensors only, and 3 of the names"):
            convert.to_safetensors(samples / "ours", tmp_path / "folder")
        torch.save({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path / "c.pt")
        with pytest.raises(CheckpointMismatchError, match=r"no dtype for 'w' \(torch.complex128\)"):
            convert.to_safetensors(tmp_path / "c.pt", tmp_path / "folder")
        assert os.listdir(tmp_path) == ["c.pt"]

    def test_other_mistakes(self, samples: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            convert.to_dcp(tmp_path / "none", tmp_path / "step")
        with pytest.raises(FileNotFoundError):
            convert.to_torch_save(samples / "hf", tmp_path / "no" / "folder" / "state.pt")
        with pytest.raises(ValueError, match="budget_bytes must be"):
            convert.to_safetensors(samples / "hf", tmp_path / "folder", budget_bytes=0)
        with pytest.raises(ValueError, match="budget_bytes must be"):
            convert.to_torch_save(samples / "hf", tmp_path / "state.pt", budget_bytes=0)
        assert os.listdir(tmp_path) == []

    def test_empty_paths_and_urls_without_a_file_are_no_targets(
        self, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for function in (convert.to_torch_save, convert.to_safetensors, convert.to_dcp):
            with pytest.raises(ValueError, match="the target is an empty path"):
                function(samples / "hf", "")
        for target in ("memory://a/", "s3://bucket"):
            with pytest.raises(ValueError, match="is no file in a folder"):
                convert.to_torch_save(samples / "hf", target)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("target", ["a.safetensors", "state.pt"])
    def test_a_folder_in_the_targets_place_is_found_before_anything_is_read(
        self, tmp_path: Path, target: str
    ) -> None:
        (tmp_path / target).mkdir()
        with pytest.raises(IsADirectoryError, match=re.escape(target)):
            TARGETS[target](tmp_path / "no source", tmp_path / target)
        with pytest.raises(FileNotFoundError, match=r"folder is missing: .*gone'"):
            TARGETS[target](tmp_path / "no source", tmp_path / "gone" / target)

    @pytest.mark.parametrize(
        ("dtype", "words"),
        [
            ({"c": torch.float32}, "'c' is torch.complex64, and cannot become torch.float32: imag"),
            (torch.quint8, "cannot become torch.quint8: torch does not cast"),
            (torch.uint4, "cannot become torch.uint4: torch does not cast"),
        ],
    )
    def test_casts_that_lose_or_fail_are_refused_before_anything_is_written(
        self, tmp_path: Path, dtype: Any, words: str
    ) -> None:
        torch.save({"c": torch.ones(2, dtype=torch.complex64), "w": numbered(3)}, tmp_path / "s.pt")
        for target, function in TARGETS.items():
            with pytest.raises(CheckpointMismatchError, match=re.escape(words)):
                function(tmp_path / "s.pt", tmp_path / target, dtype=dtype)
            with pytest.raises(TypeError, match=r"must be a torch\.dtype"):
                function(tmp_path / "s.pt", tmp_path / target, dtype={"c": "float32"})
        assert os.listdir(tmp_path) == ["s.pt"]

    @pytest.mark.parametrize("name", ["__metadata__", "broken \udcff"])
    def test_names_that_a_header_cannot_hold_are_refused_in_words(
        self, tmp_path: Path, name: str
    ) -> None:
        torch.save({name: numbered(3)}, tmp_path / "s.pt")
        for target in ("a.safetensors", "folder"):
            with pytest.raises(CheckpointMismatchError, match="cannot hold tensors of the names"):
                convert.to_safetensors(tmp_path / "s.pt", tmp_path / target)
        convert.to_torch_save(tmp_path / "s.pt", tmp_path / "t.pt")
        assert torch.equal(torch.load(tmp_path / "t.pt")[name], numbered(3))

    def test_the_texts_of_the_user_are_in_every_header(self, samples: Path, tmp_path: Path) -> None:
        texts = {"modelspec.title": "höhe"}
        convert.to_safetensors(samples / "hf", tmp_path / "a.safetensors", metadata=texts)
        convert.to_safetensors(
            samples / "hf", tmp_path / "folder", metadata=texts, max_file_bytes=3000
        )
        files = [tmp_path / "a.safetensors", *(tmp_path / "folder").glob("*.safetensors")]
        assert len(files) == 4
        for file in files:
            with safe_open(file, "pt") as opened:
                assert opened.metadata().items() >= texts.items()
        assert equal_bits(read_folder(tmp_path / "folder"), tensors())

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"metadata": {"epoch": 3}}, TypeError),
            ({"metadata": {"DCP_SAVE_ID": "x"}}, ValueError),
            ({"metadata": {"a": "\udcff"}}, ValueError),
            ({"thread_count": 0}, ValueError),
        ],
    )
    def test_impossible_options_of_safetensors(
        self, samples: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception]
    ) -> None:
        for target in ("a.safetensors", "folder"):
            with pytest.raises(error, match=r"metadata|thread_count"):
                convert.to_safetensors(samples / "hf", tmp_path / target, **options)
        assert os.listdir(tmp_path) == []


class TestInterruptions:
    """The target is absent or whole, at whichever write a conversion ends."""

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize(
        ("failure", "overwrites"),
        [(OSError(errno.ENOSPC, "No space left on device"), True), (KeyboardInterrupt(), False)],
    )
    def test_a_failure_at_any_write_leaves_the_target_as_it_was(
        self,
        samples: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        target: str,
        failure: BaseException,
        overwrites: bool,
    ) -> None:
        path = tmp_path / target
        if overwrites:
            TARGETS[target](samples / "hf", path, include="model.mask")
        before = snapshot(tmp_path)
        calls = Countdown(failure, monkeypatch)
        ends = 0
        while not self.converts(calls.fail_at(ends), target, samples / "hf", path):
            ends += 1
            now = snapshot(tmp_path)
            assert is_whole(path) or now == before, (ends, sorted(now), sorted(before))
        calls.stop()
        assert ends >= 2
        assert is_whole(path)

    def converts(self, _: None, target: str, source: Path, path: Path) -> bool:
        """Whether the conversion ends well; any error must be the one that was asked for."""
        try:
            TARGETS[target](source, path, **small(target))
        except (OSError, KeyboardInterrupt, dcp.CheckpointException) as error:
            if not ENDS.search(repr(error) + str(error)):
                raise
            return False
        return True

    def test_another_save_to_the_same_folder_is_named_as_the_reason(
        self, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = ConsolidatedFolder.commit

        def late_commit(self: ConsolidatedFolder, nbytes: int) -> None:
            for unfinished in (tmp_path / "folder").iterdir():
                unfinished.unlink()  # as the other save does after its commit
            commit(self, nbytes)

        monkeypatch.setattr(ConsolidatedFolder, "commit", late_commit)
        with pytest.raises(FileNotFoundError, match="does another save write to the same folder"):
            convert.to_safetensors(samples / "hf", tmp_path / "folder")
        assert os.listdir(tmp_path) == []

    def test_ctrl_c_just_after_the_file_was_made_leaves_nothing(
        self, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.open

        def interrupted(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            fd = real(path, flags, *args, **kwargs)
            if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
                os.close(fd)
                raise KeyboardInterrupt
            return fd

        monkeypatch.setattr(os, "open", interrupted)
        for target in ("a.safetensors", "folder", "state.pt"):
            with pytest.raises(KeyboardInterrupt):
                TARGETS[target](samples / "hf", tmp_path / target)
            monkeypatch.undo()
            assert os.listdir(tmp_path) == [], target
            monkeypatch.setattr(os, "open", interrupted)

    @pytest.mark.parametrize("target", TARGETS)
    def test_a_crash_leaves_the_old_target_or_the_new_one(
        self, samples: Path, faulty_storage: FaultyStorage, checkpoint_dir: Path, target: str
    ) -> None:
        path = checkpoint_dir / target
        options = {"include": "model.layers.*"}
        TARGETS[target](samples / "hf", path, **options)
        with faulty_storage.record() as trace:
            TARGETS[target](samples / "hf", path, **options, dtype=torch.float64)
        old = {k: v for k, v in tensors().items() if "layers" in k}
        new = {k: v.double() for k, v in old.items()}

        def load(state: dict[str, Any], checkpoint_id: Path) -> None:
            state.clear()
            with dcp.open(checkpoint_id / target) as opened:
                state.update(opened.read(list(opened)))

        count = 0
        for state in trace.crash_states(model="posix", budget=60):
            faulty_storage.assert_loads_one_of(state, old, new, load=load)
            count += 1
        assert count >= 10

    @pytest.mark.parametrize("target", ["a.safetensors", "folder", "state.pt"])
    def test_the_next_conversion_removes_the_file_of_a_killed_one(
        self, samples: Path, tmp_path: Path, target: str
    ) -> None:
        program = f"""
import os, signal
from pytest_dcp._engine.io.local_file import LocalOut
from pytest_dcp.checkpoint import convert
write, calls = LocalOut.write, []
def stopping(out, buffers):
    calls.append(write(out, buffers))
    if len(calls) == 3:
        print("stopped", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
LocalOut.write = stopping
convert.{TARGETS[target].__name__}({str(samples / "hf")!r}, {target!r}, budget_bytes=2000)
"""
        path = tmp_path / target
        stranger = tmp_path / f".{target}.0123456789abcdef.tmp"
        stranger.write_bytes(b"a stranger's")
        with subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        ) as killed:
            assert killed.stdout is not None
            assert killed.stdout.readline() == "stopped\n"
            unfinished = [file for file in tmp_path.rglob("*.tmp") if file != stranger]
            assert len(unfinished) == 1
            if target != "folder":  # A folder's saves must not overlap: see the guide.
                TARGETS[target](samples / "hf", path)
                assert unfinished[0].exists()  # its process lives
                path.unlink()
            killed.kill()
        TARGETS[target](samples / "hf", path)
        assert is_whole(path)
        assert list(tmp_path.rglob("*.tmp")) == [stranger]

    def test_a_file_that_another_conversion_removes_at_once_is_made_again(
        self, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, taken = whole_file._locked_file, 0

        def late(path: Path) -> Any:
            nonlocal taken
            taken += 1
            if taken <= 2:
                whole_file.remove_unfinished(Folder(LocalDisk(), tmp_path), "state.pt")
            return real(path)

        # The search itself uses the function too: the first two calls are in it.
        monkeypatch.setattr(whole_file, "_locked_file", late)
        convert.to_torch_save(samples / "hf", tmp_path / "state.pt")
        assert taken >= 3
        assert is_whole(tmp_path / "state.pt")
        assert os.listdir(tmp_path) == ["state.pt"]

    @pytest.mark.parametrize("target", TARGETS)
    def test_a_file_system_that_is_full_half_way_is_an_error_and_leaves_nothing(
        self, tmp_path: Path, target: str
    ) -> None:
        torch.save({f"w{n}": torch.ones(1 << 20, dtype=torch.uint8) for n in range(8)},
                   tmp_path / "source.pt")  # fmt: skip
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, hard))
        try:
            with pytest.raises((OSError, dcp.CheckpointException), match="File too large"):
                TARGETS[target](tmp_path / "source.pt", tmp_path / target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == ["source.pt"]


def small(target: str) -> dict[str, Any]:
    """Options that make many writes."""
    if target == "state.pt":
        return {"budget_bytes": 2000}
    return {"budget_bytes": 2000, "max_file_bytes": 3000} if target == "folder" else {}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    } | {str(p.relative_to(folder)): b"/" for p in folder.rglob("*") if p.is_dir()}


def is_whole(path: Path) -> bool:
    try:
        found = read_target(path)
    except (OSError, dcp.CheckpointError):
        return False
    return equal_bits(found, tensors())


class Countdown:
    """Makes the n-th of these calls fail: writes, syncs, and renames of files."""

    def __init__(self, failure: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
        from pytest_dcp._engine import operating_system

        self.failure = failure
        self.remaining = -1
        places: list[tuple[Any, str]] = [
            (LocalOut, "write"),
            (LocalOut, "sync"),
            (operating_system, "replace_file"),
            (operating_system, "sync_file"),
        ]
        for owner, name in places:
            monkeypatch.setattr(owner, name, self.count(getattr(owner, name)))

    def count(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.remaining == 0:
                self.remaining = -1
                raise self.failure
            if self.remaining > 0:
                self.remaining -= 1
            return call(*args, **kwargs)

        return counted

    def fail_at(self, number: int) -> None:
        assert number < 200
        self.remaining = number

    def stop(self) -> None:
        self.remaining = -1


class TestMemory:
    def test_no_more_than_the_budget_or_the_largest_tensor_is_in_memory(
        self, tmp_path: Path
    ) -> None:
        torch.save({f"w{n}": torch.ones(4 << 20, dtype=torch.uint8) for n in range(24)},
                   tmp_path / "state.pt")  # fmt: skip
        convert.to_dcp(tmp_path / "state.pt", tmp_path / "step")
        program = f"""
import pathlib
from pytest_dcp.checkpoint import convert
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
convert.to_safetensors({str(tmp_path / "step")!r}, "warm.safetensors", include="w0")
convert.to_dcp("warm.safetensors", "warm")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = peak()
convert.to_safetensors({str(tmp_path / "step")!r}, "a.safetensors", budget_bytes=4 << 20)
convert.to_safetensors({str(tmp_path / "step")!r}, "folder", budget_bytes=4 << 20)
convert.to_torch_save({str(tmp_path / "step")!r}, "a.pt", budget_bytes=4 << 20)
convert.to_dcp("a.safetensors", "again")
print(peak() - before)
"""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert int(done.stdout) < 40 << 20  # the state has 96 MiB


class TestOtherLibraries:
    def test_transformers_opens_a_converted_model(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers", reason="the extra `models` is not installed")
        transformers: Any = importlib.import_module("transformers")
        config = transformers.LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = transformers.LlamaForCausalLM(config)
        dcp.save({"net": model.state_dict(), "step": 3}, checkpoint_id=tmp_path / "step")
        config.save_pretrained(tmp_path / "hf")
        convert.to_safetensors(
            tmp_path / "step",
            tmp_path / "hf",
            include="net.*",
            rename={"net.": ""},
            max_file_bytes=4000,
        )
        found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
        assert same(dict(found.state_dict()), dict(model.state_dict()))
        model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
        convert.to_dcp(tmp_path / "theirs", tmp_path / "back")
        again = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
        torch_dcp.load(again, checkpoint_id=tmp_path / "back")
        assert same(again, dict(model.state_dict()))
