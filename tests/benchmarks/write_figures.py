"""Writes the tables of finished runs into the guide.

    python tests/benchmarks/write_figures.py JSON... [--guide PAGE]

Each JSON is what a benchmark wrote at its end; it prints the path. A run's own `--guide PAGE` does
the same at once. See `figures` for the places of a page.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import figures

PAGE = Path(__file__).parents[2] / "pytest_dcp" / "guide" / "performance.md"


def main(argv: Sequence[str] | None = None) -> int:
    """0; raises where a file is no run of a benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="JSON")
    parser.set_defaults(guide=PAGE)
    figures.add_option(parser)
    options = parser.parse_args(argv)
    for run in options.runs:
        replaced = figures.update(options.guide, json.loads(run.read_text()))
        print(f"{options.guide}: {', '.join(replaced)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
