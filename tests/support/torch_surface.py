"""The names of the installed torch's `distributed.checkpoint` that other code may import."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

TORCH = "torch.distributed.checkpoint"
OURS = "pytest_dcp.checkpoint"

PRIVATE = {
    "_api_bc_check": "utils",
    "_create_file_view": "utils",
    "_DistWrapper": "utils",
    "_get_failure_dict": "utils",
    "_create_write_item_for_tensor": "planner_helpers",
    "_create_read_item_for_tensor": "planner_helpers",
    "_create_read_items": "planner_helpers",
    "_create_write_items": "planner_helpers",
    "_create_chunk_from_tensor": "planner_helpers",
    "_create_default_metadata_only_plan": "planner_helpers",
    "_compare_save_plans": "planner_helpers",
    "_merge_delta_local_plans": "planner_helpers",
    "_init_state_dict": "planner_helpers",
    "_create_default_local_metadata": "default_planner",
    "_validate_global_plan": "default_planner",
    "_EmptyStateDictLoadPlanner": "default_planner",
    "_StorageInfo": "filesystem",
    "_StoragePrefix": "filesystem",
    "_StorageWriterTransforms": "filesystem",
    "_write_item": "filesystem",
    "_split_by_size_and_type": "filesystem",
    "_item_size": "filesystem",
    "DEFAULT_SUFFIX": "filesystem",
    "_wrap_exception": "api",
    "WRAPPED_EXCEPTION": "api",
    "STATE_DICT_TYPE": "metadata",
    "_MEM_FORMAT_ENCODING": "metadata",
    "_save_state_dict": "state_dict_saver",
    "_stateful_to_state_dict": "state_dict_saver",
    "_load_state_dict": "state_dict_loader",
    "_load_state_dict_from_keys": "state_dict_loader",
    "_PG": "state_dict",
    "_STATE": "state_dict",
    "_init_optim_state": "state_dict",
    "_dcp_method_logger": "logger",
    "DCP_LOGGER_NAME": "logging_handlers",
    "_ReplicationStager": "staging",
    "_metadata_fn": "_hf_utils",
    "_gen_file_name": "_hf_utils",
    "_storage_setup": "_storage_utils",
    "_version": "_version",
    "_AsyncCheckpointExecutor": "_async_executor",
    "_ThreadBasedAsyncCheckpointExecutor": "_async_thread_executor",
    "_ProcessBasedAsyncCheckpointExecutor": "_async_process_executor",
    "_AsyncCheckpointProcess": "_async_process_executor",
    "_CheckpointRequestIdentifier": "_async_process_executor",
    "_CheckpointSaveProcessControlOpts": "_async_process_executor",
    "_ProcessGroupInitInfo": "_async_process_executor",
    "_Checkpointer": "_checkpointer",
}
"""Private names that libraries import, and where. Public names of private modules are compared
anyway."""


def modules_of_torch() -> list[str]:
    """All modules of torch's package, without its name."""
    found = pkgutil.walk_packages(importlib.import_module(TORCH).__path__, f"{TORCH}.")
    return [module.name.removeprefix(f"{TORCH}.") for module in found]


def surface(theirs: ModuleType) -> list[str]:
    """The names of one of torch's modules that other code may import."""
    public = {
        name
        for name, value in vars(theirs).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == theirs.__name__
    }
    private = {name for name, home in PRIVATE.items() if theirs.__name__ == f"{TORCH}.{home}"}
    here = {name for name in private if hasattr(theirs, name)}
    return sorted({*getattr(theirs, "__all__", ()), *public, *here})
