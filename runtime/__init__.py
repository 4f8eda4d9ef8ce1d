"""Runtime: images to pixels, chunks through an engine, factors to a LoRA file."""
