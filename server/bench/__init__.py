"""Benchmarks that users can run. Each measures beside the machine's own limits, in the same run."""
