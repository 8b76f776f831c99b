"""Bytes <-> values: entries, archives, the manifest and the metadata of a checkpoint."""
