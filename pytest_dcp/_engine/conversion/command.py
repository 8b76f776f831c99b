"""The command `python -m pytest_dcp.checkpoint.format_utils`: one file <-> a checkpoint folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pytest_dcp._engine.conversion.torch_save_files import dcp_to_torch_save, torch_save_to_dcp
from pytest_dcp.errors import CheckpointError

DIRECTIONS = {"torch_to_dcp": torch_save_to_dcp, "dcp_to_torch": dcp_to_torch_save}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert as the arguments say; return 0, or 1 after one line on stderr if it failed."""
    parser = argparse.ArgumentParser(
        prog="python -m pytest_dcp.checkpoint.format_utils",
        description="Convert between the file of torch.save and a checkpoint folder.",
    )
    parser.add_argument("mode", choices=list(DIRECTIONS), help="the direction")
    parser.add_argument("src", help="the file, or the folder, to read")
    parser.add_argument("dst", help="the folder, or the file, to write")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load values of any class, which can run code: only if you trust the writer",
    )
    options = parser.parse_args(argv)
    try:
        DIRECTIONS[options.mode](options.src, options.dst, weights_only=not options.trust)
    except (CheckpointError, OSError, TypeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0
