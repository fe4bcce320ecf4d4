"""Listening tests: one page that people answer, and what their answers say."""

from mfmjt.listen.analyse import Analysis, analyse
from mfmjt.listen.build import KINDS, build

__all__ = ["KINDS", "Analysis", "analyse", "build"]
