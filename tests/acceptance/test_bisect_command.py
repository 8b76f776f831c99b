"""`pytest-dcp bisect`: the first step at which a tensor has NaN, is frozen, or is large."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._cli.main import main
from pytest_dcp._engine.steps.numbered_folders import choose_numbered
from support.states import torch_dcp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
STEPS = (5, 10, 20, 100, 200, 300)
Bisect = Callable[..., tuple[int, str, str]]


def weights(step: int) -> dict[str, Any]:
    """`w` has NaN at step 20 and from 200 on, `still` stops at 100, `peak` is large at 20."""
    w = torch.full((30, 20), float(step))
    if step in (20, 200, 300):
        w[17, 3] = float("nan")
    still = torch.full((40,), min(step, 100), dtype=torch.bfloat16)
    peak = torch.full((25,), 200.0 if step == 20 else 1.0)
    half = torch.ones(9, dtype=torch.float8_e4m3fn)
    if step == 300:
        half[2] = float("nan")
    return {
        "model": {"w": w, "still": still, "peak": peak, "half": half},
        "count": torch.tensor(step),
        "none": torch.ones(0),
        "step": step,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of this engine's folders, one of torch's, which have no checksums."""
    root = tmp_path_factory.mktemp("runs")
    for step in STEPS:
        dcp.save(weights(step), checkpoint_id=root / f"ours/step-{step:08d}")
        torch_dcp.save(weights(step), checkpoint_id=root / f"torchs/checkpoint-{step}")
    (root / "ours/logs").mkdir()
    return root


@pytest.fixture
def bisect(capsys: pytest.CaptureFixture[str]) -> Bisect:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["bisect", *map(str, arguments)])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def find(bisect: Bisect, *arguments: object, code: int = 0) -> Any:
    found, out, err = bisect(*arguments, "--json")
    assert (found, err) == (code, "")
    return json.loads(out)


@pytest.mark.parametrize("kind", ["ours", "torchs"])
class TestTests:
    def test_the_first_nan_is_found_though_it_goes_away(
        self, bisect: Bisect, runs: Path, kind: str
    ) -> None:
        found = find(bisect, runs / kind, "--name", "model.w", "--test", "nan")
        assert (found["number"], found["examined"]) == (20, 3)
        assert found["before"].endswith("10")
        assert found["evidence"] == [{"name": "model.w", "text": "NaN"}]

    def test_halves_assume_a_condition_that_stays(
        self, bisect: Bisect, runs: Path, kind: str
    ) -> None:
        options = ["--name", "model.w", "--test", "nan", "--monotone"]
        found = find(bisect, runs / kind, *options)
        # Step 100 has no NaN, so steps before it are not looked at.
        assert (found["number"], found["examined"]) == (200, 3)
        assert found["before"].endswith("100")

    def test_patterns_name_the_tensor(self, bisect: Bisect, runs: Path, kind: str) -> None:
        found = find(bisect, runs / kind, "--name", "model.[h]*", "--test", "nan")
        assert (found["number"], found["evidence"][0]["name"]) == (300, "model.half")

    def test_frozen_weights_equal_the_step_before(
        self, bisect: Bisect, runs: Path, kind: str
    ) -> None:
        found = find(bisect, runs / kind, "--name", "*still", "--test", "frozen")
        assert found["number"] == 200
        how = "checksums" if kind == "ours" else "reading"
        assert found["evidence"][0]["text"] == f"as in the step before, by {how}"
        code, out, _ = bisect(runs / kind, "--name", "count", "--test", "frozen")
        assert (code, out.splitlines()[-1]) == (
            1,
            "no step: frozen holds at none; 6 of 6 steps examined",
        )

    def test_a_norm_over_the_limit(self, bisect: Bisect, runs: Path, kind: str) -> None:
        options = ["--name", "model.peak", "--test"]
        found = find(bisect, runs / kind, *options, "norm>999")
        assert (found["number"], found["evidence"][0]["text"]) == (20, "norm 1000")
        assert find(bisect, runs / kind, *options, "norm > 1000", code=1)["step"] is None
        # NaN is over every limit.
        found = find(bisect, runs / kind, "--name", "model.w", "--test", "norm>1e6")
        assert found["number"] == 20

    def test_a_tensor_without_elements_is_never_frozen(
        self, bisect: Bisect, runs: Path, kind: str
    ) -> None:
        assert find(bisect, runs / kind, "--name", "none", "--test", "frozen", code=1)


class TestReading:
    def test_equal_checksums_are_read_once(self, bisect: Bisect, runs: Path) -> None:
        options = ["--name", "model.still", "--test", "nan"]
        found = find(bisect, runs / "ours", *options, code=1)
        assert found["bytes_read"] == 4 * 80  # of steps 5, 10, 20, 100; the others are equal
        options = ["--name", "model.still", "--test", "frozen", "--json"]
        assert find(bisect, runs / "ours", *options[:-1])["bytes_read"] == 6 * 80
        shutil.copytree(runs / "ours/step-00000005", runs / "same/step-5")
        shutil.copytree(runs / "ours/step-00000005", runs / "same/step-6")
        options = ["--name", "model.*", "--test", "frozen"]
        found = find(bisect, runs / "same", *options)
        assert (found["number"], len(found["evidence"]), found["bytes_read"]) == (6, 4, 0)

    def test_steps_that_cannot_be_examined_are_reported(
        self, bisect: Bisect, runs: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(runs / "ours", run)
        (run / "step-00000005/.metadata").unlink()
        (run / "step-00000150").mkdir()
        dcp.save({"other": torch.ones(1)}, checkpoint_id=run / "step-00000160")
        (data,) = (run / "step-00000020").glob("*.distcp")
        data.write_bytes(bytes(data.stat().st_size))
        for options in (["--test", "nan"], ["--test", "nan", "--monotone"]):
            found = find(bisect, run, "--name", "model.w", *options)
            assert found["number"] == 200
        found = find(bisect, run, "--name", "model.w", "--test", "nan")
        reasons = dict(found["skipped"])
        assert list(reasons) == [f"step-{n:08d}" for n in (5, 20, 150, 160)]
        assert "did not end" in reasons["step-00000005"]
        assert "the checksum differs" in reasons["step-00000020"]
        assert "no files are there" in reasons["step-00000150"]
        assert "has no 'model.w'" in reasons["step-00000160"]
        code, out, _ = bisect(run, "--name", "model.w", "--test", "nan")
        assert code == 0
        assert "step-00000200: model.w: NaN\n" in out
        assert out.endswith("3 of 8 steps examined; the step before is step-00000100\n")


class TestFolders:
    def test_a_run_in_an_object_store(self, bisect: Bisect) -> None:
        pytest.importorskip("fsspec")
        for step in (5, 20, 300):
            dcp.save(weights(step), checkpoint_id=f"memory://bisected/step-{step}")
        found = find(bisect, "memory://bisected", "--name", "model.w", "--test", "nan")
        assert (found["step"], found["before"]) == ("step-20", "step-5")

    def test_numbers_order_the_steps(self) -> None:
        assert choose_numbered(["iter_0000020", "iter_0000003", "latest"], None) == [
            (3, "iter_0000003"),
            (20, "iter_0000020"),
        ]
        assert choose_numbered(["step-2", "epoch_1", "step-10"], None) == [
            (2, "step-2"),
            (10, "step-10"),
        ]
        assert choose_numbered(["step-2", "epoch_1"], "epoch*") == [(1, "epoch_1")]

    @pytest.mark.parametrize("names", [["step-7", "step-007"], ["a-1", "b-2"]])
    def test_folders_in_no_order_are_refused(self, names: list[str]) -> None:
        with pytest.raises(ValueError, match="choose one"):
            choose_numbered(names, None)

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["RUNS/none", "--name", "w", "--test", "nan"], "no folders with a number"),
            (["RUNS/ours", "--name", "w", "--test", "norm>nan"], "norm>NUMBER"),
            (["RUNS/ours", "--name", "model.v", "--test", "nan"], "nearest: 'model.w'"),
            (["RUNS/ours", "--name", "step", "--test", "nan"], "is a value"),
            (["RUNS/ours", "--name", "w", "--test", "frozen", "--monotone"], "leave out"),
            (["RUNS/ours", "--name", "w", "--test", "nan", "--folders", "x*"], "'x*' matches"),
            (["s9000://x/y", "--name", "w", "--test", "nan"], "s9000"),
        ],
    )
    def test_refusals(self, bisect: Bisect, runs: Path, arguments: list[str], words: str) -> None:
        code, out, err = bisect(*(one.replace("RUNS", str(runs)) for one in arguments))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err
