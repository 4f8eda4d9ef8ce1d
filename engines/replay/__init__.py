"""Work that a device was given once, given again in one call."""
