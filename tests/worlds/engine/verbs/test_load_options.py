"""Features of `load` beyond torch's: parts, renaming, dtypes, checks, no template, reports.

Also loads during which other saves replace the checkpoint.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from io import IOBase
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import pytest_dcp.checkpoint as dcp
from pytest_dcp._engine.io import lease, open_files
from pytest_dcp._engine.verbs import load_steps
from pytest_dcp.checkpoint.filesystem import FileSystem
from pytest_dcp.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointReplacedError,
    UntrustedPickleError,
)
from support.states import blank, numbered, same, spread, torch_dcp, without_warnings

two = pytest.mark.world_size(2, isolation="module")
ENGINES = pytest.mark.parametrize("engine", [dcp, torch_dcp], ids=["ours", "torchs"])


def nested() -> dict[str, Any]:
    """Tensors and values in mappings and lists, as a trainer keeps them."""
    return {
        "model": {"layers": [{"w": numbered(2, 3)}, {"w": numbered(2, 3, start=7)}]},
        "optim": {
            "state": {"w": {"exp": numbered(4), "step": 3}},
            "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["w"]}],
        },
        "mixed": [numbered(2), [1, numbered(1)], {"deep": {"er": numbered(3)}}, "end"],
        "plain": [1, [2, 3]],
        "none": None,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


def cause(
    caught: pytest.ExceptionInfo[CheckpointException], rank: int | None = None
) -> BaseException:
    """A rank's error, or that of the first that failed: a peer may be stopped before it fails."""
    failures = caught.value.failures
    return failures[min(failures) if rank is None else rank][0]


@two
class TestWithoutATemplate:
    @ENGINES
    def test_everything_comes_back_as_it_was_saved(self, checkpoint_dir: Path, engine: Any) -> None:
        engine.save(nested(), checkpoint_id=checkpoint_dir)
        assert same(dcp.load_without_template(checkpoint_id=checkpoint_dir), nested())

    @ENGINES
    def test_sharded_tensors_come_back_whole(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, engine: Any
    ) -> None:
        full = numbered(5, 2)
        engine.save({"w": spread(full, device_mesh, Shard(0))}, checkpoint_id=checkpoint_dir)
        reader = dcp.FileSystemReader(checkpoint_dir)
        assert same(dcp.load_without_template(storage_reader=reader), {"w": full})

    @ENGINES
    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ("none", {"none": None}),
            ("model", {"model": nested()["model"]}),
            (
                {"plain", "optim.state"},
                {"optim": {"state": {"w": {"exp": numbered(4), "step": 3}}}, "plain": [1, [2, 3]]},
            ),
            ("optim.state.w.exp", {"optim": {"state": {"w": {"exp": numbered(4)}}}}),
            ({"mixed.0"}, {"mixed": [numbered(2)]}),
            pytest.param("mixed.1", {"mixed": [None, [1, numbered(1)]]}),
            pytest.param(
                {"mixed.3", "mixed.2.deep"},
                {"mixed": [None, None, {"deep": {"er": numbered(3)}}, "end"]},
            ),
        ],
        ids=["value", "sub-tree", "two", "leaf", "element", "later element", "later elements"],
    )
    def test_keys_select_names_and_everything_below_them(
        self, checkpoint_dir: Path, engine: Any, keys: Any, expected: dict[str, Any]
    ) -> None:
        engine.save(nested(), checkpoint_id=checkpoint_dir)
        found = dcp.load_without_template(keys, checkpoint_id=checkpoint_dir)
        assert same({key: found[key] for key in sorted(found)}, expected)

    def test_a_key_does_not_take_names_that_only_begin_like_it(self, checkpoint_dir: Path) -> None:
        dcp.save({"a": {"b": 1, "bc": 2}, "ab": 3}, checkpoint_id=checkpoint_dir)
        assert dcp.load_without_template("a.b", checkpoint_id=checkpoint_dir) == {"a": {"b": 1}}
        assert "ab" not in dcp.load_without_template("a", checkpoint_id=checkpoint_dir)


@two
class TestKeys:
    @pytest.mark.parametrize(
        ("keys", "chosen"),
        [
            ("model.b", {"model.b"}),
            ("model.*", {"model.a", "model.b"}),
            (["model.a", "step"], {"model.a", "step"}),
            (("*.[ac]",), {"model.a", "optim.a", "optim.c"}),
            ("?tep", {"step"}),
            ("*", {"model.a", "model.b", "optim.a", "optim.c", "step"}),
        ],
        ids=["name", "glob", "list", "tuple", "mark", "all"],
    )
    def test_only_names_that_fit_a_pattern_are_loaded(
        self, checkpoint_dir: Path, keys: str | Sequence[str], chosen: set[str]
    ) -> None:
        state: dict[str, Any] = {
            "model": {"a": numbered(2), "b": numbered(3)},
            "optim": {"a": numbered(2, start=9), "c": "c"},
            "step": 5,
        }
        dcp.save(state, checkpoint_id=checkpoint_dir)
        target = blank(state)
        before = blank(state)
        report = dcp.load(target, checkpoint_id=checkpoint_dir, keys=keys)
        for top, key in (("model", "a"), ("model", "b"), ("optim", "a"), ("optim", "c")):
            source = state if f"{top}.{key}" in chosen else before
            assert same(target[top][key], source[top][key]), (top, key)
        assert target["step"] == (5 if "step" in chosen else None)
        everything = {"model.a", "model.b", "optim.a", "optim.c", "step"}
        assert set(report.unexpected) == everything - chosen
        assert report.missing == ()

    def test_a_pattern_that_fits_nothing_is_named_with_examples(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        dcp.save({"a": numbered(2)}, checkpoint_id=checkpoint_dir)
        target = {"a": torch.zeros(2)}
        with pytest.raises(CheckpointException) as caught:
            dcp.load(target, checkpoint_id=checkpoint_dir, keys=["a", "b.*", "A"])
        error = cause(caught, rank)
        assert isinstance(error, CheckpointMismatchError)
        assert "keys=['b.*', 'A'] match nothing in the state dict" in str(error)
        assert "which has 1 flat name, such as ['a']" in str(error)
        assert "['a']" in str(error)
        assert list(caught.value.failures) == [0, 1]
        assert target["a"].sum() == 0

    def test_keys_not_chosen_may_be_missing_in_the_checkpoint(self, checkpoint_dir: Path) -> None:
        dcp.save({"a": numbered(2)}, checkpoint_id=checkpoint_dir)
        target = {"a": torch.zeros(2), "new": torch.full((3,), 9.0), "b": "kept"}
        report = dcp.load(target, checkpoint_id=checkpoint_dir, keys="a")
        assert same(target, {"a": numbered(2), "new": torch.full((3,), 9.0), "b": "kept"})
        assert (report.missing, report.unexpected) == ((), ())
        with pytest.raises(CheckpointException, match="new") as caught:
            dcp.load(target, checkpoint_id=checkpoint_dir, keys="[an]*")
        assert list(caught.value.failures) == [0, 1]

    def test_a_meta_tensor_that_is_not_loaded_stays_one(self, checkpoint_dir: Path) -> None:
        dcp.save({"a": numbered(2), "b": numbered(2)}, checkpoint_id=checkpoint_dir)
        target = {"a": torch.empty(2, device="meta"), "b": torch.empty(2, device="meta")}
        dcp.load(target, checkpoint_id=checkpoint_dir, keys="a")
        assert same(target["a"], numbered(2))
        assert target["b"].is_meta


@two
class TestRename:
    @pytest.mark.parametrize(
        "rename",
        [
            {"new.a": "old.a", "new.b": "old.b", "n": "step"},
            {"new.": "old.", "n": "step"},
            {"new.": "nowhere.", "new.a": "old.a", "new.b": "old.b", "n": "step"},
            lambda name: {"n": "step"}.get(name, name.replace("new", "old")),
        ],
        ids=["names", "prefix", "the more exact", "function"],
    )
    def test_keys_are_loaded_from_other_names(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, rename: Any
    ) -> None:
        full = numbered(4, 2)
        dcp.save(
            {"old": {"a": spread(full, device_mesh, Shard(1)), "b": numbered(3)}, "step": 7},
            checkpoint_id=checkpoint_dir,
        )
        mine = spread(torch.zeros(4, 2), device_mesh, Shard(0))
        target: dict[str, Any] = {"new": {"a": mine, "b": torch.zeros(3)}, "n": 0}
        report = dcp.load(target, checkpoint_id=checkpoint_dir, rename=rename)
        assert target["new"]["a"] is mine
        assert same(mine, spread(full, device_mesh, Shard(0)))
        assert same(target["new"]["b"], numbered(3))
        assert target["n"] == 7
        assert (report.missing, report.unexpected) == ((), ())

    def test_the_longest_prefix_decides(self, checkpoint_dir: Path) -> None:
        dcp.save({"x": {"w": 1}, "y": {"w": 2}, "z": {"w": 3}}, checkpoint_id=checkpoint_dir)
        target = {"a": {"w": 0, "b": {"w": 0}}, "z": {"w": 0}}
        dcp.load(target, checkpoint_id=checkpoint_dir, rename={"a.": "x.", "a.b.": "y."})
        assert target == {"a": {"w": 1, "b": {"w": 2}}, "z": {"w": 3}}

    def test_a_name_without_a_dot_is_no_prefix(self, checkpoint_dir: Path) -> None:
        dcp.save({"old": {"w": 1}}, checkpoint_id=checkpoint_dir)
        with pytest.raises(CheckpointException, match=r"new\.w"):
            dcp.load({"new": {"w": 0}}, checkpoint_id=checkpoint_dir, rename={"new": "old"})

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize(
        ("rename", "said"),
        [
            ({"old.": "new."}, r"an entry leads from the state dict's name to the checkpoint's"),
            ({"new.": "old.", "absent": "x"}, r"the state dict has no 'absent'"),
            ({"new.": "gone."}, r"rename=\{'new\.': 'gone\.'\}: the checkpoint has no 'gone\.w'"),
            (lambda name: f"gone.{name}", r"rename gives names that are not there"),
        ],
        ids=["the other way round", "absent here", "absent there", "function"],
    )
    def test_an_entry_that_finds_nothing_is_refused(
        self, checkpoint_dir: Path, rename: Any, said: str, strict: bool
    ) -> None:
        dcp.save({"old": {"w": 1}}, checkpoint_id=checkpoint_dir)
        target = {"new": {"w": 0}}
        with pytest.raises(CheckpointException, match=said) as caught:
            dcp.load(target, checkpoint_id=checkpoint_dir, rename=rename, strict=strict)
        assert isinstance(cause(caught), CheckpointMismatchError)
        assert target == {"new": {"w": 0}}

    def test_an_entry_may_be_for_the_keys_of_another_rank(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        dcp.save({"old": {"0": 5, "1": 6}}, checkpoint_id=checkpoint_dir)
        target = {f"stage{rank}": {str(rank): 0}}
        rename = {"stage0.": "old.", "stage1.": "old."}
        dcp.load(target, checkpoint_id=checkpoint_dir, rename=rename)
        assert target == {f"stage{rank}": {str(rank): 5 + rank}}

    def test_a_function_that_changes_no_name_is_no_mistake(self, checkpoint_dir: Path) -> None:
        dcp.save({"w": 1}, checkpoint_id=checkpoint_dir)
        target = {"w": 0}
        dcp.load(target, checkpoint_id=checkpoint_dir, rename=lambda n: n.removeprefix("module."))
        assert target == {"w": 1}

    def test_two_keys_may_be_loaded_from_one(self, checkpoint_dir: Path) -> None:
        dcp.save({"w": numbered(3), "v": {"n": 1}}, checkpoint_id=checkpoint_dir)
        target: dict[str, Any] = {"a": torch.zeros(3), "b": torch.zeros(3), "c": 0, "d": 0}
        names = {"a": "w", "b": "w", "c": "v.n", "d": "v.n"}
        dcp.load(target, checkpoint_id=checkpoint_dir, rename=names)
        assert same(target, {"a": numbered(3), "b": numbered(3), "c": 1, "d": 1})

    def test_names_can_be_swapped(self, checkpoint_dir: Path) -> None:
        dcp.save({"a": numbered(2), "b": numbered(3)}, checkpoint_id=checkpoint_dir)
        target = {"a": torch.zeros(3), "b": torch.zeros(2)}
        dcp.load(target, checkpoint_id=checkpoint_dir, rename={"a": "b", "b": "a"})
        assert same(target, {"a": numbered(3), "b": numbered(2)})

    def test_patterns_choose_among_the_names_of_the_state_dict(self, checkpoint_dir: Path) -> None:
        dcp.save({"old": {"a": 1, "b": 2}}, checkpoint_id=checkpoint_dir)
        target = {"new": {"a": 0, "b": 0}}
        report = dcp.load(
            target, checkpoint_id=checkpoint_dir, keys="new.a", rename={"new.": "old."}
        )
        assert target == {"new": {"a": 1, "b": 0}}
        assert report.unexpected == ("old.b",)
        with pytest.raises(CheckpointException, match=r"'old\.a'.* match nothing"):
            dcp.load(target, checkpoint_id=checkpoint_dir, keys="old.a", rename={"new.": "old."})

    def test_keys_missing_under_the_other_name_are_missing(self, checkpoint_dir: Path) -> None:
        dcp.save({"old": {"a": 1}}, checkpoint_id=checkpoint_dir)
        target = {"new": {"a": 0, "b": 8}}
        report = dcp.load(
            target, checkpoint_id=checkpoint_dir, rename={"new.": "old."}, strict=False
        )
        assert target == {"new": {"a": 1, "b": 8}}
        assert report.missing == ("new.b",)

    def test_a_missing_key_is_named_as_it_was_looked_for(self, checkpoint_dir: Path) -> None:
        dcp.save({"transformer": {"wte": {"weight": numbered(2)}}}, checkpoint_id=checkpoint_dir)
        with pytest.raises(CheckpointException) as caught:
            dcp.load(
                {"emb": torch.zeros(2)},
                checkpoint_id=checkpoint_dir,
                rename={"emb": "transformer.wte.weigth"},
            )
        assert "emb" in str(cause(caught))
        assert "'transformer.wte.weigth'" in str(cause(caught))
        assert "nearest: 'transformer.wte.weight'" in str(cause(caught))


@two
class TestStrict:
    @ENGINES
    def test_missing_keys_are_left_and_unexpected_ones_reported(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, engine: Any
    ) -> None:
        engine.save(
            {"m": {"a": numbered(4), "gone": numbered(2)}, "v": 1, "old": [1]},
            checkpoint_id=checkpoint_dir,
        )
        kept = spread(torch.full((4,), 9.0), device_mesh, Shard(0))
        target: dict[str, Any] = {
            "m": {"a": torch.zeros(4), "new": kept},
            "v": 0,
            "n": {"x": "kept"},
        }
        report = dcp.load(target, checkpoint_id=checkpoint_dir, strict=False)
        assert target["m"]["new"] is kept
        assert kept.to_local().tolist() == [9.0, 9.0]
        assert same(target["m"]["a"], numbered(4))
        assert (target["v"], target["n"]) == (1, {"x": "kept"})
        assert set(report.missing) == {"m.new", "n.x"}
        assert set(report.unexpected) == {"m.gone", "old"}

    def test_a_strict_load_does_not_mind_the_unexpected(self, checkpoint_dir: Path) -> None:
        dcp.save({"a": 1, "b": 2}, checkpoint_id=checkpoint_dir)
        report = dcp.load({"a": 0}, checkpoint_id=checkpoint_dir)
        assert (report.missing, report.unexpected) == ((), ("b",))

    def test_nothing_is_missing_where_all_is_there(self, checkpoint_dir: Path) -> None:
        dcp.save(nested(), checkpoint_id=checkpoint_dir)
        for strict in (True, False):
            report = dcp.load(blank(nested()), checkpoint_id=checkpoint_dir, strict=strict)
            assert (report.missing, report.unexpected, dict(report.converted)) == ((), (), {})

    def test_every_missing_key_is_named_with_its_nearest(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        stored = {"layer": {"weight": numbered(2), "bias": numbered(1)}, "other": 1}
        dcp.save(stored, checkpoint_id=checkpoint_dir)
        target = {
            "layer": {"weigth": torch.zeros(2), "biass": torch.zeros(1)},
            "other": 0,
            "unlike": 0,
        }
        with pytest.raises(CheckpointException) as caught:
            dcp.load(target, checkpoint_id=checkpoint_dir)
        error = cause(caught, rank)
        assert isinstance(error, CheckpointMismatchError)
        assert set(error.missing) == {"layer.weigth", "layer.biass", "unlike"}
        assert set(error.unexpected) == {"layer.weight", "layer.bias"}
        assert "layer.weigth (nearest: 'layer.weight')" in str(error)
        assert "layer.biass (nearest: 'layer.bias')" in str(error)
        assert "unlike" in str(error)
        assert "unlike (nearest" not in str(error)
        assert target["other"] == 0

    def test_another_size_is_refused_without_strict_too(self, checkpoint_dir: Path) -> None:
        dcp.save({"a": numbered(3), "b": numbered(2)}, checkpoint_id=checkpoint_dir)
        target = {"a": torch.zeros(3), "b": torch.zeros(2, 1)}
        with pytest.raises(CheckpointException, match="Size mismatch") as caught:
            dcp.load(target, checkpoint_id=checkpoint_dir, strict=False)
        assert isinstance(cause(caught), CheckpointMismatchError)
        assert target["a"].sum() == 0

    def test_a_missing_meta_tensor_is_left_as_it_is(self, checkpoint_dir: Path) -> None:
        dcp.save({"a": numbered(2)}, checkpoint_id=checkpoint_dir)
        target = {"a": torch.empty(2, device="meta"), "b": torch.empty(2, device="meta")}
        assert dcp.load(target, checkpoint_id=checkpoint_dir, strict=False).missing == ("b",)
        assert target["b"].is_meta


@two
class TestDtypes:
    @pytest.mark.parametrize(
        ("stored", "asked"),
        [
            (torch.float32, torch.bfloat16),
            (torch.float16, torch.float64),
            (torch.int64, torch.uint8),
            (torch.complex64, torch.complex128),
        ],
        ids=str,
    )
    def test_a_dtype_of_the_same_kind_is_converted_and_reported(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, stored: Any, asked: Any
    ) -> None:
        full = numbered(4, 3, dtype=stored)
        dcp.save({"w": full, "s": full, "same": numbered(2)}, checkpoint_id=checkpoint_dir)
        target = {
            "w": torch.zeros(4, 3, dtype=asked),
            "s": spread(torch.zeros(4, 3, dtype=asked), device_mesh, Shard(1)),
            "same": torch.zeros(2),
        }
        report = dcp.load(target, checkpoint_id=checkpoint_dir)
        assert same(target["w"], numbered(4, 3, dtype=asked))
        assert same(target["s"], spread(numbered(4, 3, dtype=asked), device_mesh, Shard(1)))
        assert report.converted == {"w": (stored, asked), "s": (stored, asked)}

    def test_a_dtype_of_another_kind_is_refused_before_any_byte_moves(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        kinds = {
            "float": numbered(3),
            "int": numbered(3, dtype=torch.int32),
            "bool": torch.tensor([True, False, True]),
            "complex": numbered(3, dtype=torch.complex64),
        }
        for name, stored in kinds.items():
            folder = checkpoint_dir / name
            dcp.save(dict.fromkeys(kinds, stored) | {"fine": 1}, checkpoint_id=folder)
            target: dict[str, Any] = blank(kinds) | {"fine": 0}
            with pytest.raises(CheckpointException) as caught:
                dcp.load(target, checkpoint_id=folder)
            error = cause(caught, rank)
            assert isinstance(error, CheckpointMismatchError)
            assert set(error.mismatched) == set(kinds) - {name}
            for other in error.mismatched:
                current = kinds[other].dtype
                text = f"dtype mismatch between saved {stored.dtype} and current: {current}"
                assert f"{text} for {other}" in str(error)
            assert same(target, blank(kinds) | {"fine": 0})

    def test_without_strict_any_dtype_is_converted_as_copy_does(self, checkpoint_dir: Path) -> None:
        stored = {"a": torch.tensor([0.0, 1.5, -2.7]), "b": torch.tensor([0, 3, -1])}
        dcp.save(stored | {"c": stored["a"], "d": stored["b"]}, checkpoint_id=checkpoint_dir)
        target = {
            "a": torch.zeros(3, dtype=torch.int64),
            "b": torch.zeros(3, dtype=torch.bool),
            "c": torch.zeros(3, dtype=torch.complex64),
            "d": torch.zeros(3),
        }
        report = dcp.load(target, checkpoint_id=checkpoint_dir, strict=False)
        assert target["a"].tolist() == [0, 1, -2]
        assert target["b"].tolist() == [False, True, True]
        assert target["c"].tolist() == [0j, 1.5 + 0j, pytest.approx(-2.7 + 0j)]
        assert target["d"].tolist() == [0.0, 3.0, -1.0]
        assert report.converted["b"] == (torch.int64, torch.bool)
        assert set(report.converted) == set(target)


class Settings:
    """A value that torch.load(weights_only=True) does not take."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and other.lr == self.lr

    __hash__ = None  # type: ignore[assignment]  # equal by value


@two
@pytest.mark.filterwarnings("ignore:1 value.s. of this save are refused by load:UserWarning")
class TestWeightsOnly:
    @ENGINES
    def test_a_class_of_the_users_is_refused_by_key_with_a_remedy(
        self, checkpoint_dir: Path, engine: Any
    ) -> None:
        state: dict[str, Any] = {"train": {"cfg": [Settings(0.5), 2]}, "w": numbered(2)}
        engine.save(state, checkpoint_id=checkpoint_dir)
        target: dict[str, Any] = {"train": {"cfg": None}, "w": torch.zeros(2)}

        def refused(load: Callable[[], Any]) -> None:
            with pytest.raises(CheckpointException) as caught:
                load()
            error = cause(caught)
            assert isinstance(error, UntrustedPickleError)
            assert error.entry == "train.cfg"
            for text in ("'train.cfg'", "Settings", "weights_only=False", "add_safe_globals"):
                assert text in str(error)
            assert f"{__name__}.Settings' is not loaded by default: pass " in str(error)

        refused(lambda: dcp.load(target, checkpoint_id=checkpoint_dir))
        refused(lambda: dcp.load_without_template(checkpoint_id=checkpoint_dir))
        planner = dcp.DefaultLoadPlanner()
        refused(lambda: dcp.load(target, checkpoint_id=checkpoint_dir, planner=planner))
        assert target["train"] == {"cfg": None}
        assert same(
            dcp.load_without_template("w", checkpoint_id=checkpoint_dir), {"w": numbered(2)}
        )

    @ENGINES
    def test_it_is_loaded_if_the_caller_trusts_the_writer_or_allows_the_class(
        self, checkpoint_dir: Path, engine: Any
    ) -> None:
        state = {"cfg": Settings(0.5)}
        engine.save(state, checkpoint_id=checkpoint_dir)
        target: dict[str, Any] = {"cfg": None}
        dcp.load(target, checkpoint_id=checkpoint_dir, weights_only=False)
        assert target == state
        found = dcp.load_without_template(checkpoint_id=checkpoint_dir, weights_only=False)
        assert found == state
        target = {"cfg": None}
        planner = dcp.DefaultLoadPlanner(weights_only=False)
        dcp.load(target, checkpoint_id=checkpoint_dir, planner=planner)
        assert target == state
        target = {"cfg": None}
        with torch.serialization.safe_globals([Settings]):
            dcp.load(target, checkpoint_id=checkpoint_dir)
        assert target == state


def flip(folder: Path, content: bytes) -> Path:
    """The one data file that holds the content; its last byte is altered there."""
    (path,) = (p for p in folder.glob("*.distcp") if content in p.read_bytes())
    found = bytearray(path.read_bytes())
    found[found.index(content) + len(content) - 1] ^= 1
    path.write_bytes(found)
    return path


def raw(tensor: torch.Tensor) -> bytes:
    """Its bytes."""
    return tensor.contiguous().numpy().tobytes()


def offset_of(folder: Path, tensor: torch.Tensor) -> int:
    """Where the one data file that holds the tensor's bytes has them."""
    (found,) = {p.read_bytes().find(raw(tensor)) for p in folder.glob("*.distcp")} - {-1}
    return found


def figures(report: dcp.LoadReport) -> tuple[int, int, int]:
    """Bytes needed, read and verified."""
    return report.bytes_needed, report.bytes_read, report.bytes_verified


@two
class TestVerify:
    def test_a_flipped_byte_is_found_unless_checks_are_off(
        self, checkpoint_dir: Path, rank: int, world: Any
    ) -> None:
        full = numbered(8)
        dcp.save({"a": numbered(3, start=50), "w": full}, checkpoint_id=checkpoint_dir)
        name = world.broadcast(flip(checkpoint_dir, raw(full)).name if rank == 0 else None)
        reader = dcp.FileSystemReader(checkpoint_dir, verify="full")
        for options in ({}, {"verify": "auto"}, {"verify": "full"}, {"storage_reader": reader}):
            with pytest.raises(CheckpointException) as caught:
                dcp.load({"w": torch.zeros(8)}, checkpoint_id=checkpoint_dir, **options)
            error = cause(caught)
            assert isinstance(error, CheckpointCorruptError)
            assert (error.file, error.entry) == (name, "w")
            assert error.offset is not None
            start = (checkpoint_dir / name).read_bytes().index(raw(full)[:-1])
            assert start == error.offset
        target = {"a": torch.zeros(3), "w": torch.zeros(8)}
        report = dcp.load(target, checkpoint_id=checkpoint_dir, verify="off")
        assert same(target["a"], numbered(3, start=50))
        assert target["w"].tolist()[:7] == full.tolist()[:7]
        assert target["w"][7] != full[7]
        assert report.bytes_verified == 0
        dcp.load({"a": torch.zeros(3)}, checkpoint_id=checkpoint_dir, verify="full")

    def test_only_full_checks_the_whole_block_of_which_a_part_is_read(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int, world: Any
    ) -> None:
        # Blocks of 64 KiB: two and a half of them, and each rank's half ends inside the second.
        block, half = 65_536, 81_920
        full = (torch.arange(2 * half) % 251).to(torch.uint8)
        dcp.save({"w": full}, checkpoint_id=checkpoint_dir)
        if rank == 0:
            flip(checkpoint_dir, raw(full[: half + 1000]))
        world.barrier()
        target = {"w": spread(blank(full), device_mesh, Shard(0))}
        report = dcp.load(target, checkpoint_id=checkpoint_dir)
        assert figures(report) == (half, half, (block, 2 * half - 2 * block)[rank])
        with pytest.raises(CheckpointException) as caught:
            # The part of the block that is not the altered byte's.
            dcp.load({} if rank else target, checkpoint_id=checkpoint_dir, verify="full")
        assert list(caught.value.failures) == [0]
        assert f"offset {offset_of(checkpoint_dir, full[:half]) + block}" in str(caught.value)

    def test_a_flipped_byte_of_a_value_is_found(
        self, checkpoint_dir: Path, rank: int, world: Any
    ) -> None:
        dcp.save({"v": "a text that is easy to find"}, checkpoint_id=checkpoint_dir)
        if rank == 0:
            flip(checkpoint_dir, b"easy to find")
        world.barrier()
        for verify in ("auto", "full"):
            with pytest.raises(CheckpointException) as caught:
                dcp.load({"v": ""}, checkpoint_id=checkpoint_dir, verify=verify)
            error = cause(caught)
            assert isinstance(error, CheckpointCorruptError)
            assert error.entry == "v"

    def test_another_word_is_refused(self, checkpoint_dir: Path) -> None:
        dcp.save({"v": 1}, checkpoint_id=checkpoint_dir)
        options: dict[str, Any] = {"verify": "sometimes"}
        with pytest.raises(ValueError, match="verify must be 'auto', 'full' or 'off'"):
            dcp.FileSystemReader(checkpoint_dir, **options)
        with pytest.raises(ValueError, match="verify must be 'auto', 'full' or 'off'"):
            dcp.load({"v": 0}, checkpoint_id=checkpoint_dir, **options)

    def test_another_word_is_refused_with_a_reader_too(self, checkpoint_dir: Path) -> None:
        dcp.save({"v": 1}, checkpoint_id=checkpoint_dir)
        options: dict[str, Any] = {"verify": "sometimes"}
        with pytest.raises(ValueError, match="verify must be 'auto', 'full' or 'off'"):
            dcp.load({"v": 0}, storage_reader=dcp.FileSystemReader(checkpoint_dir), **options)

    def test_verify_is_for_one_load(self, checkpoint_dir: Path) -> None:
        dcp.save({"w": numbered(4)}, checkpoint_id=checkpoint_dir)
        reader = dcp.FileSystemReader(checkpoint_dir)
        target = {"w": torch.zeros(4)}
        assert dcp.load(target, storage_reader=reader, verify="off").bytes_verified == 0
        assert dcp.load(target, storage_reader=reader).bytes_verified == 16


@two
class TestFigures:
    def test_tensors_count_their_stored_bytes(self, checkpoint_dir: Path) -> None:
        state = {"w": numbered(4, 2), "h": numbered(3, dtype=torch.float16)}
        dcp.save(state, checkpoint_id=checkpoint_dir)
        for target in (blank(state), {"w": torch.zeros(4, 2).half(), "h": torch.zeros(3)}):
            for verify, verified in (("auto", 38), ("full", 38), ("off", 0)):
                report = dcp.load(target, checkpoint_id=checkpoint_dir, verify=verify)  # type: ignore[arg-type]  # mypy widens the literals
                assert figures(report) == (38, 38, verified)
        report = dcp.load(blank(state), checkpoint_id=checkpoint_dir, keys="h")
        assert figures(report) == (6, 6, 6)
        assert figures(dcp.load({}, checkpoint_id=checkpoint_dir)) == (0, 0, 0)

    def test_a_rank_counts_its_own_part(
        self, checkpoint_dir: Path, device_mesh: DeviceMesh, rank: int
    ) -> None:
        full = numbered(3, 2)
        dcp.save({"w": spread(full, device_mesh, Shard(0))}, checkpoint_id=checkpoint_dir)
        mine = (16, 8)[rank]
        target = {"w": spread(torch.zeros(3, 2), device_mesh, Shard(0))}
        report = dcp.load(target, checkpoint_id=checkpoint_dir)
        assert figures(report) == (mine, mine, mine)
        columns = {"w": spread(torch.zeros(3, 2), device_mesh, Shard(1))}
        report = dcp.load(columns, checkpoint_id=checkpoint_dir, verify="full")
        assert report.bytes_needed == 12
        assert 12 <= report.bytes_verified <= report.bytes_read == 24

    def test_values_count_their_entries(self, checkpoint_dir: Path) -> None:
        metadata = dcp.save({"v": {"n": 1}, "w": numbered(2)}, checkpoint_id=checkpoint_dir)
        length = metadata.storage_data[MetadataIndex("v.n")].length
        report = dcp.load({"v": {"n": 0}}, checkpoint_id=checkpoint_dir)
        assert figures(report) == (length, length, length)

    def test_nothing_of_torchs_checkpoints_is_verified(self, checkpoint_dir: Path) -> None:
        torch_dcp.save({"w": numbered(4)}, checkpoint_id=checkpoint_dir)
        report = dcp.load({"w": torch.zeros(4)}, checkpoint_id=checkpoint_dir, verify="full")
        assert (report.bytes_needed, report.bytes_verified) == (16, 0)
        assert report.bytes_read >= 16


@two
@pytest.mark.parametrize(
    "options",
    [{"strict": False}, {"keys": "w"}, {"rename": {"w": "w"}}, {"weights_only": False}],
    ids=str,
)
def test_options_beside_a_planner_are_refused(
    checkpoint_dir: Path, options: dict[str, Any]
) -> None:
    dcp.save({"w": numbered(3)}, checkpoint_id=checkpoint_dir)

    class Mine(dcp.DefaultLoadPlanner):
        pass

    target = {"w": torch.zeros(3)}
    for planner in (Mine(), dcp.DefaultLoadPlanner()):
        words = f"for the default planner.*{type(planner).__name__}.*allow_partial_load, selection"
        with pytest.raises(ValueError, match=words):
            dcp.load(target, checkpoint_id=checkpoint_dir, planner=planner, **options)
    assert target["w"].sum() == 0
    dcp.load(target, checkpoint_id=checkpoint_dir, planner=Mine(), verify="full")
    assert same(target["w"], numbered(3))


class Interrupted(dcp.FileSystemReader):
    """Does something before or after the metadata is read, at the given readings of it."""

    def __init__(
        self,
        path: Path,
        after: Callable[[], None] = lambda: None,
        *,
        before: Callable[[], None] = lambda: None,
        at: Sequence[int] = (0,),
    ) -> None:
        super().__init__(path)
        self.before, self.after, self.at = before, after, at
        self.readings = 0

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        now = self.readings in self.at
        if now:
            self.before()
        metadata = super().read_metadata(*args, **kwargs)
        self.readings += 1
        if now:
            self.after()
        return metadata


def save_alone(state: dict[str, Any], folder: Path, **options: Any) -> None:
    """This rank alone writes all of a new checkpoint."""
    with without_warnings():
        dcp.save(state, checkpoint_id=folder, no_dist=True, **options)


OLD: dict[str, Any] = {"a": numbered(4), "v": {"n": 1}, "w": numbered(2, 2)}
NEW: dict[str, Any] = {"a": numbered(4, start=50), "v": {"n": 2}, "w": numbered(2, 2, start=70)}


@two
class TestReplacedMeanwhile:
    def replacing(self, folder: Path, rank: int, state: dict[str, Any]) -> Callable[[], None]:
        """Rank 0 replaces the checkpoint when all ranks have come here."""

        def replace() -> None:
            dist.barrier()
            if rank == 0:
                save_alone(state, folder)
            dist.barrier()

        return replace

    def test_the_load_is_repeated_and_gives_the_new_state(
        self, checkpoint_dir: Path, rank: int, device_mesh: DeviceMesh
    ) -> None:
        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        reader = Interrupted(checkpoint_dir, self.replacing(checkpoint_dir, rank, NEW))
        target = blank(OLD) | {"a": spread(torch.zeros(4), device_mesh, Shard(0))}
        dcp.load(target, storage_reader=reader)
        assert reader.readings == 2
        assert same(target, NEW | {"a": spread(NEW["a"], device_mesh, Shard(0))})

    def test_the_new_checkpoint_may_hold_other_keys(self, checkpoint_dir: Path, rank: int) -> None:
        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        reader = Interrupted(checkpoint_dir, self.replacing(checkpoint_dir, rank, {"w": 1}))
        with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: a"):
            dcp.load({"a": torch.zeros(4)}, storage_reader=reader)

    def test_a_load_that_may_lack_keys_is_not_repeated_over_loaded_tensors(
        self, checkpoint_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        state = {"a": numbered(4, start=50), "more": 1}
        reader = Interrupted(checkpoint_dir, self.replacing(checkpoint_dir, rank, state))
        target = {"a": torch.zeros(4), "w": torch.full((2, 2), 9.0)}
        monkeypatch.setattr(open_files, "most_files", lambda: 0)
        with pytest.raises(CheckpointException, match="load again"):
            dcp.load(target, storage_reader=reader, strict=False)
        assert reader.readings == 1

    def test_a_load_that_may_lack_keys_and_has_read_nothing_is_repeated(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        state = {"a": numbered(4, start=50), "more": 1}
        reader = Interrupted(checkpoint_dir, self.replacing(checkpoint_dir, rank, state))
        target = {"a": torch.zeros(4), "w": torch.full((2, 2), 9.0)}
        dcp.load(target, storage_reader=reader, strict=False)
        assert same(target, {"a": numbered(4, start=50), "w": torch.full((2, 2), 9.0)})

    def test_a_user_planner_is_asked_to_load_again(
        self, checkpoint_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "LEASE_S", 0.01)

        class Mine(dcp.DefaultLoadPlanner):
            pass

        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        reader = Interrupted(checkpoint_dir, self.replacing(checkpoint_dir, rank, NEW))
        target = blank(OLD)
        with pytest.raises(CheckpointException, match="load again") as caught:
            dcp.load(target, storage_reader=reader, planner=Mine())
        assert isinstance(cause(caught), CheckpointReplacedError)
        assert str(checkpoint_dir) in str(cause(caught))
        assert reader.readings == 1
        dcp.load(target, storage_reader=reader, planner=Mine())
        assert same(target, NEW)

    def test_a_checkpoint_that_stays_late_is_loaded(
        self, checkpoint_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each commit waits for the leases of its own program, in vain."""
        monkeypatch.setattr(lease, "LEASE_S", 0.01)
        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        replace = self.replacing(checkpoint_dir, rank, NEW)
        reader = Interrupted(checkpoint_dir, replace, at=range(9))
        target = blank(OLD)
        dcp.load(target, storage_reader=reader)
        assert same(target, NEW)
        assert reader.readings == 10

    def test_a_checkpoint_that_never_stays_is_given_up(
        self, checkpoint_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "LEASE_S", 0.01)
        monkeypatch.setattr(load_steps, "RETRY_S", 0.2)
        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        replace = self.replacing(checkpoint_dir, rank, NEW)
        reader = Interrupted(checkpoint_dir, replace, at=range(10**6))
        with pytest.raises(CheckpointException, match="load again"):
            dcp.load(blank(OLD), storage_reader=reader)
        assert reader.readings > 1

    def test_ranks_that_come_together_again_succeed_at_once(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        """The save that would come between waits for their lease, in a thread of its own."""
        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        saving: list[threading.Thread] = []

        def save_beside() -> None:
            if rank == 0 and reader.readings > 1:
                dist.barrier()
                saving.append(threading.Thread(target=save_alone, args=(OLD, checkpoint_dir)))
                saving[0].start()
                time.sleep(0.2)
            elif reader.readings > 1:
                dist.barrier()
                time.sleep(0.4)
            else:
                self.replacing(checkpoint_dir, rank, NEW)()

        reader = Interrupted(checkpoint_dir, save_beside, at=(0, 1))
        target = blank(OLD)
        dcp.load(target, storage_reader=reader)
        assert same(target, NEW)
        assert reader.readings == 2
        for thread in saving:
            thread.join(30)
            assert not thread.is_alive()
        dist.barrier()
        dcp.load(target, checkpoint_id=checkpoint_dir)
        assert same(target, OLD)

    def test_a_load_that_has_opened_its_files_reads_them_though_they_are_removed(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        replace = self.replacing(checkpoint_dir, rank, NEW)

        class Late(dcp.FileSystemReader):
            def read_data(self, plan: Any, planner: Any) -> Any:
                replace()
                return super().read_data(plan, planner)

            def _overrides_read_data(self) -> bool:
                return False

        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        before = {path.name for path in checkpoint_dir.glob("*.distcp")}
        target = blank(OLD)
        dcp.load(target, storage_reader=Late(checkpoint_dir))
        assert same(target, OLD)
        assert not before & {path.name for path in checkpoint_dir.glob("*.distcp")}

    def test_a_checkpoint_that_is_taken_away_is_not_waited_for(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        dcp.save(OLD, checkpoint_id=checkpoint_dir)

        def remove() -> None:
            dist.barrier()
            if rank == 0:
                for path in checkpoint_dir.iterdir():
                    path.unlink()
            dist.barrier()

        reader = Interrupted(checkpoint_dir, remove)
        with pytest.raises(CheckpointException, match="missing") as caught:
            dcp.load(blank(OLD), storage_reader=reader)
        assert isinstance(cause(caught), CheckpointCorruptError)
        assert reader.readings == 1

    def test_a_load_without_a_template_is_repeated_too(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        reader = Interrupted(checkpoint_dir, self.replacing(checkpoint_dir, rank, NEW))
        assert same(dcp.load_without_template(storage_reader=reader), NEW)

    def test_the_ranks_own_saves_may_be_replaced_by_a_whole_one(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        dcp.save(OLD, checkpoint_id=checkpoint_dir, use_collectives=False)
        reader = Interrupted(checkpoint_dir, self.replacing(checkpoint_dir, rank, NEW))
        target = blank(OLD)
        dcp.load(target, storage_reader=reader)
        assert same(target, NEW)


@two
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("files", [True, False], ids=["files kept open", "no descriptors"])
def test_readers_beside_many_overwrites_always_load_one_save(
    checkpoint_dir: Path, rank: int, files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not files:
        monkeypatch.setattr(open_files, "most_files", lambda: 0)
    if rank == 0:
        save_alone({"a": torch.zeros(1000), "b": torch.zeros(10)}, checkpoint_dir)
    dist.barrier()
    errors: list[BaseException] = []

    def overwrite() -> None:
        try:
            for fill in map(float, range(1, 60)):
                writer = dcp.FileSystemWriter(checkpoint_dir, sync_files=False)
                state = {"a": torch.full((1000,), fill), "b": torch.full((10,), fill)}
                dcp.save(state, storage_writer=writer, no_dist=True)
        except BaseException as error:  # noqa: BLE001 - told to the test
            errors.append(error)

    saving = threading.Thread(target=overwrite)
    if rank == 0:
        saving.start()
    loads, going = 0, torch.ones(1)
    while going:
        state = {"a": torch.full((1000,), -1.0), "b": torch.full((10,), -1.0)}
        dcp.load(state, checkpoint_id=checkpoint_dir)
        loads += 1
        fills = torch.cat([state["a"], state["b"]]).unique()
        both = [torch.zeros_like(fills) for _ in range(2)]
        dist.all_gather(both, fills)
        assert len(fills) == 1
        assert both[0] == both[1]
        going = torch.tensor([float(saving.is_alive())])
        dist.all_reduce(going)
    if rank == 0:
        saving.join(60)
    assert not errors
    assert loads > 1


@two
class TestDifferentSaves:
    def reader(self, folder: Path, rank: int) -> Interrupted:
        """Rank 0 reads the old save's metadata, and then rank 1 the new one's."""
        if rank == 0:
            return Interrupted(folder, dist.barrier)

        def replace() -> None:
            dist.barrier()
            save_alone(NEW, folder)

        return Interrupted(folder, before=replace)

    def test_ranks_that_find_different_saves_look_again(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        reader, target = self.reader(checkpoint_dir, rank), blank(OLD)
        dcp.load(target, storage_reader=reader)
        assert same(target, NEW)
        assert reader.readings >= 2

    def test_ranks_whose_folders_differ_are_refused(self, checkpoint_dir: Path, rank: int) -> None:
        for name, state in (("0", OLD), ("1", NEW)):
            dcp.save(state, checkpoint_id=checkpoint_dir / name)
        target = blank(OLD)
        with pytest.raises(CheckpointException, match="found different saves") as caught:
            dcp.load(target, checkpoint_id=checkpoint_dir / str(rank))
        assert isinstance(cause(caught), CheckpointReplacedError)
        assert same(target, blank(OLD))

    def test_copies_of_one_save_are_one_save(self, checkpoint_dir: Path, rank: int) -> None:
        dcp.save(OLD, checkpoint_id=checkpoint_dir / "0")
        if rank == 1:
            (checkpoint_dir / "1").mkdir()
            for path in (checkpoint_dir / "0").iterdir():
                os.link(path, checkpoint_dir / "1" / path.name)
        target = blank(OLD)
        dcp.load(target, checkpoint_id=checkpoint_dir / str(rank))
        assert same(target, OLD)

    def test_a_user_planner_is_asked_to_load_again(
        self, checkpoint_dir: Path, rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lease, "LEASE_S", 0.01)

        class Mine(dcp.DefaultLoadPlanner):
            pass

        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        with pytest.raises(CheckpointException, match="load again"):
            dcp.load(blank(OLD), storage_reader=self.reader(checkpoint_dir, rank), planner=Mine())

    def test_a_planner_that_sees_all_plans_is_not_given_two_saves(
        self, checkpoint_dir: Path, rank: int
    ) -> None:
        class Seeing(dcp.DefaultLoadPlanner):
            def create_global_plan(self, global_plan: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
                return global_plan

        for name, state in (("0", OLD), ("1", NEW)):
            dcp.save(state, checkpoint_id=checkpoint_dir / name)
        with pytest.raises(CheckpointException, match="different saves"):
            dcp.load(blank(OLD), checkpoint_id=checkpoint_dir / str(rank), planner=Seeing())


class SlowFileSystem(FileSystem):
    """Does something before the n-th data file is opened to be read."""

    def __init__(self, position: int, action: Callable[[], None]) -> None:
        self.position, self.action = position, action
        self.opened: list[str] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Any:
        if mode == "rb" and str(path).endswith(".distcp"):
            if len(self.opened) == self.position:
                self.opened.append("")
                self.action()
            self.opened.append(Path(path).name)
        with super().create_stream(path, mode) as stream:
            found: IOBase = stream
            yield found


def test_a_load_that_is_repeated_leaves_nothing_of_the_first_save(checkpoint_dir: Path) -> None:
    with without_warnings():
        writer = dcp.FileSystemWriter(checkpoint_dir, single_file_per_rank=False)
        dcp.save({"gone": 1, "w": numbered(3)}, storage_writer=writer)
        new = {"w": numbered(3, start=9), "gone": 2}
        reader = dcp.FileSystemReader(checkpoint_dir, thread_count=1)
        reader.fs = system = SlowFileSystem(1, lambda: save_alone(new, checkpoint_dir))
        target: dict[str, Any] = {"gone": "kept", "w": torch.zeros(3)}
        report = dcp.load(target, storage_reader=reader)
        assert "" in system.opened
        assert same(target["w"], numbered(3, start=9))
        assert target["gone"] == 2
        assert report.missing == ()


def test_a_process_alone_loads_the_checkpoint_that_replaces_its_own(checkpoint_dir: Path) -> None:
    with without_warnings():
        dcp.save(OLD, checkpoint_id=checkpoint_dir)
        reader = Interrupted(checkpoint_dir, lambda: save_alone(NEW, checkpoint_dir))
        target = blank(OLD)
        dcp.load(target, storage_reader=reader)
        assert reader.readings == 2
        assert same(target, NEW)
