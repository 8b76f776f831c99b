"""Steps of a training run: which checkpoints are whole, which to load, which to remove."""
