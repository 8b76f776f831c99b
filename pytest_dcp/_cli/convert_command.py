"""The command `convert`: a checkpoint in another format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pytest_dcp._cli.arguments import (
    Json,
    Source,
    StorageOptions,
    options_for,
    parse_storage_options,
    print_json,
)
from pytest_dcp._cli.exit_codes import report_refusals
from pytest_dcp._cli.progress import show_progress
from pytest_dcp._cli.texts import plain_text, show_bytes
from pytest_dcp._engine.conversion.changes import Changes
from pytest_dcp._engine.conversion.converted_contents import ConversionReport
from pytest_dcp._engine.conversion.to_dcp import to_dcp
from pytest_dcp._engine.conversion.to_safetensors import to_safetensors
from pytest_dcp._engine.conversion.to_torch_save import to_torch_save
from pytest_dcp._engine.lazy_reading.lazy_values import LazyTensor
from pytest_dcp._engine.lazy_reading.open_checkpoint import OpenCheckpoint, open_checkpoint


class TargetFormat(str, Enum):
    """The formats that `convert` makes."""

    dcp = "dcp"
    safetensors = "safetensors"
    torch = "torch"


def convert(
    source: Source,
    target: Annotated[str, typer.Argument(help="The file or folder to make, or its URL.")],
    to: Annotated[
        TargetFormat | None, typer.Option(help="The format, if the target's name does not show it.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="A name or pattern to take.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A name or pattern to omit.")] = None,
    rename: Annotated[
        list[str] | None, typer.Option(help="OLD=NEW, a name or a prefix that ends in a dot.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of all tensors of floating point.")] = None,
    skip_values: Annotated[
        bool, typer.Option("--skip-values", help="Leave Python values out of safetensors.")
    ] = False,
    max_file_bytes: Annotated[
        int | None, typer.Option(help="Of tensors in each file of a safetensors folder.", min=1)
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            help="That write at the same time; by default several if the work is large.", min=1
        ),
    ] = None,
    storage_option: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Convert to a folder of DCP, to safetensors (a file, or a folder), or to torch.save's file."""
    with report_refusals():
        changes = Changes(
            include or None,
            exclude or None,
            dict(map(_split_rename, rename)) if rename else None,
            _find_dtype(dtype),
        )
        kind = to or _kind_of(target)
        function = _choose_function(kind, skip_values, max_file_bytes, processes)
        options = parse_storage_options(storage_option)
        with (
            open_checkpoint(
                source, storage_options=options_for(source, options, target)
            ) as checkpoint,
            show_progress(
                "converting", _count_tensors(checkpoint, changes), quiet=as_json
            ) as report,
        ):
            found = function(
                checkpoint,
                target,
                include=changes.include,
                exclude=changes.exclude,
                rename=changes.rename,
                dtype=changes.dtype,
                storage_options=options_for(target, options, source),
                report=report,
            )
        _print_report(found, target, kind, as_json=as_json)


def _choose_function(
    kind: TargetFormat, skip_values: bool, max_file_bytes: int | None, processes: int | None
) -> Callable[..., ConversionReport]:
    """The conversion, with the options of this format. Raises ValueError for those of others."""
    if kind is TargetFormat.torch:
        _refuse_options(kind, max_file_bytes=max_file_bytes, processes=processes)
        return to_torch_save
    if kind is TargetFormat.dcp:
        _refuse_options(kind, max_file_bytes=max_file_bytes)
        return partial(to_dcp, processes=processes)
    options: dict[str, Any] = {"skip_values": skip_values, "processes": processes}
    if max_file_bytes is not None:
        options["max_file_bytes"] = max_file_bytes
    return partial(to_safetensors, **options)


def _refuse_options(kind: TargetFormat, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} is not for --to {kind.value}")


def _count_tensors(checkpoint: OpenCheckpoint, changes: Changes) -> int:
    chosen = changes.choose(tuple(checkpoint), checkpoint.where)
    return sum(isinstance(checkpoint[name], LazyTensor) for name in chosen)


def _print_report(
    report: ConversionReport, target: str, kind: TargetFormat, *, as_json: bool
) -> None:
    if as_json:
        print_json(asdict(report) | {"target": target, "format": kind.value})
        return
    left_out = f", {len(report.left_out)} values left out" if report.left_out else ""
    print(
        f"{plain_text(target)}: {report.tensors} tensors, {report.values} values, "
        f"{show_bytes(report.nbytes)}{left_out}"
    )


def _kind_of(target: str) -> TargetFormat:
    """The format that the name of a target asks for. Raises ValueError if it shows none."""
    suffix = Path(target).suffix
    if suffix == ".safetensors":
        return TargetFormat.safetensors
    if suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return TargetFormat.torch
    raise ValueError(
        f"{target!r} does not show a format: name it with --to dcp, safetensors or torch"
    )


def _split_rename(text: str) -> tuple[str, str]:
    old, sign, new = text.partition("=")
    if not sign or not old:
        raise ValueError(f"--rename takes OLD=NEW, got {text!r}")
    return old, new


def _find_dtype(name: str | None) -> Any:
    import torch

    if name is None:
        return None
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"--dtype takes the name of a dtype of torch, got {name!r}")
    return found
