"""Benchmarks: `python -m bench gpu --out DIR`."""
