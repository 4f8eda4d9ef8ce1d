"""Packs: prepared weights, streamed from the checkpoint to the file."""
