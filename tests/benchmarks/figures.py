"""From the JSON of a benchmark's run to the tables of the guide. Pure (no I/O) but for `update`.

Enters: the documents that `bench_worlds`, `bench_adoption`, `bench_async`, `bench_engine`,
`bench_state_dict`, `bench_opened`, `bench_shared_reads`, `bench_steps`, `bench_hardening`,
`bench_simulation` and `bench_growth` write. Leaves: Markdown tables by the names of their sections.
A page has a place for each section that it shows, and everything between its two lines is replaced:

    <!-- figures: worlds -->
    <!-- end of figures -->
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import table
from methods import Case

Document = Mapping[str, Any]
ADOPTION_COLUMNS = ("tests of", "as written, ms", "adopted, ms", "faster", "at least 20x")
WORDS = {True: "yes", False: "no", None: table.ABSENT}
_PLACE = re.compile(
    r"(?P<begin><!-- figures: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end of figures -->)", re.DOTALL
)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--guide`, for `update`."""
    parser.add_argument(
        "--guide", type=Path, metavar="PAGE", help="write the tables into this page of the guide"
    )


def update(page: Path, document: Document) -> list[str]:
    """The names of the sections of the page that were replaced by this run's tables."""
    text, replaced = fill(page.read_text(), sections(document))
    page.write_text(text)
    return replaced


def fill(text: str, tables: Mapping[str, str]) -> tuple[str, list[str]]:
    """The page with these tables filled in, and the names of the tables that it has.

    Raises:
        ValueError: the page has a place for none of them.
    """
    replaced: list[str] = []

    def put(place: re.Match[str]) -> str:
        name = place["name"]
        if name not in tables:
            return place[0]
        replaced.append(name)
        return f"{place['begin']}\n{tables[name]}\n\n{place['end']}"

    filled = _PLACE.sub(put, text)
    if not replaced:
        raise ValueError(f"expected a line <!-- figures: NAME --> for one of {sorted(tables)}")
    return filled, replaced


def sections(document: Document) -> dict[str, str]:
    """The Markdown of each section, under the line that says which run it is from.

    Raises:
        ValueError: the document is of none of the benchmarks.
    """
    if "medians" in document:
        found = _worlds(document)
    elif "sections" in document:
        found = {
            f"hardening-{name}": _hardening(rows)
            for name, rows in document["sections"].items()
            if rows
        }
    elif "simulation" in document:
        found = {"simulation": _hardening(document["simulation"])}
    elif "peaks" in document:
        found = _state_dicts(document)
    elif "adopted" in document:
        found = {"adoption": table.markdown(ADOPTION_COLUMNS, adoption_rows(document["adopted"]))}
    elif "opened" in document:
        found = {"opened": _hardening(document["opened"])}
    elif "async" in document:
        found = {"async": _hardening(document["async"])}
    elif "growth" in document:
        found = {"growth": _hardening(document["growth"])}
    elif "shared_reads" in document:
        found = {"shared-reads": _hardening(document["shared_reads"])}
    elif "steps" in document:
        found = {"steps": _hardening(document["steps"])}
    elif "cases" in document:
        found = {"engine": _engine(document["cases"])}
    else:
        raise ValueError(f"expected the JSON of a benchmark, got one with {sorted(document)}")
    origin = describe_run(document)
    return {name: f"{origin}\n\n{text}" for name, text in found.items()}


def describe_run(document: Document) -> str:
    """When and on what the figures were measured, in a sentence."""
    where = document.get("environment", {})
    day = str(where.get("when", "an unknown day")).partition("T")[0]
    parts = [f"Measured on {day}"]
    parts += [f"torch {where['torch']}"] if "torch" in where else []
    parts += [f"Python {where['python']}"] if "python" in where else []
    parts += [f"{where['cpus']} cores"] if "cpus" in where else []
    options = document.get("options", document)
    quick = " These are figures of `--quick`, which mean little." if options.get("quick") else ""
    return f"{', '.join(parts)}.{quick}"


def adoption_rows(rows: Sequence[Document]) -> list[list[str]]:
    """The rows of the table of unmodified suites."""
    return [
        [
            row["kind"],
            f"{row['as written']:,.0f}",
            f"{row['adopted']:,.0f}",
            f"{row['ratio']:,.0f}x",
            WORDS[row["met"]],
        ]
        for row in rows
    ]


def _worlds(document: Document) -> dict[str, str]:
    case_of, median_of = Case.__dataclass_fields__, table.Median.__dataclass_fields__
    found = {
        Case(**{name: row[name] for name in case_of}): table.Median(
            **{name: row[name] for name in median_of}
        )
        for row in document["medians"]
    }
    judged = [table.Target(**target) for target in document["targets"]]
    return {
        "worlds": table.markdown(table.WORLD_COLUMNS, table.world_rows(found)),
        "worlds-targets": table.markdown(
            ("target", "measured", "met"),
            [
                [text, measured, _yes_or_no(word)]
                for text, measured, word in table.target_rows(judged)
            ],
        ),
        "examples": table.markdown(table.EXAMPLE_COLUMNS, table.example_rows(found)),
        "worlds-short": table.markdown(table.SHORT_COLUMNS, table.short_rows(found)),
        "plain": table.markdown(table.PLAIN_COLUMNS, table.plain_rows(found)),
    }


def _yes_or_no(word: str) -> str:
    return {"pass": "yes", "MISS": "no"}.get(word, word)


def _engine(cases: Sequence[Document]) -> str:
    columns = ("case", "place", "compared", "ms", "ours, ms", "measured", "target", "met")
    rows = [_engine_row(one, verdict) for one in cases for verdict in one["verdicts"]]
    return table.markdown(columns, rows)


def _engine_row(one: Document, verdict: Document) -> list[str]:
    goal, case = verdict["goal"], one["case"]
    is_ratio = goal["note"] is None
    compared = f"{goal['over']} / {goal['under']}" if is_ratio else goal["note"]
    over, under = (one["spread"].get(goal[side], {}).get("median") for side in ("over", "under"))
    limit = goal["limit"]
    sign = "<=" if goal["at_most"] else ">="
    return [
        *(case["name"], case["place"], compared),
        *(_number(value if is_ratio else None) for value in (over, under)),
        _measured(verdict["measured"], is_ratio=is_ratio),
        table.ABSENT if limit is None else f"{sign} {_measured(limit, is_ratio=is_ratio)}",
        WORDS[verdict["met"]],
    ]


def _measured(value: float | None, *, is_ratio: bool) -> str:
    if value is None:
        return table.ABSENT
    return f"{value:,.2f}x" if is_ratio else f"{value:,.4g}"


def _state_dicts(document: Document) -> dict[str, str]:
    rows = [
        [row["case"], _number(row["torch_ms"]), _number(row["ours_ms"]), f"{row['ratio']:.1f}x"]
        for row in document["cases"]
    ]
    peaks = [
        [name, *(_number(value) for value in peak.values())]
        for name, peak in document["peaks"].items()
    ]
    return {
        "state-dicts": table.markdown(("case", "torch, ms", "ours, ms", "ratio"), rows),
        "state-dicts-memory": table.markdown(
            ("broadcast by, into", "peak, MiB", "largest tensor, MiB", "shards, MiB"), peaks
        ),
    }


def _hardening(rows: Sequence[Document]) -> str:
    columns = [name.replace("_", " ") for name in rows[0]]
    return table.markdown(columns, [[_cell(value) for value in row.values()] for row in rows])


def _cell(value: object) -> str:
    if value is None or isinstance(value, bool):
        return WORDS[value]
    if isinstance(value, float):
        return _number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _number(value: float | None) -> str:
    """Three digits that count, as the page has them."""
    if value is None:
        return table.ABSENT
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"
