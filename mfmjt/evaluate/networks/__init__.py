"""The published networks that judge sounds, each `from_state_dict` of its published weights.

They are for judging only: parameters need no gradients, and everything but the front ends, which
compute in float64, is float32.
"""

from mfmjt.evaluate.networks.clap import CLAP, CLAP_FILES
from mfmjt.evaluate.networks.cnn14 import CNN14_FILES, Cnn14, Tagged
from mfmjt.evaluate.networks.imagebind import IMAGEBIND_FILES, ImageBind
from mfmjt.evaluate.networks.passt import PASST_FILES, PaSST
from mfmjt.evaluate.networks.synchformer import SYNCHFORMER_FILES, Synchformer
from mfmjt.evaluate.networks.vggish import VGGISH_FILES, VGGish
from mfmjt.evaluate.networks.yamnet import YAMNet

__all__ = [
    "CLAP",
    "CLAP_FILES",
    "CNN14_FILES",
    "IMAGEBIND_FILES",
    "PASST_FILES",
    "SYNCHFORMER_FILES",
    "VGGISH_FILES",
    "Cnn14",
    "ImageBind",
    "PaSST",
    "Synchformer",
    "Tagged",
    "VGGish",
    "YAMNet",
]
