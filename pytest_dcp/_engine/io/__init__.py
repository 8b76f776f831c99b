"""Disks, reading and writing, and how a save is committed."""
