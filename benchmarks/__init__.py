"""Benchmarks of time and memory. Each first checks that the implementations it compares give equal results."""
