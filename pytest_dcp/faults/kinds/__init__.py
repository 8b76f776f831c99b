"""What can go wrong: at a hook, at an operation, or to a file at rest."""
