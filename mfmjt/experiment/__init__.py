"""`mfmjt experiment`: grids of trainings that answer one question each.

A module of the name of an experiment holds its `EXPERIMENT`: what is trained, how it is sampled,
and what is compared. `run.py` is the grid, `work.py` one process of it, `page.py` writes the page.
"""
