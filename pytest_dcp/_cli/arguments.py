"""Arguments that the commands share, how they open checkpoints, and how they print JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer

from pytest_dcp._engine.storages.storage_options import is_url

Source = Annotated[str, typer.Argument(help="A folder, a file or a URL.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--storage-option",
        metavar="KEY=VALUE",
        help="For the file system of a URL, such as endpoint_url=http://localhost:9000; may be "
        "repeated. A value is JSON (true, 30, {...}) or else text.",
        show_default=False,
    ),
]


def parse_storage_options(texts: Sequence[str] | None) -> dict[str, Any]:
    """The options of texts such as "anon=true". Raises ValueError for a text of another form.

    A value is read as JSON; one that is not JSON is a text, and so are NaN and Infinity.

    >>> parse_storage_options(["anon=true", "key=AKIA", "token=\\"12\\"", "client_kwargs={}"])
    {'anon': True, 'key': 'AKIA', 'token': '12', 'client_kwargs': {}}
    """
    options: dict[str, Any] = {}
    for text in texts or ():
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ValueError(f"--storage-option takes KEY=VALUE, got {key!r}")
        if key in options:
            raise ValueError(f"--storage-option {key} is given twice")
        options[key] = _parse_value(value)
    return options


def options_for(path: str, options: Mapping[str, Any], *beside: str) -> dict[str, Any]:
    """The options for one of a command's sources: those of URLs. Of local paths alone they are
    refused when the path is opened.
    """
    mixed = not is_url(path) and any(map(is_url, beside))
    return {} if mixed else dict(options)


def print_json(document: dict[str, Any]) -> None:
    """Print the document; values that JSON lacks become texts."""
    print(json.dumps(document, indent=2, default=str))


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
