"""A batch on many machines, or on many cards of one: its passes are handed to Ray's workers."""
