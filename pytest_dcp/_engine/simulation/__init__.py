"""Saves of worlds that do not exist: real planning code on shapes and dtypes, in one process."""
