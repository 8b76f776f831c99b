"""The tables of the guide are made from the JSON of the benchmarks' runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_dcp

COMMAND = Path(__file__).parents[1] / "benchmarks" / "write_figures.py"
PERFORMANCE = Path(pytest_dcp.__file__).parent / "guide" / "performance.md"
WHERE = {"when": "2026-01-02T03:04:05+00:00", "torch": "2.13.0", "python": "3.11.7", "cpus": 2}
SPREAD = {"low": 1.0, "first_quartile": 1.0, "third_quartile": 1.0, "high": 1.0, "runs": 1}


def _median(method: str, workload: str, size: int, ms: float) -> dict[str, object]:
    case = {"method": method, "workload": workload, "size": size}
    return case | {"ms": ms, "low_ms": ms, "high_ms": ms, "first_ms": None, "runs": 1}


def _verdict(measured: float, limit: float, note: str | None = None) -> dict[str, object]:
    goal = {"limit": limit, "over": "torch", "under": "ours", "at_most": False, "note": note}
    return {"goal": goal, "measured": measured, "met": measured >= limit}


WORLDS = {
    "environment": WHERE,
    "medians": [_median("bare fork", "all_reduce", 4, 56.94), _median("one", "other", 1, 2.0)],
    "targets": [{"text": "as fast as a fork", "measured": "1.30x", "passed": False}],
}
ENGINE = {
    "environment": WHERE,
    "cases": [
        {
            "case": {"name": "load", "place": "disk"},
            "spread": {"torch": SPREAD | {"median": 1234.5}, "ours": SPREAD | {"median": 27.12}},
            "verdicts": [_verdict(45.52, 40.0), _verdict(1.0, 1.01, "bytes read")],
        }
    ],
}
STATE_DICTS = {
    "environment": WHERE,
    "quick": True,
    "cases": [{"case": "get", "torch_ms": 94.0, "ours_ms": 30.41, "ratio": 3.09, "met": True}],
    "peaks": {"ours, meta": {"peak_mib": 177.2, "largest_mib": 32.0, "shards_mib": 144.0}},
}
HARDENING = {
    "environment": WHERE,
    "sections": {"peers": [{"peers": 4096, "join_ms": 1028.4, "met": True}], "floods": []},
}
SIMULATION = {
    "environment": WHERE,
    "simulation": [{"ranks": 16384, "plan_s": 21.34, "met": True}],
}
GROWTH = {
    "environment": WHERE,
    "growth": [{"cost": "save", "sizes": "1, 2", "exponent": 1.0123, "met": True}],
}
PLACES = (
    *("worlds", "worlds-targets", "examples", "engine", "state-dicts", "hardening-peers"),
    *("simulation", "growth", "own"),
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page of the guide, filled by one run of each benchmark."""
    folder = tmp_path_factory.mktemp("figures")
    text = "# Title\n\n" + "".join(
        f"Before {name}.\n\n<!-- figures: {name} -->\nOLD {name}\n<!-- end of figures -->\n\n"
        for name in PLACES
    )
    (folder / "page.md").write_text(text + "The end.\n")
    runs = []
    for number, document in enumerate((WORLDS, ENGINE, STATE_DICTS, HARDENING, SIMULATION, GROWTH)):
        runs.append(folder / f"{number}.json")
        runs[-1].write_text(json.dumps(document))
    command = [sys.executable, str(COMMAND), *map(str, runs), "--guide", str(folder / "page.md")]
    subprocess.run(command, check=True, capture_output=True)
    return (folder / "page.md").read_text()


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("worlds", "| 4 | all_reduce | - | 56.9 | - | - | - | - | - | - | - |"),
        ("worlds-targets", "| as fast as a fork | 1.30x | no |"),
        ("engine", "| load | disk | torch / ours | 1,234 | 27.1 | 45.52x | >= 40.00x | yes |"),
        ("engine", "| load | disk | bytes read | - | - | 1 | >= 1.01 | no |"),
        ("state-dicts", "| get | 94.0 | 30.4 | 3.1x |"),
        ("hardening-peers", "| 4,096 | 1,028 | yes |"),
        ("simulation", "| 16,384 | 21.3 | yes |"),
        ("growth", "| save | 1, 2 | 1.01 | yes |"),
    ],
)
def test_a_run_becomes_the_tables_of_its_sections(page: str, name: str, row: str) -> None:
    section = _sections(page)[name]
    assert row in section.splitlines()
    assert section.startswith("\nMeasured on 2026-01-02, torch 2.13.0, Python 3.11.7, 2 cores.")
    assert "OLD" not in section


def test_figures_of_a_quick_run_say_so(page: str) -> None:
    marked = {name for name, text in _sections(page).items() if "which mean little" in text}
    assert marked == {"state-dicts"}


def test_prose_and_sections_of_other_runs_stay(page: str) -> None:
    assert _sections(page)["own"] == "OLD own\n"
    assert re.findall(r"Before ([\w-]+)\.", page) == list(PLACES)
    assert page.endswith("The end.\n")


def test_a_page_without_a_place_for_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("# No places\n")
    (tmp_path / "run.json").write_text(json.dumps(ENGINE))
    command = [sys.executable, str(COMMAND), "run.json", "--guide", "page.md"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert "expected a line <!-- figures: NAME --> for one of ['engine']" in done.stderr
    assert done.returncode == 1
    assert (tmp_path / "page.md").read_text() == "# No places\n"


def test_the_guide_has_a_place_for_each_benchmark() -> None:
    assert {
        *("worlds", "worlds-targets", "adoption", "examples", "engine", "state-dicts"),
        *("hardening-bombs", "hardening-overwrites", "hardening-floods", "hardening-peers"),
        *("simulation", "growth", "opened"),
    } <= _sections(PERFORMANCE.read_text()).keys()


def _sections(page: str) -> dict[str, str]:
    pattern = r"<!-- figures: ([\w-]+) -->\n(.*?)<!-- end of figures -->"
    return dict(re.findall(pattern, page, re.DOTALL))
