"""Checks, tests, benchmarks and training on a machine with a GPU, Python and torch, but without a network."""
