"""Checkpoints to other formats: folders of this engine, safetensors, files of `torch.save`."""

from pytest_dcp._engine.conversion.converted_contents import ConversionReport
from pytest_dcp._engine.conversion.to_dcp import to_dcp
from pytest_dcp._engine.conversion.to_safetensors import to_safetensors
from pytest_dcp._engine.conversion.to_torch_save import to_torch_save

__all__ = ["to_safetensors", "to_dcp", "to_torch_save", "ConversionReport"]
