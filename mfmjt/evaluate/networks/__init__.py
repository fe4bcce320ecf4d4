"""The published networks that judge sounds, each `from_state_dict` of its published weights."""

from mfmjt.evaluate.networks.cnn14 import CNN14_FILES, Cnn14, Tagged
from mfmjt.evaluate.networks.passt import PASST_FILES, PaSST
from mfmjt.evaluate.networks.vggish import VGGISH_FILES, VGGish

__all__ = [
    "CNN14_FILES",
    "PASST_FILES",
    "VGGISH_FILES",
    "Cnn14",
    "PaSST",
    "Tagged",
    "VGGish",
]
