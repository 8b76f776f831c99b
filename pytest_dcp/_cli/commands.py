"""The commands: `ls`, `show`, `verify`, `diff`, `convert`; the others are beside them.

Each opens its checkpoints, calls the engine, and prints the result.

With `--json` the output is one JSON document. `exit_codes` says how a command ends. Names of
checkpoints are printed without control characters, and no code of a checkpoint runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import Enum
from typing import Annotated, Any

import typer
from rich.console import Console

from pytest_dcp._cli.arguments import (
    Json,
    Source,
    StorageOptions,
    options_for,
    parse_storage_options,
    print_json,
)
from pytest_dcp._cli.bisect_command import bisect
from pytest_dcp._cli.common_texts import describe_common, list_common_keys, print_common
from pytest_dcp._cli.convert_command import convert
from pytest_dcp._cli.exit_codes import FOUND, report_refusals
from pytest_dcp._cli.layout_page.command import write_page
from pytest_dcp._cli.layout_page.facts import MOST_NAMES
from pytest_dcp._cli.progress import show_progress
from pytest_dcp._cli.reshard_command import reshard
from pytest_dcp._cli.run_commands import clean_run, list_steps, print_latest, prune_run
from pytest_dcp._cli.terminal import can_print
from pytest_dcp._cli.texts import (
    BARS,
    PLAIN_BARS,
    draw_histogram,
    draw_layout,
    draw_table,
    plain_text,
    show_bytes,
)
from pytest_dcp._cli.wrapper_texts import describe_wrapper, print_wrapper
from pytest_dcp._engine.io.checked_ranges import Verify
from pytest_dcp._engine.lazy_reading.comparison import compare_checkpoints
from pytest_dcp._engine.lazy_reading.lazy_values import Lazy, LazyTensor
from pytest_dcp._engine.lazy_reading.megatron_common import COMMON
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint, open_checkpoint
from pytest_dcp._engine.lazy_reading.tensor_statistics import measure_tensor
from pytest_dcp._engine.lazy_reading.verification import verify_checkpoint

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Look into checkpoints, check, compare and convert them. `pytest-dcp run SCRIPT` runs a "
    "program that uses torch.distributed.checkpoint on pytest_dcp's engine.",
    epilog="Exit codes: 0 fine; 1 differences or problems were found, or bisect or latest "
    "found no step; 2 refused, one line on stderr says why; 130 interrupted.",
)
SHOWN = 20
"""Differences in a terminal."""


class ListOrder(str, Enum):
    """How `ls` sorts."""

    stored = "stored"
    name = "name"
    size = "size"


@app.command("ls")
def list_names(
    source: Source,
    pattern: Annotated[str, typer.Option("--glob", help="Only names that it matches.")] = "*",
    sort: Annotated[ListOrder, typer.Option(help="The order of the names.")] = ListOrder.stored,
    top: Annotated[int, typer.Option(help="Only the first of them; 0: all.", min=0)] = 0,
    tree: Annotated[bool, typer.Option("--tree", help="Names as a tree, with sums.")] = False,
    storage_option: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """List names, dtypes, shapes, shards and bytes."""
    with report_refusals(), _open(source, storage_option) as checkpoint:
        found = [checkpoint[name] for name in checkpoint.glob(pattern)]
        if sort is ListOrder.name:
            found.sort(key=lambda lazy: lazy.name)
        if sort is ListOrder.size:
            found.sort(key=lambda lazy: -lazy.nbytes)
        found = found[: top or None]
        if as_json:
            facts = _describe_checkpoint(checkpoint) | list_common_keys(checkpoint)
            print_json(facts | {"names": list(map(_describe, found))})
        elif tree:
            for line in _tree_lines(found):
                print(line)
        else:
            rows = [(*lazy.table_row()[:4], show_bytes(lazy.nbytes)) for lazy in found]
            console = Console(soft_wrap=not sys.stdout.isatty())
            console.print(draw_table(("name", "dtype", "shape", "shards", "bytes"), rows, 2))
            if text := describe_common(checkpoint):
                print(text)


@app.command("show")
def show_name(
    source: Source,
    name: Annotated[
        str | None,
        typer.Argument(help="The flat name of a tensor or value; for --html also a pattern."),
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", help="Write the layout to this file, as a page.")
    ] = None,
    top: Annotated[int, typer.Option(help="Names in the page: the largest.", min=1)] = MOST_NAMES,
    storage_option: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Show a tensor's layout and statistics, or a value; or make a page of the whole layout."""
    with report_refusals():
        if html is None and name is None:
            raise ValueError("show takes a name, which `ls` lists, or --html FILE")
        with _open(source, storage_option) as checkpoint:
            if name == COMMON and name not in checkpoint and checkpoint.common:
                print_common(checkpoint, as_json=as_json)
            elif html is not None:
                write_page(checkpoint, name or "*", html, top, as_json=as_json)
            else:
                _show_name(checkpoint[name or ""], as_json=as_json)


def _show_name(lazy: Lazy, *, as_json: bool) -> None:
    name = plain_text(lazy.name)
    if wrappers := lazy.wrappers:
        if as_json:
            print_json(_describe(lazy) | {"wrappers": list(map(describe_wrapper, wrappers))})
            return
        print(f"{name}: stored as {len(wrappers)} wrapper(s) of other tensors")
        for wrapper in wrappers:
            print_wrapper(wrapper)
        return
    if not isinstance(lazy, LazyTensor):
        value = lazy.value()
        if as_json:
            print_json(_describe(lazy) | {"value": repr(value)})
        else:
            print(f"{name}: {plain_text(repr(value))}")
        return
    statistics = asdict(measure_tensor(lazy))
    if as_json:
        shards = [asdict(shard) for shard in lazy.shards]
        print_json(_describe(lazy) | {"layout": shards, "statistics": statistics})
        return
    console = Console()
    print(f"{name}: {lazy.dtype} of {tuple(lazy.shape)}, {show_bytes(lazy.nbytes)}")
    console.print(draw_layout(lazy.shape, lazy.shards))
    histogram = statistics.pop("histogram")
    rows = [(key, _show_number(value)) for key, value in statistics.items()]
    console.print(draw_table(("statistic", "value"), rows, 1))
    if histogram:
        bars = BARS if can_print(BARS) else PLAIN_BARS
        print(f"histogram  |{draw_histogram(histogram, bars)}|")


def _open(
    source: str,
    options: Sequence[str] | None,
    *beside: str,
    verify: Verify = "auto",
) -> OpenCheckpoint:
    """The checkpoint, with the options of the command line; `beside` are its other sources."""
    storage_options = options_for(source, parse_storage_options(options), *beside)
    return open_checkpoint(source, verify=verify, storage_options=storage_options)


@app.command()
def verify(source: Source, storage_option: StorageOptions = None, as_json: Json = False) -> None:
    """Read and check every byte; the exit code is 1 if there are problems."""
    with report_refusals(), _open(source, storage_option, verify="full") as checkpoint:
        with show_progress("checking", len(checkpoint), quiet=as_json) as report:
            found = verify_checkpoint(checkpoint, report)
        if as_json:
            print_json(_describe_checkpoint(checkpoint) | asdict(found))
        else:
            for problem in found.problems:
                where = "" if problem.name is None else f"{plain_text(problem.name)}: "
                print(f"{where}{plain_text(problem.text)}")
            for stray in found.strays:
                print(f"{plain_text(stray)}: a file that the checkpoint does not name")
            state = f"{len(found.problems)} problems" if found.problems else "whole"
            unchecked = f", {found.unchecked} without checksums" if found.unchecked else ""
            print(f"{found.names} names{unchecked}, {show_bytes(found.bytes_read)} read: {state}")
    if found.problems:
        raise typer.Exit(FOUND)


@app.command()
def diff(
    first: Source,
    second: Source,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Read no data: compare by checksums alone.")
    ] = False,
    storage_option: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Compare names, shapes, dtypes and elements; the exit code is 1 if they differ."""
    with (
        report_refusals(),
        _open(first, storage_option, second) as one,
        _open(second, storage_option, first) as other,
    ):
        with show_progress("comparing", len(one), quiet=as_json) as report:
            found = compare_checkpoints(one, other, read=not checksums, report=report)
        if as_json:
            print_json(asdict(found) | {"bytes_read": one.bytes_read + other.bytes_read})
        else:
            _print_lines("only in the first", found.only_in_first)
            _print_lines("only in the second", found.only_in_second)
            _print_lines("unknown without reading", found.unread)
            for one_of in found.differing:
                largest = "" if one_of.largest is None else f", by at most {one_of.largest:g}"
                print(f"{plain_text(one_of.name)}: {plain_text(one_of.reason)}{largest}")
            equal = found.equal_by_checksums + found.equal_by_reading
            print(f"{equal} names equal, {len(found.differing)} differ")
    if found or found.unread:
        raise typer.Exit(FOUND)


app.command("convert")(convert)
app.command("reshard")(reshard)
app.command("bisect")(bisect)
app.command("latest")(print_latest)
app.command("steps")(list_steps)
app.command("prune")(prune_run)
app.command("gc")(clean_run)


def _describe_checkpoint(checkpoint: OpenCheckpoint) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint.where,
        "format": checkpoint.format,
        "files": list(checkpoint.files),
        "missing_files": list(checkpoint.missing_files),
    }


def _describe(lazy: Lazy) -> dict[str, Any]:
    if not isinstance(lazy, LazyTensor):
        return {"name": lazy.name, "kind": "value", "nbytes": lazy.nbytes}
    return {
        "name": lazy.name,
        "kind": "tensor",
        "dtype": str(lazy.dtype).removeprefix("torch."),
        "shape": list(lazy.shape),
        "shards": lazy.shard_count,
        "nbytes": lazy.nbytes,
    }


def _tree_lines(found: list[Lazy]) -> Iterator[str]:
    """Each part of the names once, with the bytes and the number of names below it."""
    sums: dict[tuple[str, ...], list[int]] = {}
    for lazy in found:
        keys = tuple(lazy.name.split("."))
        for depth in range(1, len(keys) + 1):
            total = sums.setdefault(keys[:depth], [0, 0])
            total[0] += lazy.nbytes
            total[1] += 1
    for path, (nbytes, count) in sums.items():
        names = "" if count == 1 else f", {count} names"
        indent = "  " * (len(path) - 1)
        yield f"{indent}{plain_text(path[-1])}  ({show_bytes(nbytes)}{names})"


def _print_lines(title: str, names: tuple[str, ...]) -> None:
    for name in names[:SHOWN]:
        print(f"{title}: {plain_text(name)}")
    if len(names) > SHOWN:
        print(f"{title}: {len(names) - SHOWN} more")


def _show_number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"
