"""Measures the engine under hard conditions: hostile bytes, attacks, many peers, busy folders.

    python tests/benchmarks/bench_hardening.py [--only SECTION]... [--quick] [--out DIR]
        [--markdown] [--list] [--guide PAGE]

Each section is a module `hardening_SECTION` beside this file, with one public function, `measure`
or `measure_SECTION`. It returns rows, which are dataclasses: their fields are the columns of the
section's table, and a field `met` says whether the row keeps its promise. A promise that is
not kept is reported and is no failure. `--quick` shows that everything runs: its figures mean
little.

Needs the extras `test` and `bench`, and Linux.
"""

import argparse
import fnmatch
import importlib
import inspect
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_worlds
import figures
import table
from rich.console import Console

FILE_NAME = "bench_hardening.json"
WIDE_COLUMNS = 170
BENCHMARKS = Path(__file__).resolve().parent
SECTIONS = {
    "bombs": "hostile files: what opening them takes",
    "overwrites": "readers beside a writer that replaces the checkpoint again and again",
    "floods": "attacks on a save of 4 ranks",
    "peers": "one coordinator and its peers",
}
"""The sections in the order of the report; one whose module is not there is left out."""
WORDS = {True: "yes", False: "NO", None: table.ABSENT}

Answer = list[dict[str, Any]]


def present() -> dict[str, str]:
    """The sections whose modules are there, with their titles."""
    return {
        name: title
        for name, title in SECTIONS.items()
        if (BENCHMARKS / f"hardening_{name}.py").exists()
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", metavar="SECTION", help="a pattern; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, help=f"folder for {FILE_NAME}; default: a new one")
    parser.add_argument("--markdown", action="store_true", help="print GitHub markdown as well")
    parser.add_argument("--list", action="store_true", help="print the names of the sections")
    figures.add_option(parser)
    options = parser.parse_args(argv)
    patterns = options.only or ["*"]
    options.sections = [
        name for name in present() if any(fnmatch.fnmatch(name, one) for one in patterns)
    ]
    if not options.sections:
        parser.error(f"no section is called {options.only!r}; --list prints their names")
    return options


def measure(section: str, *, quick: bool) -> Answer:
    """The rows of a section."""
    module: Any = importlib.import_module(f"hardening_{section}")
    function: Callable[..., Sequence[Any]] = getattr(
        module, "measure", getattr(module, f"measure_{section}", None)
    )
    options = {"quick": quick} if "quick" in inspect.signature(function).parameters else {}
    return [asdict(row) for row in function(**options)]


def columns_of(rows: Answer) -> list[str]:
    """The titles of a table's columns. Pure (no I/O)."""
    return [name.replace("_", " ") for name in rows[0]]


def texts_of(rows: Answer) -> list[list[str]]:
    """The cells of a table. Pure (no I/O)."""
    return [[_text(value) for value in row.values()] for row in rows]


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return WORDS[value]
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when a section failed to run: the others are reported all the same."""
    options = parse(argv)
    if options.list:
        print("\n".join(f"{name}  ({title})" for name, title in present().items()))
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=WIDE_COLUMNS)
    warnings.simplefilter("ignore")  # overwriting, and saves of one rank, are intended here
    where, answers, failed = bench_worlds.environment(), {}, []
    for name in options.sections:
        try:
            rows = answers[name] = measure(name, quick=options.quick)
        except Exception:  # noqa: BLE001 # of any section; the others still run
            failed.append(name)
            traceback.print_exc()
            continue
        table.show(console, SECTIONS[name], columns_of(rows), texts_of(rows))
        if options.markdown:
            print(f"\n{table.markdown(columns_of(rows), texts_of(rows))}")
    folder = options.out or Path(tempfile.mkdtemp(prefix="bench-hardening-"))
    folder.mkdir(parents=True, exist_ok=True)
    document = {"environment": where, "quick": options.quick, "sections": answers}
    (folder / FILE_NAME).write_text(json.dumps(document, indent=1) + os.linesep)
    print(f"\nfigures: {folder / FILE_NAME}")
    if options.guide and answers:
        figures.update(options.guide, document)
    if failed:
        print(f"FAILED to run: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
