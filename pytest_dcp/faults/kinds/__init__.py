"""Kinds of faults: at a hook, at an operation, or in a file at rest."""
