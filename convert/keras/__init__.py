"""Reads networks that Keras saved."""
