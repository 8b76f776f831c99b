"""torch's own types, under the same names: transforms of the bytes of a stream."""

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

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
