"""The engine that saves and loads checkpoints. Public names are in `pytest_dcp.checkpoint`."""
