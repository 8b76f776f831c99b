"""Converts checkpoints to and from the files of `torch.save`."""
