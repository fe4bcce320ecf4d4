"""Files of video and sound in, and out again with sound: the only part that knows containers.

Pictures are read on a uniform time grid and written never: `mux` copies the video's packets as
they are and adds a sound track beside them.
"""

from mfmjt.media.audio import read_audio
from mfmjt.media.check import Report, check
from mfmjt.media.video import Fit, Pick, Video, VideoStream, read_video
from mfmjt.media.write import AUDIO_SUFFIXES, VIDEO_SUFFIXES, check_output, mux, write_audio

__all__ = [
    "AUDIO_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Fit",
    "Pick",
    "Report",
    "Video",
    "VideoStream",
    "check",
    "check_output",
    "mux",
    "read_audio",
    "read_video",
    "write_audio",
]
