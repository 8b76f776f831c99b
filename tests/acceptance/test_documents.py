"""Every code block of the manual runs, and every output block is what pytest prints.

All blocks without an output run in one session, where a test runs each script. A block whose output
the page shows has a session of its own, as `test_it.py`.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pytest_dcp
from support.documents import Block, find_missing_lines, parse_blocks

if TYPE_CHECKING:
    from support.sample_session import MakeSuite, SessionResult

ROOT = Path(__file__).parents[2]
PACKAGE = Path(pytest_dcp.__file__).parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "pytest_dcp" / "guide").glob("*.md")))
BLOCKS = [
    block for page in PAGES for block in parse_blocks(page.read_text(), page.stem.replace("-", "_"))
]
"""Pages are read where tests are collected: a block is a test."""
RUN_SCRIPT = """
import runpy


def test_script(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    runpy.run_path({path!r})
"""


def _select(language: str, *, with_output: bool = False) -> list[object]:
    return [
        pytest.param(block, id=block.name)
        for block in BLOCKS
        if block.language == language and (block.output is not None) == with_output
    ]


def _file_name(block: Block) -> str:
    return f"test_{block.name}.py"


@pytest.fixture(scope="module")
def session(make_suite: MakeSuite) -> SessionResult:
    """All blocks without an output, in one session."""
    suite = make_suite({_file_name(b): "# as shown\n" for b in BLOCKS if _runs_with_others(b)})
    for block in BLOCKS:
        if _runs_with_others(block):
            _write(suite.folder, block)
    return suite.run("-p", "pytest_dcp", "-rA")


def _runs_with_others(block: Block) -> bool:
    return block.language == "python" and block.output is None


def _write(folder: Path, block: Block) -> None:
    target = folder / _file_name(block)
    if block.defines_tests:
        target.write_text(block.source)
        return
    script = folder / f"{block.name}.py"
    script.write_text(block.source)
    target.write_text(RUN_SCRIPT.format(path=str(script)))


@pytest.mark.parametrize("block", _select("python"))
def test_code_runs(block: Block, session: SessionResult) -> None:
    name = _file_name(block)
    own = [report for report in session.reports if report.nodeid.startswith(name)]
    bad = [report for report in own if report.category not in ("", "passed")]
    assert not bad, f"{block.name}: {bad[0].text}"
    assert any(report.category == "passed" for report in own), session.output[-5000:]


@pytest.mark.parametrize("block", _select("python", with_output=True))
def test_output_equals_that_of_pytest(block: Block, make_suite: MakeSuite) -> None:
    suite = make_suite({"test_it.py": block.source})
    result = suite.run("-p", "pytest_dcp", "test_it.py", env={"COLUMNS": "80"})
    missing = find_missing_lines(block.output or "", result.output)
    assert not missing, "\n".join([f"{block.name} lacks:", *missing, "printed:", result.output])


@pytest.mark.parametrize("block", _select("sh"))
def test_commands_name_existing_modules(block: Block) -> None:
    """Not run here: `.ci/run` runs them, the tests among them."""
    modules = re.findall(r"-m (pytest_dcp[\w.]*)", block.source)
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module
    environments = re.findall(r"tox run -e ([\w-]+)", block.source)
    assert environments or modules
    assert set(environments) <= _tox_environments()


def _tox_environments() -> set[str]:
    """The names in tox.ini, a generative section spelt out."""
    sections = re.findall(r"^\[testenv:([^\]]+)\]", (ROOT / "tox.ini").read_text(), re.MULTILINE)
    names: set[str] = set()
    for section in sections:
        stem, _, factors = section.partition("{")
        names |= {stem + factor for factor in factors.rstrip("}").split(",")}
    return names


@pytest.mark.parametrize("name", ["versions.txt", "floors.txt"])
def test_each_list_of_tests_names_existing_tests(name: str) -> None:
    named = (ROOT / "tests" / name).read_text().split()
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("block", _select("tree"))
def test_trees_name_existing_paths(block: Block) -> None:
    paths = [line.split()[0] for line in block.source.splitlines() if not line.startswith(" ")]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_tree_of_the_architecture_has_every_folder_of_the_package() -> None:
    (tree,) = _blocks_of("architecture", "tree")
    named = {line.split()[0] for line in tree.source.splitlines()} - {"tests/"}
    assert named == {"pytest_dcp/", *_folders_of_the_package()}


def test_each_module_that_the_architecture_names_is_there() -> None:
    text = (PACKAGE / "guide" / "architecture.md").read_text()
    named = re.findall(r"`((?:_\w+|faults|properties)/[\w/.]+)`", text)
    assert len(named) > 15
    assert [name for name in named if not (PACKAGE / name).exists()] == []


def test_each_test_that_the_guarantees_name_is_there() -> None:
    text = (PACKAGE / "guide" / "guarantees.md").read_text()
    named = re.findall(r"`(tests/[\w/.*]+)`", text)
    assert len(named) > 60
    assert [name for name in named if not list(ROOT.glob(name))] == []


def _blocks_of(page: str, language: str) -> list[Block]:
    return [block for block in BLOCKS if (block.page, block.language) == (page, language)]


def _folders_of_the_package() -> set[str]:
    return {
        f"pytest_dcp/{path.relative_to(PACKAGE)}/"
        for path in PACKAGE.rglob("*")
        if path.is_dir() and any(file.suffix in (".py", ".md") for file in path.iterdir())
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_pages_and_chapters(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, chapter = target.partition("#")
        there = page.parent / path if path else page
        assert there.is_file(), target
        titles = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
        assert not chapter or chapter in {_anchor(title) for title in titles}, target


def _anchor(title: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


class TestBlocks:
    """The reader of the blocks itself."""

    def test_invisible_code_goes_in_front_of_the_next_block(self) -> None:
        page = "<!--- invisible-code-block: python\nx = 1\n-->\n\n```python\nprint(x)\n```\n"
        assert parse_blocks(page, "page") == [Block("page", 5, "python", "x = 1\nprint(x)\n")]

    def test_an_output_goes_with_the_block_before_it(self) -> None:
        page = "```python\nprint(1)\n```\n\n```text\n1\n```\n"
        assert parse_blocks(page, "page") == [Block("page", 1, "python", "print(1)\n", "1\n")]

    def test_an_output_of_invisible_code_leaves_the_block_before_it_alone(self) -> None:
        hidden = "<!--- invisible-code-block: python\nprint(2)\n-->\n"
        page = f"```python\nprint(1)\n```\n{hidden}```text\n2\n```\n"
        first, second = parse_blocks(page, "page")
        assert (first.source, first.output) == ("print(1)\n", None)
        assert (second.source, second.output) == ("print(2)\n", "2\n")

    @pytest.mark.parametrize(
        "page",
        [
            "```\nno language\n```\n",
            "```text\nof nothing\n```\n",
            "<!--- invisible-code-block: python\nunused = 1\n-->\n",
        ],
    )
    def test_a_block_that_nothing_would_check_is_refused(self, page: str) -> None:
        with pytest.raises(ValueError, match="line 1"):
            parse_blocks(page, "page")

    @pytest.mark.parametrize(
        ("output", "missing"),
        [
            ("one 1.25 s\ntwo", []),
            ("one 7.00 s\n...\nfour", []),
            ("posix-00000000ff", []),
            ("one 7.00 s\nfour", ["one 7.00 s", "four"]),
            ("...\nfive", ["five"]),
            ("two\n...\none 1.25 s", ["one 1.25 s"]),
        ],
    )
    def test_lines_stand_together_and_in_order(self, output: str, missing: list[str]) -> None:
        assert (
            find_missing_lines(output, "one 3.50 s\ntwo\nthree\nfour\nposix-7cf359f7fa\n")
            == missing
        )
