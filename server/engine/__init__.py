"""Continuous batching for Mixture-of-Tokens models: requests in, tokens out."""
