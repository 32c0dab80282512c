"""Measures how well the machine is used: data loading, training step and evaluation step, alone and together."""
