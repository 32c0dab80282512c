"""Is the machine well used? What ``python -m facecls.bench`` measures."""
