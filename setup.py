"""Everything about the package stands in pyproject.toml; this file is for compiled parts."""

from setuptools import setup

setup()
