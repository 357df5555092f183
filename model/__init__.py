"""Mixture-of-Tokens models: configuration, layers, checkpoints, training. Knows nothing of requests or of serving."""
