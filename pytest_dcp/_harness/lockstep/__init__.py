"""Properties of Hypothesis, run by all ranks together."""
