"""Checks, tests, costs and training on a machine that has a GPU, Python and torch, but no network."""
