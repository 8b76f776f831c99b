"""A trainer that can be killed at any time, and resumed by any number of ranks.

Everything that decides the next step is in its state dict: the model and the optimizer (sharded by
FSDP2), the schedule, the position in the data, and each rank's random generator.
"""

import signal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pytest_dcp.checkpoint import CheckpointManager, PerRank
from pytest_dcp.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from pytest_dcp.demo.model import FEATURES, MLP

SAMPLES = 64
BATCH = 8
"""Samples of all ranks together in one step, with any number of ranks."""
STEPS = 30
SAVE_EVERY = 5


class Batches:
    """The data in the order of a shuffle of each epoch; its position is a number of samples."""

    def __init__(self):
        self.samples = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(1))
        self.consumed = 0

    def next_share(self, rank, ranks):
        """This rank's samples of the next batch."""
        epoch, start = divmod(self.consumed, SAMPLES)
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch))
        self.consumed += BATCH
        return self.samples[order[start : start + BATCH][rank::ranks]]


class Trainer:
    """One rank's part. `state_dict` and `load_state_dict` make it a Stateful of checkpoints."""

    def __init__(self, dropout=0.1):
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(0)  # the same weights on all ranks
        self.model = nn.Sequential(nn.Dropout(dropout), MLP())
        fully_shard(self.model, mesh=init_device_mesh("cpu", (self.ranks,)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.batches = Batches()
        torch.manual_seed(1 + self.rank)  # another dropout on each rank

    def train_step(self):
        """Train one step; returns the loss of all ranks."""
        batch = self.batches.next_share(self.rank, self.ranks)
        loss = (self.model(batch) - batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return mean.item() / self.ranks

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "consumed": self.batches.consumed,
            # By another number of ranks: each keeps the generator that it was seeded with.
            "rng": PerRank(torch.get_rng_state(), when_resized=lambda *_: None),
        }

    def load_state_dict(self, state):
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.schedule.load_state_dict(state["schedule"])
        self.batches.consumed = state["consumed"]
        torch.set_rng_state(state["rng"].value)

    def full_state(self):
        """The whole weights and the optimizer's states, on rank 0; {} elsewhere. Collective."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer["state"]} if self.rank == 0 else {}


def train(run, steps=STEPS, dropout=0.1):
    """Train from the newest whole step of the run to the end; returns the full state."""
    trainer = Trainer(dropout)
    state = {"trainer": trainer}
    with CheckpointManager(run, keep_last=2, on_signal=signal.SIGTERM, grace_s=20) as manager:
        loaded = manager.load_latest(state)
        first = 0 if loaded is None else loaded.number + 1
        for step in range(first, steps):
            loss = trainer.train_step()
            stopping = manager.should_stop()
            if stopping or step % SAVE_EVERY == SAVE_EVERY - 1:
                manager.async_save(step, state, metrics={"loss": loss})
            if stopping:
                break
    return trainer.full_state()
