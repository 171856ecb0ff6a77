"""Benchmarks and comparisons that prove the claims, run by `scripts/studies/`."""
