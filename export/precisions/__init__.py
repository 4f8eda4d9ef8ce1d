"""Precisions: how a matrix is stored and multiplied."""
