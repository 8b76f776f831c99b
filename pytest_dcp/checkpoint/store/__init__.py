"""Checkpoints as bytes: entries, files, the catalog that names them, and how they are committed."""
