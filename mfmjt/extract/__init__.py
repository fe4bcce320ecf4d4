"""From folders of videos or sounds with captions to a feature store: `mfmjt extract`."""

from mfmjt.extract.ends import Ends
from mfmjt.extract.tables import LAYOUTS, Row, read_table
from mfmjt.extract.work import Done, Settings, extract, verify

__all__ = [
    "LAYOUTS",
    "Done",
    "Ends",
    "Row",
    "Settings",
    "extract",
    "read_table",
    "verify",
]
