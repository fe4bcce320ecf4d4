"""Whole networks: what a training step, a generation, a tangent and MMAudio's own parts cost."""
