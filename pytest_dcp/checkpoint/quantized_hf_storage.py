"""Quantised folders: the names of `torch.distributed.checkpoint.quantized_hf_storage`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.huggingface.quantized import QuantizedHuggingFaceStorageReader
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = ["QuantizedHuggingFaceStorageReader"]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
