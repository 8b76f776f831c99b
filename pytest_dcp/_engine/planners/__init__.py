"""The planners that `save` and `load` use by default, and functions for planners."""
