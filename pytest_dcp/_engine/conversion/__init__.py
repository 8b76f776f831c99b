"""Checkpoints into other files, and back: those of `torch.save`."""
