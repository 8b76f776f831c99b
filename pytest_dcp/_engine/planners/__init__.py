"""The planners that `save` and `load` use by default, and what planners call."""
