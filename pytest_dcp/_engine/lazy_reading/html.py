"""An opened checkpoint in a notebook: tables and drawings in HTML. Pure (no I/O).

Names and file names come from the checkpoint, so every one is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pytest_dcp._engine.lazy_reading.contents import StoredShard

COLUMNS = ("name", "dtype", "shape", "shards", "bytes")
ROWS = 200
"""Names in the table: a notebook is not the place for a million."""
RECTANGLES = 2000
WIDTH, HEIGHT = 480.0, 240.0
"""Of a drawing, in pixels, at most."""
COLOURS = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#9c755f"),
    *("#ff9da7", "#bab0ac"),
)


def draw_checkpoint(title: str, rows: Sequence[Sequence[str]], more: int) -> str:
    """A table of names.

    rows: of each name its dtype, shape, number of shards and bytes. more: names that are left out.
    """
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    rest = f"<p>… and {more:,} more names</p>" if more > 0 else ""
    return f"<div><p>{escape(title)}</p><table><tr>{head}</tr>{body}</table>{rest}</div>"


def draw_tensor(title: str, shape: Sequence[int], shards: Sequence[StoredShard]) -> str:
    """The tensor's facts, and its shards as rectangles, coloured by file.

    Of more than two dimensions, the first two are drawn.
    """
    return f"<div><p>{escape(title)}</p>{draw_shards(shape, shards)}</div>"


def draw_shards(shape: Sequence[int], shards: Sequence[StoredShard]) -> str:
    """An SVG of the boxes: the first dimension runs downwards, the second to the right."""
    rows, columns = _plane(shape)
    scale_x, scale_y = WIDTH / columns, HEIGHT / rows
    files = {file: n for n, file in enumerate(dict.fromkeys(shard.file for shard in shards))}
    seen: set[tuple[int, ...]] = set()
    rectangles = []
    for shard in shards:
        top, start = _plane(shard.offset, 0)
        height, width = _plane(shard.shape)
        box = (top, start, height, width, files[shard.file])
        if box in seen or len(seen) >= RECTANGLES:
            continue
        seen.add(box)
        title = f"{shard.file}: offset {shard.offset}, shape {shard.shape}"
        rectangles.append(
            f'<rect x="{start * scale_x:.2f}" y="{top * scale_y:.2f}" '
            f'width="{width * scale_x:.2f}" height="{height * scale_y:.2f}" '
            f'fill="{COLOURS[files[shard.file] % len(COLOURS)]}" stroke="white">'
            f"<title>{escape(title)}</title></rect>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:.0f}" height="{HEIGHT:.0f}" '
        f'role="img">{"".join(rectangles)}</svg>'
    )


def _plane(sizes: Sequence[int], fill: int = 1) -> tuple[int, int]:
    """The first two of these numbers; a vector lies in a row."""
    if len(sizes) < 2:
        return fill, (max(sizes[0], fill) if sizes else fill)
    return max(sizes[0], fill), max(sizes[1], fill)
