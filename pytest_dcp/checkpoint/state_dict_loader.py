"""Loading: the public names of `torch.distributed.checkpoint.state_dict_loader`, and ours."""

from pytest_dcp.checkpoint.loading import load, load_state_dict, load_without_template

__all__ = ["load_state_dict", "load", "load_without_template"]

_load_state_dict_from_keys = load_without_template
"""torch's name for it, which other libraries import."""
