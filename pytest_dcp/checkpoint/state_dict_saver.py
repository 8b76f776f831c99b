"""Saving: the public names of `torch.distributed.checkpoint.state_dict_saver`."""

from pytest_dcp.checkpoint.async_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save
from pytest_dcp.checkpoint.saving import save, save_state_dict

__all__ = ["save_state_dict", "save", "async_save", "AsyncCheckpointerType", "AsyncSaveResponse"]
