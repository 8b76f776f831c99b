"""Opens a checkpoint without loading it: names, shapes and shards at once, bytes when asked for."""
