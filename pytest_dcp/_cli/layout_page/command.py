"""The command `show --html`: writes the page of an open checkpoint whole or not at all."""

from __future__ import annotations

from pytest_dcp._cli.arguments import print_json
from pytest_dcp._cli.layout_page.facts import collect_facts
from pytest_dcp._cli.layout_page.page import make_page
from pytest_dcp._cli.texts import plain_text, show_bytes
from pytest_dcp._engine.conversion.target_paths import local_target, target_file
from pytest_dcp._engine.conversion.whole_file import write_whole_file
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint


def write_page(
    checkpoint: OpenCheckpoint, pattern: str, html: str, top: int, *, as_json: bool
) -> None:
    """Write the page of the names that the pattern matches, with the `top` largest in detail.

    Raises UnknownNameError if no name matches, and OSError if the file cannot be written; an
    earlier file of this name then stays.
    """
    folder, file_name = target_file(local_target(html))
    names = [pattern] if pattern in checkpoint else checkpoint.glob(pattern)
    if not names:
        checkpoint[pattern]  # raises, with the nearest names
    facts = collect_facts(checkpoint, names, top)
    content = make_page(facts).encode()
    with write_whole_file(folder, file_name) as out:
        out.write([content])
    if as_json:
        print_json(
            {
                "page": html,
                "nbytes": len(content),
                "names": len(facts.rows),
                "omitted_names": facts.omitted_names,
                "tensors_without_shards": facts.undrawn,
            }
        )
        return
    left_out = f", {facts.omitted_names:,} left out" if facts.omitted_names else ""
    print(f"{plain_text(html)}: {len(facts.rows):,} names{left_out}, {show_bytes(len(content))}")
