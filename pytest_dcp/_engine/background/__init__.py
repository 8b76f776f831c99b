"""Saving while the caller goes on: in a thread, or in a separate process."""
