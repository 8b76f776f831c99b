"""The options that most benchmarks share, and where their reports go.

A report is a JSON file in `--out`, or in a new folder, and with `--guide` tables in a page.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import figures


def make_parser(description: str | None, file_name: str) -> argparse.ArgumentParser:
    """A parser with `--folder`, `--out` and `--guide`. file_name: of the JSON."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a new one")
    parser.add_argument("--out", type=Path, help=f"folder for {file_name}; default: a new one")
    figures.add_option(parser)
    return parser


def save(report: dict[str, Any], options: argparse.Namespace, file_name: str) -> None:
    """Write the JSON, print its path, and fill the page's tables if they are asked for."""
    folder = options.out or Path(tempfile.mkdtemp(prefix=f"{Path(file_name).stem}-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file_name).write_text(json.dumps(report, indent=2))
    print(folder / file_name)
    if options.guide:
        figures.update(options.guide, report)
