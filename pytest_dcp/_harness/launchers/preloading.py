"""Which modules the zygote imports before the first rank is forked.

Enters: the modules that are imported after collection. Leaves: the names of those that ranks will
need. A module that is not imported once here is imported by each rank, so `LAZY`, which takes about
a second, is left out only where nothing speaks for it. A wrong guess costs time once: ranks report
what they had to import, and the zygote imports it for the next world.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from pytest_dcp._harness.protocol.launcher import is_of_suite

PRELOAD = (
    "numpy.random",  # a rank seeds it if it is there
    "torch",
    "torch.distributed",
    "pytest_dcp._harness.rank.rendezvous_store",
)
"""Modules that every rank needs."""
LAZY = (
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "torch._dynamo",
)
"""Modules that torch imports by itself, on the first DTensor or optimizer, or with these."""
NEVER_PRELOAD = ("torch._inductor", "torch.utils.tensorboard")
"""Importing these starts processes or threads."""
TORCHS_OWN = ("torch", "functorch", "torchgen")
NAMES_LAZY = re.compile(
    r"\boptim|DTensor|fully_shard|torch\.compile|dynamo|distributed\.(tensor|fsdp|checkpoint)"
    r"|pytest_dcp\.(checkpoint|properties|faults)"
)
"""In the text of a module: its functions will need `LAZY`."""


def modules_to_import(imported: Mapping[str, ModuleType], root: Path) -> Sequence[str]:
    """The names of the modules to import.

    Reads the files of those `imported` modules that are below `root`, or use torch.
    """
    return (*PRELOAD, *LAZY) if _needs_lazy(imported, f"{root}/") else PRELOAD


def _needs_lazy(imported: Mapping[str, ModuleType], root: str) -> bool:
    if any(name in imported for name in ("torch.distributed.tensor", "torch.distributed.fsdp")):
        return True
    others = (one for name, one in imported.items() if name.partition(".")[0] not in TORCHS_OWN)
    return any(NAMES_LAZY.search(_text_of(one)) for one in others if _counts(one, root))


def _counts(module: ModuleType, root: str) -> bool:
    """Whether tests may run functions of a module that use torch."""
    inside = vars(module)
    return "torch" in inside or is_of_suite(str(inside.get("__file__")), root)


def _text_of(module: ModuleType) -> str:
    file = str(vars(module).get("__file__"))
    try:
        return Path(file).read_text(errors="replace") if file.endswith(".py") else ""
    except OSError:
        return ""
