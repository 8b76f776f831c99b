"""Folders of shards made whole: `torch.distributed.checkpoint._consolidate_hf_safetensors`."""

from typing import TYPE_CHECKING

from pytest_dcp._engine.huggingface.consolidated_folder import (
    consolidate_safetensors_files,
    consolidate_safetensors_files_on_every_rank,
)
from pytest_dcp._engine.torch_names import names_of_torch

__all__ = ["consolidate_safetensors_files", "consolidate_safetensors_files_on_every_rank"]

if not TYPE_CHECKING:  # For names looked up at run time; type checkers see the definitions above.
    __getattr__ = names_of_torch(__name__)
