"""Faces on disk -> table -> split -> batches."""
