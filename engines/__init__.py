"""Engines: what `i2l build-engines` made, opened and made runnable."""
