"""Arguments that the commands share, and how they print JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

Source = Annotated[str, typer.Argument(help="A folder, a file or a URL.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def print_json(document: dict[str, Any]) -> None:
    """Print the document, with whatever JSON lacks as text."""
    print(json.dumps(document, indent=2, default=str))
