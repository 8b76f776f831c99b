"""Save and load, step by step."""
