"""Checkpoints as folders of safetensors files."""
