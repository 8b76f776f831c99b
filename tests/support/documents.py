"""The code blocks of a Markdown page, as files that can be run and outputs that can be compared.

Enters: the text of a page. Leaves: a `Block` for each fenced block, used by its language:

- `python`: a test file, or a script where it defines no test;
- `text`: output of pytest for the code right before it;
- `sh`: commands;
- `tree`: paths of the repository, one at the start of each line;
- `diagram`: a drawing, which nothing runs.

Python that the reader need not see is in a comment:

    <!--- invisible-code-block: python
    folder = "checkpoint"
    -->

It is prepended to the next `python` block; before a `text` block it is the code whose output the
page shows. Pure (no I/O).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from sybil import Document
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

LANGUAGES = ("python", "text", "sh", "tree", "diagram")
INVISIBLE = "invisible-code-block"
ELISION = "..."
"""A line of an output that stands for any number of lines."""
_LEXERS = (
    RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\n]*)$\n", re.MULTILINE)),
    DirectiveInHTMLCommentLexer(INVISIBLE, "python", {"directive": "language", "source": "source"}),
)
_TEST = re.compile(r"^\s*(def test_|class Test|Test\w+ = )", re.MULTILINE)
_VARYING = (
    (re.compile(r"\b(kill|posix|ext4-ordered|nfs|s3)-[0-9a-f]{10}\b"), "<state>"),
    (re.compile(r"\d+(\.\d+)? ?m?s\b"), "<time>"),
    (re.compile(r"\d{6,}"), "<number>"),
    (re.compile(r"reproduce_failure\(.*?\)"), "<blob>"),
    (re.compile(r"(=|-|_){4,}"), "<rule>"),
)
"""Text that differs between runs or versions: ids of crash states, times, seeds, and rulers as long
as the terminal is wide."""


@dataclass(frozen=True, slots=True)
class Block:
    """One code block of a page."""

    page: str
    """The name of its page."""
    line: int
    """Where it begins in the page, counted from 1."""
    language: str
    source: str
    """With the invisible code in front of it."""
    output: str | None = None
    """Of a `python` block: pytest's output for it, as the page shows it."""

    @property
    def name(self) -> str:
        return f"{self.page}_line_{self.line}"

    @property
    def defines_tests(self) -> bool:
        """Whether it is a test file; otherwise it is a script."""
        return _TEST.search(self.source) is not None


def parse_blocks(page: str, name: str) -> list[Block]:
    """The blocks of the page of this name, in their order.

    Raises:
        ValueError: a language that is not one of `LANGUAGES`, an output without code before it, or
            invisible code that nothing uses.
    """
    blocks: list[Block] = []
    invisible: list[Block] = []
    for block in _read_regions(page, name):
        if block.language == INVISIBLE:
            invisible.append(block)
            continue
        if block.language not in LANGUAGES:
            raise ValueError(f"line {block.line}: {block.language!r} is not one of {LANGUAGES}")
        in_front = "".join(one.source for one in invisible)
        if block.language == "text":
            blocks.append(_join_output(block, in_front, blocks))
        else:
            blocks.append(Block(name, block.line, block.language, in_front + block.source))
        invisible = []
    if invisible:
        raise ValueError(f"line {invisible[0].line}: no block uses this invisible code")
    return blocks


def find_missing_lines(output: str, printed: str) -> list[str]:
    """The lines of `output` that `printed` lacks; empty where it has them all.

    The lines stand together and in this order, except where a line `...` allows others between.
    Times, long numbers and rulers may differ.
    """
    actual = [_normalise(line) for line in printed.splitlines()]
    start = 0
    for group in _split_at_elisions(output):
        expected = [_normalise(line) for line in group]
        places = range(start, len(actual) - len(expected) + 1)
        found = next((at for at in places if actual[at : at + len(expected)] == expected), None)
        if found is None:
            return [line for line in group if _normalise(line) not in actual[start:]] or group
        start = found + len(expected)
    return []


def _read_regions(page: str, name: str) -> Iterator[Block]:
    document = Document(page, "")
    for lexer in _LEXERS:
        for region in lexer(document):
            document.add(region)
    for _, region in document.regions:
        line = page.count("\n", 0, region.start) + 1
        yield Block(name, line, region.lexemes["language"], str(region.lexemes["source"]))


def _join_output(text: Block, in_front: str, blocks: list[Block]) -> Block:
    """The code with its output: invisible code, or the last of `blocks`, which is removed."""
    if in_front:
        return Block(text.page, text.line, "python", in_front, text.source)
    if not blocks or blocks[-1].language != "python" or blocks[-1].output is not None:
        raise ValueError(f"line {text.line}: there is no code before this output")
    code = blocks.pop()
    return Block(code.page, code.line, "python", code.source, text.source)


def _split_at_elisions(output: str) -> Iterator[list[str]]:
    group: list[str] = []
    for line in [*output.splitlines(), ELISION]:
        if line.strip() != ELISION:
            group.append(line)
        elif group:
            yield group
            group = []


def _normalise(line: str) -> str:
    for pattern, stand_in in _VARYING:
        line = pattern.sub(stand_in, line)
    return line.rstrip()
