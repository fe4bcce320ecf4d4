"""Films of every make for tests of copying, with what a player shows of each and when."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH = 48, 64
ONE = Fraction(1)

# Codec -> (encoder, pixels, whether it reorders pictures, files that hold it).
CODECS = {
    "h264": ("libx264", "yuv420p", True, "mp4 mov m4v mkv avi ts flv h264"),
    "hevc": ("libx265", "yuv420p", True, "mp4 mov mkv ts hevc"),
    "mpeg4": ("mpeg4", "yuv420p", True, "mp4 mov mkv avi ts"),
    "mpeg2": ("mpeg2video", "yuv420p", True, "mkv ts mpg m2v mp4"),
    "vp8": ("libvpx", "yuv420p", False, "webm mkv ivf"),
    "vp9": ("libvpx-vp9", "yuv420p", False, "webm mkv mp4 ivf"),
    "av1": ("libsvtav1", "yuv420p", False, "mp4 mkv webm obu ivf"),
    "mjpeg": ("mjpeg", "yuvj420p", False, "avi mov mkv mp4"),
    "prores": ("prores_ks", "yuv422p10le", False, "mov mkv"),
    "ffv1": ("ffv1", "yuv420p", False, "mkv avi"),
}
FORMATS = {"m4v": "mp4", "mkv": "matroska", "ts": "mpegts", "mpg": "mpeg", "m2v": "mpeg2video"}
BARE = {"h264", "hevc", "m2v", "obu"}
CONSTANT = {"avi", *BARE}  # what has no times of its own


@dataclass
class Film:
    """How a film is made; `shown` is what of its pictures a player shows, and when, from 0 s."""

    codec: str
    suffix: str
    frames: int
    rate: Fraction
    options: dict[str, str] = field(default_factory=dict)
    times: list[Fraction] = field(default_factory=list)  # of all pictures, from 0 s
    start: Fraction = Fraction(0)  # what the file's clock says at 0
    hidden: int = 0  # pictures at the start that an edit list hides
    turned: dict[str, object] | None = None
    preview: bool = False  # a small stream comes first
    seed: int = 0

    def write(self, folder: Path) -> Path:
        path = folder / f"film.{self.suffix}"
        if not self.hidden:
            return self._encode(path, self.start)
        whole = self._encode(folder / f"whole.{self.suffix}", Fraction(0))
        return _retimed(whole, path, -self.times[self.hidden])

    @property
    def shown(self) -> list[Fraction]:
        kept = self.times[self.hidden :]
        return [time - kept[0] for time in kept]

    def _encode(self, path: Path, start: Fraction) -> Path:
        encoder, pixels, _, _ = CODECS[self.codec]
        rng = np.random.default_rng(self.seed)
        whole = self.suffix in CONSTANT or self.codec in ("mpeg2", "mpeg4")
        base = 1 / self.rate if whole else Fraction(1, 90_000)
        with av.open(str(path), "w", format=FORMATS.get(self.suffix, self.suffix)) as target:
            streams = []
            if self.preview:
                small = target.add_stream("mjpeg", rate=25)
                small.width, small.height, small.pix_fmt = 32, 24, "yuvj420p"
                small.disposition = 0
                streams.append(small)
            video = target.add_stream(encoder, rate=self.rate, options=self.options)
            video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, pixels
            video.codec_context.time_base = base
            if self.preview:
                video.disposition = av.stream.Disposition.default
            if self.turned:
                video.set_display_rotation(**self.turned)
            if self.preview:
                for i in range(2):
                    frame = av.VideoFrame.from_ndarray(np.zeros((24, 32, 3), np.uint8), "rgb24")
                    frame = frame.reformat(format="yuvj420p")
                    frame.pts, frame.time_base = i, Fraction(1, 25)
                    target.mux(small.encode(frame))
                target.mux(small.encode())
            for time in self.times:
                coarse = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
                picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
                frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=pixels)
                frame.pts, frame.time_base = round((time + start) / base), base
                target.mux(video.encode(frame))
            target.mux(video.encode())
        return path


def _retimed(source: Path, path: Path, shift: Fraction) -> Path:
    """A copy whose times are moved: what comes before 0 is hidden by an edit list."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream, opaque=True)
        for packet in old.demux(stream):
            if packet.size:
                packet.pts += round(shift / packet.time_base)
                packet.dts += round(shift / packet.time_base)
                packet.stream = copy
                new.mux(packet)
    return path


def draw(seed: int) -> Film:
    """Draw a film of any make."""
    rng = np.random.default_rng(seed)
    codec = str(rng.choice(list(CODECS), p=_WEIGHTS))
    encoder, _, reorders, suffixes = CODECS[codec]
    suffix = str(rng.choice(suffixes.split()))
    frames = int(rng.integers(6, 40))
    rate = Fraction(*[(25, 1), (30000, 1001), (24, 1), (50, 1), (10, 1)][rng.integers(0, 5)])
    if codec == "mpeg2" or suffix == "obu":
        rate = Fraction(25)  # MPEG-2 knows few rates, and SVT's AV1 tells none
    film = Film(codec, suffix, frames, rate, seed=seed)
    gop = int(rng.choice([1, 4, 12, 250]))
    between = int(rng.integers(0, 5))
    if encoder == "libx264":
        pyramid = str(rng.choice(["none", "strict", "normal"]))
        extra = f":open-gop={rng.integers(0, 2)}:ref={rng.integers(1, 5)}"
        film.options = {
            "preset": "ultrafast",
            "bf": str(between),
            "g": str(gop),
            "x264-params": f"b-pyramid={pyramid}:scenecut=0:b-adapt=0:log-level=none{extra}",
        }
    elif encoder == "libx265":
        film.options = {
            "preset": "ultrafast",
            "x265-params": f"bframes={between}:keyint={gop}:b-adapt=0:pools=1:log-level=none:"
            f"open-gop={rng.integers(0, 2)}:b-pyramid={rng.integers(0, 2)}",
        }
    elif reorders:
        film.options = {"bf": str(min(between, 3)), "g": str(gop), "q": "4"}
    elif codec in ("vp8", "vp9"):
        film.options = {"g": str(gop), "deadline": "realtime", "lag-in-frames": "8"}
        film.options |= {"auto-alt-ref": str(rng.integers(0, 2)), "cpu-used": "8"}
    elif codec == "av1":
        film.options = {"preset": "12", "g": str(gop), "svtav1-params": "lp=1"}
    constant = suffix in CONSTANT or codec in ("mpeg2", "mpeg4") or suffix in ("ivf", "mpg")
    film.times = [i / rate for i in range(frames)]
    if not constant and rng.random() < 0.4:
        gaps = rng.choice([1, 1, 2, 5], frames - 1)
        film.times = [sum(map(int, gaps[:i])) / rate for i in range(frames)]
    if suffix not in CONSTANT and suffix not in ("ivf", "flv", "mpg") and rng.random() < 0.4:
        film.start = Fraction(int(rng.choice([5, 12, 400]))) * 40 / 1000
    if suffix in ("mp4", "mov", "m4v") and rng.random() < 0.3 and frames > 10:
        film.start, film.hidden = Fraction(0), int(rng.integers(1, 6))
    if suffix in ("mp4", "mov", "mkv") and rng.random() < 0.3:
        film.turned = {
            "degrees": int(rng.choice([0, 90, 180, 270])),
            "hflip": bool(rng.integers(2)),
        }
    if suffix in ("mp4", "mov", "mkv") and not film.hidden and rng.random() < 0.2:
        film.preview = True
    return film


_WEIGHTS = np.array([6, 3, 2, 2, 1, 1, 1, 1, 1, 1]) / 19


@dataclass
class Seen:
    """What a decoder gives of a file: each picture's time and digest, and how it is shown."""

    pictures: list[tuple[Fraction, str]]
    matrix: bytes
    tick: Fraction
    tag: str


def look(path: Path) -> Seen:
    """Decode the stream of a file that players show, by nothing of the package."""
    pictures, matrix = [], b""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        for frame in container.decode(stream):
            width = 2 if "10" in frame.format.name else 1  # bytes of a sample
            planes = b"".join(
                np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[:, : p.width * width].tobytes()
                for p in frame.planes
            )
            time = Fraction(-1) if frame.pts is None else frame.pts * frame.time_base
            pictures.append((time, hashlib.md5(planes).hexdigest()))
            found = [bytes(s) for s in frame.side_data if s.type.name == "DISPLAYMATRIX"]
            matrix = found[0] if found else b""
        return Seen(pictures, matrix, stream.time_base, stream.codec_context.codec_tag)
