"""Metrics and the experiments behind the figures."""
