"""The command `reshard`: a checkpoint cut into the parts that other ranks would save."""

from __future__ import annotations

from dataclasses import asdict
from math import prod
from typing import Annotated

import typer

from pytest_dcp._cli.arguments import (
    Json,
    Source,
    StorageOptions,
    parse_storage_options,
    print_json,
)
from pytest_dcp._cli.exit_codes import report_refusals
from pytest_dcp._cli.progress import show_progress
from pytest_dcp._cli.texts import plain_text, show_bytes
from pytest_dcp._engine.lazy_reading.open_checkpoint import open_checkpoint
from pytest_dcp._engine.resharding.placement_texts import PlacementRules, parse_mesh
from pytest_dcp._engine.resharding.reshard import reshard as reshard_checkpoint


def reshard(
    source: Source,
    target: Annotated[str, typer.Argument(help="The folder to make.")],
    ranks: Annotated[
        int | None, typer.Option(help="How many ranks, each with its share of dimension 0.", min=1)
    ] = None,
    mesh: Annotated[str | None, typer.Option(help="The mesh of the ranks, such as 4x2.")] = None,
    placements: Annotated[
        list[str] | None,
        typer.Option(
            help="One for each side of the mesh, such as S0,R; or NAME=S0,R for the tensors that a "
            "name or pattern matches."
        ),
    ] = None,
    storage_option: StorageOptions = None,
    as_json: Json = False,
) -> None:
    """Cut a checkpoint into the parts that other ranks would save, in a folder of DCP."""
    with report_refusals():
        sides, rules = _read_layout(ranks, mesh, placements or [])
        options = parse_storage_options(storage_option)
        with (
            open_checkpoint(source, storage_options=options) as checkpoint,
            show_progress("ranks", prod(sides), quiet=as_json) as report,
        ):
            found = reshard_checkpoint(checkpoint, target, sides, rules, report)
        if as_json:
            print_json(asdict(found) | {"target": target})
        else:
            print(
                f"{plain_text(target)}: {found.tensors} tensors in {found.chunks} parts, "
                f"{found.values} values, {show_bytes(found.nbytes)}, of {prod(sides)} ranks"
            )


def _read_layout(
    ranks: int | None, mesh: str | None, placements: list[str]
) -> tuple[tuple[int, ...], PlacementRules]:
    if (ranks is None) == (mesh is None):
        raise ValueError("reshard takes --ranks N, or --mesh with --placements")
    if mesh is not None:
        if not placements:
            raise ValueError("--mesh needs --placements, such as S0,R: one for each side")
        sides = parse_mesh(mesh)
        return sides, PlacementRules.parse(placements, len(sides))
    texts = placements if any("=" not in text for text in placements) else ["S0", *placements]
    return (ranks or 1,), PlacementRules.parse(texts, 1)
