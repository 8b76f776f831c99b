"""`pytest-dcp show --html`: the page, and what a browser draws of it."""

from __future__ import annotations

import errno
import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pytest_dcp.checkpoint as dcp
from pytest_dcp._cli.layout_page import page as page_module
from pytest_dcp._cli.layout_page.facts import PageFacts, collect_facts, sum_by_prefix
from pytest_dcp._cli.layout_page.page import make_page
from pytest_dcp._cli.main import main
from pytest_dcp._engine.lazy_reading.contents import StoredShard, TensorFacts
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
HOSTILE = (
    "</script><script>document.body.dataset.hacked=1</script>",
    "<img src=x onerror='document.body.dataset.hacked=2'>",
    '"><svg onload=alert(1)>',
    "a\x1b[31m\u202eb\u2028&amp;",
)


class FakeContents:
    """A checkpoint of four ranks in a 2x2 mesh, and names that try to become markup."""

    missing_files = ("__3_0-0123456789ab.distcp",)

    def __init__(self) -> None:
        self.tensors = {"model.w": (4, 6), "model.experts": (2, 5, 4), "model.bias": (4,)}
        self.tensors |= dict.fromkeys(HOSTILE, (1, 1))
        self.names = [*self.tensors, "step"]

    def has(self, name: str) -> bool:
        return name in self.names

    def describe(self, name: str) -> TensorFacts | None:
        if name == "step":
            return None
        return TensorFacts(self.tensors[name], torch.float32)

    def shards(self, name: str) -> tuple[StoredShard, ...]:
        shape = self.tensors[name]
        if len(shape) == 1 or shape == (1, 1):
            return (StoredShard((0,) * len(shape), shape, self.file_names()[0], 4 * shape[0]),)
        half = [shape[0] // 2, *shape[1:-1], shape[-1] // 2]
        return tuple(
            StoredShard(
                (y * half[0], *(0 for _ in shape[1:-1]), x * half[-1]),
                tuple(half),
                self.file_names()[2 * y + x],
                4 * torch.Size(half).numel(),
            )
            for y in (0, 1)
            for x in (0, 1)
        )

    def count_shards(self, name: str) -> int:
        return len(self.shards(name))

    def stored_nbytes(self, name: str) -> int:
        return 20

    def file_names(self) -> list[str]:
        return [f"__{rank}_0-0123456789ab.distcp" for rank in range(4)]


def fake_facts(most: int = 100) -> PageFacts:
    contents: Any = FakeContents()
    checkpoint = OpenCheckpoint("<b>run</b>/step-1", "dcp", contents)
    return collect_facts(checkpoint, list(checkpoint), most)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(make_page(fake_facts()), "utf-8")
    return path


def open_in_browser(page: Path, view: str = "") -> str:
    """The document as the browser has it after the page's script ran."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    profile = page.parent / "profile"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", f"{page.as_uri()}#{view}"],
        capture_output=True,
        timeout=120,
        check=False,
    )
    shutil.rmtree(profile, ignore_errors=True)
    return done.stdout.decode()


def cut_drawing(dom: str, kind: str) -> str:
    """The first SVG of this class."""
    found = re.search(rf'<svg[^>]*class="{kind}"[^>]*>.*?</svg>', dom, re.DOTALL)
    assert found, dom[-3000:]
    return found[0]


def rectangles(drawing: str) -> list[dict[str, str]]:
    return [
        dict(re.findall(r'([\w-]+)="([^"]*)"', one)) for one in re.findall("<rect[^>]*", drawing)
    ]


def rows_of(dom: str) -> list[str]:
    return [html.unescape(n) for n in re.findall(r'<tr class="name[^"]*" data-name="([^"]*)"', dom)]


@pytest.fixture(scope="module")
def dom(page: Path) -> str:
    return open_in_browser(page, "name=model.experts")


class TestBrowser:
    def test_the_script_ran_to_its_end(self, dom: str) -> None:
        assert 'data-drawn="yes"' in dom

    def test_shards_are_rectangles_coloured_by_rank(self, dom: str) -> None:
        large = rectangles(cut_drawing(dom, "shards"))
        assert len(large) == 4
        assert len({one["fill"] for one in large}) == 4
        # Dimensions 0 and 2 are cut, so these are drawn.
        assert "dimension 0 runs down, 2 to the right" in dom
        x, y = float(large[3]["x"]), float(large[3]["y"])
        assert (x, y) == (float(large[0]["width"]), float(large[0]["height"]))
        assert "offset [1, 0, 2], shape [1, 5, 2], 40 B, __3_0-0123456789ab.distcp" in dom
        assert all(f"rank {rank}  " in dom for rank in range(4))

    def test_every_tensor_has_a_drawing_and_a_row(self, dom: str) -> None:
        assert rows_of(dom) == ["model.experts", "model.w", "model.bias", *HOSTILE, "step"]
        assert dom.count('class="shards"') == 1 + 7  # the large one, and one in each tensor's row

    def test_areas_of_the_treemap_are_bytes(self, dom: str) -> None:
        treemap = cut_drawing(dom, "treemap")
        areas = {}
        for name, leaf in re.findall(
            r'<g class="leaf[^"]*" data-name="([^"]*)">(.*?)</g>', treemap
        ):
            whole = next(one for one in rectangles(leaf) if one.get("class") == "outline")
            areas[name] = float(whole["width"]) * float(whole["height"])
        assert areas["model.experts"] / areas["model.w"] == pytest.approx(160 / 96, rel=0.05)
        strips = re.search(r'data-name="model.w">(.*?)</g>', treemap)
        assert strips
        assert len({one["fill"] for one in rectangles(strips[1])} - {"none"}) == 4
        assert "4 shards, 96 B, of 4 ranks" in strips[1]

    def test_texts_of_the_checkpoint_stay_texts(self, dom: str) -> None:
        body = dom[dom.index("<main") :]
        body = body[: body.index('<script type="application')]
        assert "data-hacked" not in dom
        assert not re.search(r"<(img|script|b)\b", body)
        assert not re.search(r"onload=[^\"]*>", re.sub(r'"[^"]*"', "", body))
        assert "&lt;img src=x onerror=" in body
        assert "\\x1b[31m\\u202eb" in re.sub(r'data-name="[^"]*"', "", body)

    def test_the_address_searches_and_colours(self, page: Path) -> None:
        dom = open_in_browser(page, "q=w+MODEL&by=file&sort=name")
        assert rows_of(dom) == ["model.w"]
        assert "1 of 8" in dom
        assert dom.count('class="leaf other"') == 6
        assert "__2_0-0123456789ab.distcp  64 B" in dom


class TestPage:
    def test_nothing_is_asked_of_a_network(self, page: Path) -> None:
        text = page.read_text("utf-8")
        assert set(re.findall(r"https?://[^\"']*", text)) == {"http://www.w3.org/2000/svg"}
        assert not re.search(r"<(link|img|iframe)\b|\bsrc=(?!x)|@import|url\(", text)
        assert "default-src &#x27;none&#x27;" in text

    def test_data_cannot_end_their_element(self, page: Path) -> None:
        text = page.read_text("utf-8")
        assert text.count("</script>") == 2
        assert "<b>run" not in text
        data = text.partition('id="facts">')[2].partition("</script>")[0]
        assert {row["name"] for row in json.loads(data)["rows"]} >= set(HOSTILE)

    def test_the_largest_names_are_shown_and_the_others_counted(self) -> None:
        facts = fake_facts(most=2)
        assert [row["name"] for row in facts.rows] == ["model.experts", "model.w"]
        assert (facts.omitted_names, facts.omitted_nbytes) == (6, 16 + 4 * 4)
        assert "6 more names with tensors of 32 B are left out" in make_page(facts)
        assert sum(nbytes for _, _, nbytes in facts.omitted) == 32

    def test_omitted_names_are_summed_by_prefix(self) -> None:
        sizes = [(f"layers.{n // 10}.mlp.w{n % 10}", 4) for n in range(100)]
        assert sum_by_prefix(sizes, most=10)[3] == ("layers.3.mlp", 10, 40)
        assert sum_by_prefix(sizes, most=9) == (("layers", 100, 400),)

    def test_missing_files_are_named(self, page: Path) -> None:
        assert "Missing data files: __3_0-0123456789ab.distcp" in page.read_text("utf-8")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    state = {f"layers.{n}.w": torch.ones(n + 1, 3) for n in range(50)} | {"step": 7}
    dcp.save(state, checkpoint_id=folder / "ours")
    save_file({"w": torch.ones(2, 3)}, folder / "one.safetensors")
    return folder


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
        code = main(["show", *map(str, arguments)])
        output = capsys.readouterr()
        return code, output.out, output.err

    def test_a_page_of_every_kind_of_checkpoint(
        self, capsys: pytest.CaptureFixture[str], samples: Path, tmp_path: Path
    ) -> None:
        target = tmp_path / "page.html"
        code, out, err = self.run(capsys, samples / "ours", "--html", target, "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert (found["names"], found["omitted_names"]) == (51, 0)
        assert found["nbytes"] == target.stat().st_size
        code, out, _ = self.run(capsys, samples / "ours", "--html", target, "--top", 10)
        assert code == 0
        assert "10 names, 41 left out" in out
        options = ["layers.1?.w", "--html", target, "--json"]
        assert json.loads(self.run(capsys, samples / "ours", *options)[1])["names"] == 10
        assert self.run(capsys, samples / "one.safetensors", "--html", target)[0] == 0
        assert os.listdir(tmp_path) == ["page.html"]

    def test_a_failure_leaves_the_earlier_page(
        self,
        capsys: pytest.CaptureFixture[str],
        samples: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        target = tmp_path / "page.html"
        target.write_text("earlier")

        def is_full(fd: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("pytest_dcp._engine.operating_system.sync_file", is_full)
        code, out, err = self.run(capsys, samples / "ours", "--html", target)
        assert (code, out) == (2, "")
        assert "No space left" in err
        assert os.listdir(tmp_path) == ["page.html"]
        assert target.read_text() == "earlier"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "show takes a name"),
            (["--html", "no/folder/page.html"], "folder is missing"),
            (["--html", "s3://bucket/page.html"], "is a URL"),
            (["layers.0.x*", "--html", "page.html"], "has no 'layers.0.x*'"),
        ],
    )
    def test_refusals(
        self,
        capsys: pytest.CaptureFixture[str],
        samples: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        words: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        code, out, err = self.run(capsys, samples / "ours", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err
        assert list(tmp_path.iterdir()) == []


def test_the_policy_allows_the_script_of_the_package(page: Path) -> None:
    text = page.read_text("utf-8")
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    assert html.escape(page_module._digest(script)) in text
