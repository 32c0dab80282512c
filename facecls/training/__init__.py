"""How a model is trained: options, callbacks, what a run leaves."""
