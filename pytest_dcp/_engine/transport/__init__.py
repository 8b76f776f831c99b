"""Sends state dicts from one rank to others, without a checkpoint between them."""
