"""Aligned faces cut out of photos, as a training set."""
