"""Training: options, callbacks, progress, and the results that a run saves."""
