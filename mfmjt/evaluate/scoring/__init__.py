"""`mfmjt score`: the field's numbers for folders of sounds, whatever system made them."""

from mfmjt.evaluate.scoring.page import save_report
from mfmjt.evaluate.scoring.result import Result
from mfmjt.evaluate.scoring.run import score

__all__ = ["Result", "save_report", "score"]
