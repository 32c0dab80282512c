"""Batches -> trunk -> heads; losses, metrics and what trains when."""
