"""Tables and drawings for the terminal, from values. Pure (no I/O)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from pytest_dcp._engine.lazy_reading.contents import StoredShard

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
COLOURS = ("blue", "yellow", "green", "red", "cyan", "magenta")
WIDTH, HEIGHT = 48, 12
"""Of a drawing, in characters."""
BARS = " ▁▂▃▄▅▆▇█"
PLAIN_BARS = " .:-=+*#"
"""For a terminal that has no other characters."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def show_bytes(count: int) -> str:
    """The number with a unit.

    >>> show_bytes(1536)
    '1.5 KiB'
    """
    size, unit = float(count), 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{count} B" if not unit else f"{size:.1f} {UNITS[unit]}"


def plain_text(text: str) -> str:
    """A name of a checkpoint without characters that would control the terminal.

    >>> plain_text("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def draw_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> Table:
    """A table whose last columns, this many, are numbers. Markup in cells is not interpreted."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for at, title in enumerate(columns):
        is_number = at >= len(columns) - numbers
        table.add_column(title, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain_text(cell)) for cell in row))
    return table


def draw_layout(shape: Sequence[int], shards: Sequence[StoredShard]) -> Text:
    """The shards of a tensor as a rectangle of letters, coloured by file; `.` is in no shard.

    Of more than two dimensions, the first two are drawn.
    """
    rows, columns = _plane(shape, 1)
    height, width = min(rows, HEIGHT), min(columns, WIDTH)
    files = {file: n for n, file in enumerate(dict.fromkeys(shard.file for shard in shards))}
    grid = [[-1] * width for _ in range(height)]
    for shard in shards:
        top, start = _plane(shard.offset, 0)
        down, across = _plane(shard.shape, 1)
        for y in _cells(top, down, rows, height):
            for x in _cells(start, across, columns, width):
                grid[y][x] = files[shard.file]
    drawing = Text()
    for line in grid:
        for number in line:
            letter = "." if number < 0 else chr(ord("A") + number % 26)
            drawing.append(letter, COLOURS[number % len(COLOURS)] if number >= 0 else "")
        drawing.append("\n")
    return drawing


def draw_histogram(counts: Sequence[int], bars: str = BARS) -> str:
    """One character for each bin, out of `bars`, which ascend.

    >>> draw_histogram([0, 1, 8])
    ' ▁█'
    """
    most = max(counts, default=0)
    return "".join(bars[-(-count * (len(bars) - 1) // most) if most else 0] for count in counts)


def _cells(start: int, length: int, whole: int, cells: int) -> range:
    """The cells of a drawing that a part of a dimension covers, at least one."""
    first = min(start * cells // whole, cells - 1)
    return range(first, max(first + 1, min(cells, -(-(start + length) * cells // whole))))


def _plane(sizes: Sequence[int], fill: int) -> tuple[int, int]:
    """The first two of these numbers; a vector lies in a row."""
    if len(sizes) < 2:
        return fill, (max(sizes[0], fill) if sizes else fill)
    return max(sizes[0], fill), max(sizes[1], fill)
