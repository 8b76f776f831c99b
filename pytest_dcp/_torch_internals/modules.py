"""Hooks and children of modules and optimizers that have no public access."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # The result of `load_state_dict`, which `set_model_state_dict` must return too. Can go when
    # torch gives it a public name.
    from torch.nn.modules.module import _IncompatibleKeys

TORCH.require_attributes(
    nn.Module,
    "_modules",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_load_from_state_dict",
)
TORCH.require_attributes(Optimizer, "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")

__all__ = ["_IncompatibleKeys", "child_of", "drop_step_hooks", "has_own_loading"]


def child_of(module: nn.Module, name: str) -> nn.Module | None:
    """The direct child of this name; None where there is none.

    `get_submodule` would take a dotted name apart and raises for a child that is None;
    `named_children` leaves out a module that is there under two names. Can go when torch has a
    public look-up of one child.
    """
    return module._modules.get(name)


def has_own_loading(module: nn.Module) -> bool:
    """Whether a module's loading of its own entries was changed, by hooks or by its class.

    Can go when torch has a public list of a module's hooks.
    """
    return bool(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    )


def drop_step_hooks(optimizer: Optimizer) -> None:
    """Give an optimizer hooks of its own for `step`, and none: it shared another's by its dict.

    Can go when an optimizer can be copied without its hooks.
    """
    optimizer._optimizer_step_pre_hooks = type(optimizer._optimizer_step_pre_hooks)()
    optimizer._optimizer_step_post_hooks = type(optimizer._optimizer_step_post_hooks)()
