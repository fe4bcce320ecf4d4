"""Weight files: published ones and our own, what they hold, and what is wrong with them."""

from mfmjt.checkpoints.own import check_depths, fingerprint, load_module, read_own, save_module
from mfmjt.checkpoints.published import Check, PublishedFile, find_all, there
from mfmjt.checkpoints.read import read_content
from mfmjt.checkpoints.weights import about, load_published, weights_in

__all__ = [
    "Check",
    "PublishedFile",
    "about",
    "check_depths",
    "find_all",
    "fingerprint",
    "load_module",
    "load_published",
    "read_content",
    "read_own",
    "save_module",
    "there",
    "weights_in",
]
