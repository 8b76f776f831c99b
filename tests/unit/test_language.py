"""Plain English in the package: docstrings, comments and error texts, and the names of tests.

A list of phrases that read as translated stands for the style: each is easy to find, and a text
without them usually says who does what. The list is a measure, not a ban: see `ALLOWED_PER_1000`.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest_dcp

PACKAGE = Path(pytest_dcp.__file__).parent
TESTS = Path(__file__).parents[1]

ALLOWED_PER_1000 = 0.5
"""Hits per 1,000 words, as in the documentation of pytest or trio."""

ASKING = (
    "about|and|ask|asked|asks|check|checked|checks|choose|chooses|compare|decide|decided|decides|"
    "define|defines|describe|described|describes|determine|determines|exactly|explain|explains|"
    "find out|from|guess|is|just|know|knew|knows|like|list|lists|matter|matters|name|names|not|of|"
    "on|or|print|prints|record|records|report|reports|said|say|saying|says|see|seen|sees|show|"
    "shown|shows|specifies|specify|state|states|tell|than|to|understand|with"
)
"""Words after which "what" begins an indirect question, as in "says what is missing"."""

IDIOMS = {
    # "What a peer sent is held": name the thing ("the peer's messages").
    "what-clause": r"(?<!\bso )(?<!\w)(?<!-)what (?!to\b|if\b|kind\b|happens\b|happened\b)",
    # "whoever reads it", "nobody waits": name the reader, or say "no rank", "the caller".
    "vague person": r"\b(?:whoever|nobody|nowhere|whatever (?!the\b|its\b|it\b))\b",
    # "who comes late" without a noun: "a late peer".
    "bare who": r"(?:^|[.:;,(] ?)who (?!(?:is|was) (?:\w+ )?(?:right|wrong)\b)\w+s\b",
    # "in the place of": "instead of", or "at the position of".
    "in the place of": r"\bin (?:the|its|their) place of\b|\bin place of\b",
    # Programs do not tell, and are not told: they send, report, receive; texts say.
    "is told": r"\b(?:is|are|was|were|be|been|being|gets|get) told\b|\btells\b",
    # "so many bytes": "that many", "n bytes".
    "so many": r"\bso (?:many|much) (?!(?:that|as|faster|slower|more|less)\b)",
    # "those that", "one that": name the things.
    "those that": r"\bthose (?:that|which|who)\b|\bthat which\b|\b(?:and|or|is|as|for) one that\b",
    # "to come back to a tensor", "there it is": say what the program does.
    "there it is": (
        r"\b(?:to|they) come back to\b|\bthere it is\b|"
        r"\b(?:taken|kept|left|passed|sent|given) as (?:it|they) (?:is|are|was|were)\b"
    ),
    # "knows of", "hears of": "has received", "has".
    "knows of": r"\b(?:knows|know|hears|hear|heard) of\b",
    # "heed": "pay attention to", "follow".
    "heed": r"\bheed(?:s|ed|ing)?\b",
    # "is meant here".
    "is meant": r"\b(?:is|are) meant (?!to\b|for\b)",
    # "the like", "of that kind": give the class a name.
    "the like": r"\bthe like\b|\bof (?:that|this|such a) kind\b|\beach of them the\b",
    # "there is no X of": "X has no".
    "there is no": r"\bthere (?:is|are|was|were) no \w+ of\b|\bfor which there (?:is|are)\b",
    # "say 3": "for example 3".
    "say": r",? say,|\bsay \d",
    # "the thing that belongs to it": a genitive.
    "belongs to": r"\bwhat belongs to\b|\bthat belongs? to\b",
    # Names are used or refer; only people stand.
    "stands": r"\bnames? stands?\b|\bstands? (?:twice|there|under|at)\b|\bat hand\b",
}
PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in IDIOMS.items()}
ASKED = re.compile(rf"\b(?:{ASKING}) $", re.IGNORECASE)
NOT_IN_TEST_NAMES = re.compile(
    r"_(?:whoever|whatever|nobody|nowhere|is_told|are_told|told|tells|so_many|those_that|"
    r"that_which|heeds?|knows_of|in_place_of|belongs_to|(?<!_says_)what)(?=_|$)"
)
"""A name may end in `_says_what_to_do`; any other "what" hides the thing that the test is about."""


def find_idioms(text: str) -> Iterator[tuple[str, str]]:
    """Name of each idiom in the text, with some words around it."""
    text = " ".join(text.split())
    for name, pattern in PATTERNS.items():
        for found in pattern.finditer(text):
            if name == "what-clause" and ASKED.search(text[: found.start()]):
                continue
            yield name, text[max(0, found.start() - 30) : found.end() + 40]


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, comment and text with words in a module."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def test_the_package_is_written_in_plain_english() -> None:
    words = 0
    hits: list[str] = []
    by_folder: Counter[str] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        for line, text in prose_of(path.read_text()):
            words += len(text.split())
            for idiom, around in find_idioms(text):
                hits.append(f"{name}:{line}: {idiom}: {around}")
                by_folder[str(name.parent)] += 1
    rate = 1000 * len(hits) / words
    assert rate < ALLOWED_PER_1000, "\n".join(
        [f"{rate:.2f} per 1,000 words of {words}; by folder: {by_folder.most_common()}", *hits]
    )


def test_tests_have_plain_names() -> None:
    found = [
        f"{path.name}:{node.lineno}: {node.name}"
        for path in sorted([*TESTS.rglob("*.py"), *PACKAGE.rglob("test_*.py")])
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if NOT_IN_TEST_NAMES.search(node.name)
    ]
    assert found == []


def test_idioms_are_distinguished_from_plain_english() -> None:
    stilted = "What a peer sent is kept; whoever comes late is told so."
    assert {name for name, _ in find_idioms(stilted)} == {"what-clause", "vague person", "is told"}
    assert not list(find_idioms("The error says what is missing and what to do."))


def test_stilted_names_are_distinguished_from_plain_ones() -> None:
    stilted = ["test_what_is_lost_is_named", "test_reads_what_was_written"]
    plain = ["test_a_lost_file_is_named", "test_a_full_disk_says_what_to_do", "test_somewhat_late"]
    assert [name for name in stilted + plain if NOT_IN_TEST_NAMES.search(name)] == stilted
