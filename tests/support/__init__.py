"""Shared by several tests: states and storages to save, sessions to run, plans to draw."""
