"""Models and optimizers to and from state dicts that name everything by the bare model's names."""
