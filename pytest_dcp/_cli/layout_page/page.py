"""The facts of a checkpoint -> one HTML page with its script, style and data in it.

Names and file names come from the checkpoint, so nothing of it may become markup or code:

- The facts are JSON in a data block, in which `<`, `>` and `&` are written as escapes; the script
  sets texts with `textContent` only.
- Text outside that block is escaped.
- The page's own policy allows the one script and the one style by their SHA-256, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict
from html import escape
from importlib.resources import files

from pytest_dcp._cli.layout_page.facts import PageFacts
from pytest_dcp._cli.texts import plain_text, show_bytes

ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}
"""In JSON they occur in strings only."""


def make_page(facts: PageFacts) -> str:
    """The page. Pure but for reading the script and style of this package."""
    script, style = _read_own("page.js"), _read_own("page.css")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(facts.where)} - checkpoint</title><style>{style}</style></head>\n<body>"
        f"<header><h1>{_text(facts.where)}</h1><p>{_text(_describe_sums(facts))}</p>"
        f"{_note_omissions(facts)}{_note_missing_files(facts)}</header>"
        '<main id="page"><noscript>The drawings need JavaScript.</noscript></main>\n'
        f'<script type="application/json" id="facts">{encode_facts(facts)}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def _describe_sums(facts: PageFacts) -> str:
    """The line below the title."""
    return (
        f"{facts.format} checkpoint, {facts.tensor_count:,} tensors of {show_bytes(facts.nbytes)}, "
        f"{facts.value_count:,} values, {len(facts.files):,} data files"
    )


def encode_facts(facts: PageFacts) -> str:
    """JSON in ASCII that cannot end the element that it is in."""
    text = json.dumps(asdict(facts), separators=(",", ":"))
    for character, code in ESCAPES.items():
        text = text.replace(character, code)
    return text


def _note_omissions(facts: PageFacts) -> str:
    texts = []
    if facts.omitted_names:
        texts.append(
            f"This page has the {len(facts.rows):,} largest; {facts.omitted_names:,} more names "
            f"with tensors of {show_bytes(facts.omitted_nbytes)} are left out (--top)."
        )
    if facts.undrawn:
        texts.append(f"The shards of {facts.undrawn:,} tensors are left out.")
    return f'<p class="note">{" ".join(texts)}</p>' if texts else ""


def _note_missing_files(facts: PageFacts) -> str:
    if not facts.missing_files:
        return ""
    names = ", ".join(map(_text, facts.missing_files[:10]))
    more = f" and {len(facts.missing_files) - 10} more" if len(facts.missing_files) > 10 else ""
    return f'<p class="note">Missing data files: {names}{more}</p>'


def _text(text: str) -> str:
    """As text of an element. A lone surrogate, as of a file name that is no UTF-8, is escaped."""
    return escape(plain_text(text).encode("utf-8", "backslashreplace").decode("utf-8"))


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _read_own(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8").replace("\r\n", "\n")
