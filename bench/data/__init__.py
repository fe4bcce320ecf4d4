"""Benchmarks of reading what networks are trained on."""
