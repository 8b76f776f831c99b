"""Copying a state before it is saved in the background."""
