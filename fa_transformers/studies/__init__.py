"""What proves the claims: benchmarks and comparisons, run by `scripts/studies/`."""
