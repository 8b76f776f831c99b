"""The drawing of a checkpoint: everything in it that comes from a file is escaped."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from pytest_dcp._engine.lazy_reading.contents import StoredShard
from pytest_dcp._engine.lazy_reading.html import (
    RECTANGLES,
    draw_checkpoint,
    draw_shards,
    draw_tensor,
)

EVIL = "\"><script>alert(1)</script>&'"


def rectangles(svg: str) -> list[dict[str, str]]:
    return [e.attrib for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("rect")]


def test_names_of_tensors_and_files_are_escaped() -> None:
    shard = StoredShard((0, 0), (2, 2), EVIL, 16)
    for text in (
        draw_tensor(EVIL, (2, 2), [shard]),
        draw_checkpoint(EVIL, [(EVIL, EVIL, "[2]", "1", "8")], more=1),
    ):
        assert "<script" not in text
        ElementTree.fromstring(text)  # well-formed


def test_shards_are_drawn_in_proportion_and_coloured_by_file() -> None:
    shards = [StoredShard((0, 0), (3, 4), "a", 48), StoredShard((3, 0), (1, 4), "b", 16)]
    first, second = rectangles(draw_shards((4, 4), shards))
    assert float(first["height"]) == 3 * float(second["height"])
    assert float(second["y"]) == float(first["height"])
    assert first["fill"] != second["fill"]


def test_vectors_scalars_and_empty_tensors_are_drawn() -> None:
    for shape in ((), (5,), (0, 3), (2, 3, 4)):
        shard = StoredShard((0,) * len(shape), shape, None, 0)
        assert len(rectangles(draw_shards(shape, [shard]))) == 1


def test_a_drawing_has_a_bounded_number_of_rectangles() -> None:
    shards = [StoredShard((n,), (1,), "a", 4) for n in range(10 * RECTANGLES)]
    assert len(rectangles(draw_shards((len(shards),), shards))) == RECTANGLES
