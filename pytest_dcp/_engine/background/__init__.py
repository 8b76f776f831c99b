"""Saving beside the caller's own work: in a thread, or in a process of its own."""
