"""One file of `torch.save` for each rank: the checkpointers of torch's `_experimental` package."""
