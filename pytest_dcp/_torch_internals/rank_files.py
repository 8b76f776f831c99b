"""Types of `torch.distributed.checkpoint._experimental`: its values, and the bases of ours.

Users make these values and subclass these bases, so they are torch's own. They can go when torch
gives them public names, or drops the package.
"""

from __future__ import annotations

from pytest_dcp._torch_internals.supported_versions import TORCH

with TORCH.explain_missing_names():
    # Ours are registered as subclasses of classes in this module and the last two.
    from torch.distributed.checkpoint._experimental import barriers as barriers_of_torch
    from torch.distributed.checkpoint._experimental import checkpointer as checkpointers_of_torch
    from torch.distributed.checkpoint._experimental import staging as staging_of_torch
    from torch.distributed.checkpoint._experimental.barriers import Barrier, BarrierConfig
    from torch.distributed.checkpoint._experimental.checkpoint_process import (
        CheckpointProcess as CheckpointProcessOfTorch,
    )
    from torch.distributed.checkpoint._experimental.checkpoint_process import (
        CheckpointProcessConfig,
    )
    from torch.distributed.checkpoint._experimental.checkpoint_reader import (
        CheckpointReader as CheckpointReaderOfTorch,
    )
    from torch.distributed.checkpoint._experimental.checkpoint_writer import (
        CheckpointWriter as CheckpointWriterOfTorch,
    )
    from torch.distributed.checkpoint._experimental.checkpoint_writer import (
        CheckpointWriterConfig,
        WriterHook,
    )
    from torch.distributed.checkpoint._experimental.checkpointer import Checkpointer
    from torch.distributed.checkpoint._experimental.config import CheckpointerConfig
    from torch.distributed.checkpoint._experimental.staging import (
        CheckpointStager,
        CheckpointStagerConfig,
    )
    from torch.distributed.checkpoint._experimental.types import RankInfo

__all__ = [
    "Barrier",
    "BarrierConfig",
    "CheckpointProcessConfig",
    "CheckpointProcessOfTorch",
    "CheckpointReaderOfTorch",
    "CheckpointStager",
    "CheckpointStagerConfig",
    "CheckpointWriterConfig",
    "CheckpointWriterOfTorch",
    "Checkpointer",
    "CheckpointerConfig",
    "RankInfo",
    "WriterHook",
    "barriers_of_torch",
    "checkpointers_of_torch",
    "staging_of_torch",
]
