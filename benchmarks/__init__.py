"""Measurements: each prints one table and writes one JSON with versions and commit into benchmarks/results."""
