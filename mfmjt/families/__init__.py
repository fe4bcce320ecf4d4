"""Model families: what goes with what, and how a name becomes a network, a codec and encoders."""

from mfmjt.families.bundle import Bundle, default_sampling
from mfmjt.families.open import FAMILIES, PRETRAINED, open_bundle

__all__ = ["FAMILIES", "PRETRAINED", "Bundle", "default_sampling", "open_bundle"]
