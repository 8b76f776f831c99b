"""torch's own types, under the same names: what changes the bytes of a stream on their way."""

from typing import TYPE_CHECKING

from torch.distributed.checkpoint._extension import (
    Extension,
    ExtensionRegistry,
    StreamTransformExtension,
    ZStandard,
)

from pytest_dcp._engine.torch_names import names_of_torch

__all__ = [
    "Extension",
    "ExtensionRegistry",
    "StreamTransformExtension",
    "ZStandard",
]

if not TYPE_CHECKING:  # For what is asked by name; type checkers see what is defined above.
    __getattr__ = names_of_torch(__name__)
