"""Wrappers of other tensors, as torchao's, in opened checkpoints and in the commands."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pytest_dcp.checkpoint as dcp
from pytest_dcp._cli.main import main
from pytest_dcp.errors import CheckpointMismatchError, UntrustedPickleError
from support.opaque_tensors import outer, per_tensor, scaled
from support.states import torch_dcp

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
ENGINES = {"ours": dcp, "torchs": torch_dcp}
CLASS = "support.opaque_tensors.Scaled"


def state(factor: int = 2, block: int = 32) -> dict[str, Any]:
    return {"w": scaled(factor, block=block), "n": outer(3), "plain": torch.ones(3), "step": 5}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrappers")
    for name, engine in ENGINES.items():
        engine.save(state(), checkpoint_id=folder / name)
    dcp.save(state(factor=3), checkpoint_id=folder / "others")
    dcp.save(state(block=8), checkpoint_id=folder / "blocks")
    return folder


@pytest.mark.parametrize("engine", ENGINES)
class TestParts:
    def test_the_inner_tensors_are_read_by_their_attributes(
        self, samples: Path, engine: str
    ) -> None:
        with dcp.open(samples / engine) as opened:
            parts = opened["w"].parts
            assert repr(dict(parts)) == (
                "{'values': <'w.values': torch.int8 of (2, 3)>, "
                "'scale': <'w.scale': torch.float32 of (2,)>}"
            )
            values, scale = parts["values"], parts["scale"]
            assert isinstance(values, dcp.StoredPart)
            assert isinstance(scale, dcp.StoredPart)
            assert torch.equal(values.tensor(), scaled(2).values)
            assert torch.equal(scale.tensor(), scaled(2).scale)
            assert (values.shape, values.dtype, values.nbytes) == ((2, 3), torch.int8, 6)

    def test_a_wrapper_names_its_class_and_plain_attributes(
        self, samples: Path, engine: str
    ) -> None:
        with dcp.open(samples / engine) as opened:
            (wrapper,) = opened["w"].wrappers
            assert (wrapper.kind, wrapper.shape, wrapper.offset) == (CLASS, (2, 3), (0, 0))
            assert (wrapper.dtype, dict(wrapper.attributes)) == (torch.float32, {"block": 32})
            assert opened["plain"].parts == opened["step"].parts == {}

    def test_one_within_another_is_a_part_with_parts(self, samples: Path, engine: str) -> None:
        with dcp.open(samples / engine) as opened:
            inner = opened["n"].parts["scale"]
            assert isinstance(inner, dcp.StoredWrapper)
            assert [part.name for part in inner.walk_parts()] == ["n.scale.values", "n.scale.scale"]
            assert torch.equal(next(inner.walk_parts()).tensor(), scaled(3).values)

    def test_it_is_no_tensor_and_no_value_and_the_error_names_the_way(
        self, samples: Path, engine: str
    ) -> None:
        with dcp.open(samples / engine) as opened:
            lazy: Any = opened["w"]
            read = lazy.value if engine == "ours" else lazy.tensor
            with pytest.raises(
                (CheckpointMismatchError, UntrustedPickleError),
                match=rf"'w' is stored as a {CLASS}, .*: checkpoint\['w'\].parts has these tensors",
            ):
                read()

    def test_its_class_is_not_imported(self, samples: Path, engine: str) -> None:
        program = (
            "import sys, pytest_dcp.checkpoint as dcp\n"
            f"with dcp.open({str(samples / engine)!r}) as opened:\n"
            "    print(opened['w'].parts['scale'].tensor().tolist(), 'support' in sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
        )
        assert done.stdout == "[1.0, 4.0] False\n"

    def test_parts_cannot_be_pickled(self, samples: Path, engine: str) -> None:
        with dcp.open(samples / engine) as opened:
            for value in (opened["w"].parts["scale"], *opened["w"].wrappers):
                with pytest.raises(TypeError, match="cannot be pickled"):
                    pickle.dumps(value)

    def test_damage_of_an_inner_tensor_is_found(
        self, samples: Path, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(samples / engine, tmp_path / "damaged")
        (file,) = (tmp_path / "damaged").glob("*.distcp")
        content = bytearray(file.read_bytes())
        at = content.index(torch.tensor([1.0, 4.0]).numpy().tobytes())
        content[at] ^= 1
        file.write_bytes(content)
        assert main(["verify", str(tmp_path / "damaged")]) == 1
        assert capsys.readouterr().out.startswith("w: ")

    def test_verify_reads_them(
        self, samples: Path, engine: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["verify", str(samples / engine), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["problems"] == found["foreign"] == []

    def test_show_prints_class_attributes_and_parts(
        self, samples: Path, engine: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["show", str(samples / engine), "n"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert lines == [
            ["n:", "stored", "as", "1", "wrapper(s)", "of", "other", "tensors"],
            ["support.opaque_tensors.Outer", "at", "[0,", "0],", "of", "[2,", "3],", "block=32"],
            ["part", "dtype", "shape", "bytes"],
            ["n.values", "int8", "[2,", "3]", "6", "B"],
            ["n.scale.values", "int8", "[2,", "3]", "6", "B"],
            ["n.scale.scale", "float32", "[2]", "8", "B"],
        ]
        assert main(["show", str(samples / engine), "w", "--json"]) == 0
        (wrapper,) = json.loads(capsys.readouterr().out)["wrappers"]
        assert (wrapper["class"], wrapper["attributes"]) == (CLASS, {"block": "32"})
        assert [part["name"] for part in wrapper["parts"]] == ["w.values", "w.scale"]

    @pytest.mark.parametrize("target", ["out.safetensors", "out.pt"])
    def test_a_conversion_refuses_it_by_name(
        self,
        samples: Path,
        engine: str,
        tmp_path: Path,
        target: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        words = ["convert", str(samples / engine), str(tmp_path / target), "--exclude", "step"]
        assert main(words) == 2
        assert "'w'" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("one", "other", "code", "line"),
    [
        ("ours", "torchs", 0, ""),
        ("torchs", "ours", 0, ""),
        ("torchs", "others", 1, "w: the elements of w.values differ"),
        ("ours", "others", 1, "w: the elements of w.values differ"),
        ("torchs", "blocks", 1, "w: attributes {'block': 32}, {'block': 8}"),
    ],
)
def test_diff_compares_class_attributes_and_parts(
    samples: Path, one: str, other: str, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(samples / one), str(samples / other)]) == code
    first, last = [*capsys.readouterr().out.splitlines(), ""][:2]
    assert (first, last) == (
        (line, "3 names equal, 1 differ") if code else ("4 names equal, 0 differ", "")
    )


def test_diff_names_a_wrapper_against_plain_elements(
    samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_dcp.save(state() | {"w": torch.ones(2, 3)}, checkpoint_id=tmp_path / "plain")
    assert main(["diff", str(samples / "torchs"), str(tmp_path / "plain")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("w: 1 and 0 of the shards are wrappers of other tensors")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_tensor_stays_a_value(tmp_path: Path) -> None:
    dcp.save({"q": per_tensor(2)}, checkpoint_id=tmp_path / "q")
    with dcp.open(tmp_path / "q") as opened:
        lazy: Any = opened["q"]
        assert lazy.parts == {}
        assert torch.equal(lazy.value(), per_tensor(2))
