"""Files of video and sound in, and out again with sound: the only part that knows containers.

Pictures are read on a uniform time grid. `mux` copies a video's packets as they are and adds a
sound track beside them; only what no container holds is encoded, once.
"""

from mfmjt.media.audio import native_audio, read_audio
from mfmjt.media.check import Report, check
from mfmjt.media.pictures import Pictures, as_source, content
from mfmjt.media.video import Fit, Pick, Video, VideoStream, read_video, thumbnails
from mfmjt.media.write import (
    AUDIO_SUFFIXES,
    VIDEO_SUFFIXES,
    check_output,
    default_suffix,
    mux,
    refuse_same,
    write_audio,
)

__all__ = [
    "AUDIO_SUFFIXES",
    "VIDEO_SUFFIXES",
    "Fit",
    "Pick",
    "Pictures",
    "Report",
    "Video",
    "VideoStream",
    "as_source",
    "check",
    "check_output",
    "content",
    "default_suffix",
    "mux",
    "native_audio",
    "read_audio",
    "read_video",
    "refuse_same",
    "thumbnails",
    "write_audio",
]
