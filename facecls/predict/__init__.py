"""Trained models at work: what they are given, how they are run, and where their predictions go."""
