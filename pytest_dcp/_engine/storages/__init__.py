"""Checkpoints in folders: writers and readers, on local disks and on fsspec."""
