"""Checkpoints: recognised, read, made up."""
