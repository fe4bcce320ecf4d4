"""Files that a server must refuse or survive: damaged clips, bombs, and what is no video."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np

__all__ = ["crafted", "mutated"]


def mutated(clip: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A clip with damage of one kind; some of these can still be played."""
    data = bytearray(clip)
    ways: dict[str, Callable[[], bytes]] = {
        "bytes changed": lambda: _flipped(data, rng, len(data)),
        "header changed": lambda: _flipped(data, rng, 2000),
        "index changed": lambda: _flipped_in(data, rng, b"moov", 4000),
        "cut short": lambda: bytes(data[: rng.randrange(8, len(data))]),
        "begin lost": lambda: bytes(data[rng.randrange(1, 4000) :]),
        "block repeated": lambda: _repeated(data, rng),
        "zeros": lambda: _zeroed(data, rng),
        "counts huge": lambda: _huge(data, rng),
    }
    name = rng.choice(sorted(ways))
    return name, ways[name]()


def _flipped(data: bytearray, rng: random.Random, reach: int) -> bytes:
    for _ in range(rng.choice((1, 8, 64, 512))):
        data[rng.randrange(min(reach, len(data)))] = rng.randrange(256)
    return bytes(data)


def _flipped_in(data: bytearray, rng: random.Random, box: bytes, reach: int) -> bytes:
    start = max(0, data.find(box))
    for _ in range(rng.choice((1, 4, 16))):
        data[min(len(data) - 1, start + rng.randrange(reach))] = rng.randrange(256)
    return bytes(data)


def _repeated(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return bytes(data[:start] + data[start : start + 5000] * rng.randrange(2, 20) + data[start:])


def _zeroed(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    size = rng.randrange(1, 5000)
    data[start : start + size] = bytes(len(data[start : start + size]))
    return bytes(data)


def _huge(data: bytearray, rng: random.Random) -> bytes:
    """Lengths and counts of the index say that there are billions."""
    box = rng.choice((b"stsz", b"stts", b"stco", b"stsc", b"ctts", b"tkhd", b"mdhd", b"avcC"))
    place = data.find(box)
    if place > 0:
        at = place + rng.choice((-4, 8, 12, 16))
        data[at : at + 4] = struct.pack(">I", rng.choice((0x7FFFFFFF, 0xFFFFFFFF, 0x10000000)))
    return bytes(data)


def crafted(port: int, scale: int = 1) -> dict[str, bytes]:
    """Files made to do harm, by name.

    Args:
        port: Where one that opens an address would knock.
        scale: Makes those that take long to make so much smaller.
    """
    address = f"http://127.0.0.1:{port}/"
    mp4 = b"\0\0\0\x18ftypisom\0\0\0\0isommp42"
    noise = random.Random(0).randbytes(100_000)
    return {
        "empty": b"",
        "text": b"This is no video.\n" * 100,
        "random bytes": noise,
        "random behind an mp4 signature": mp4 + noise,
        "random behind a matroska signature": b"\x1a\x45\xdf\xa3" + noise,
        "zip bomb": _zip_bomb(),
        "deflated zeros": zlib.compress(bytes(50_000_000), 9),
        "playlist": f"#EXTM3U\n#EXTINF:1,\n{address}a.ts\n".encode(),
        "playlist of a file": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "list of files": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "session description": f"v=0\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n".encode(),
        "picture of 50,000 x 50,000": _png(50_000, 50_000),
        "movie that refers to an address": _reference(address),
        "frames of 50,000 x 50,000": _mjpeg(50_000, 50_000),
        "frames of 65,000 x 16": _mjpeg(65_000, 16),
        "a frame that unpacks to a thousand times as much": _packed(20_000, 20_000 // scale),
        "frames that change their size": _growing(),
        "sound alone": _sound(),
        "one frame": _video(1),
        "an hour": _video(36, rate=1, spread=100),
        "tens of thousands of frames": _video(100_000 // min(scale, 8), side=16, rate=50_000),
        "millions of boxes": mp4 + b"\0\0\0\x08free" * (2_000_000 // scale),
        "boxes inside boxes": _nested(),
    }


def _zip_bomb() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(20):
            archive.writestr(f"{number}.mp4", bytes(10_000_000))
    return held.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A grey PNG that says it is this large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", rows), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", 8 + len(data)) + kind + data


def _reference(address: str) -> bytes:
    """QuickTime's reference movie: an address in the place of pictures."""
    where = address.encode() + b"\0"
    rdrf = _box(b"rdrf", b"\0\0\0\0url " + struct.pack(">I", len(where)) + where)
    movie = _box(b"moov", _box(b"rmra", _box(b"rmda", rdrf)))
    return _box(b"ftyp", b"qt  \0\0\0\0qt  ") + movie


def _nested() -> bytes:
    data = b""
    for _ in range(20_000):
        data = struct.pack(">I", 8 + len(data)) + b"moov" + data if len(data) < 160_000 else data
    return _box(b"ftyp", b"isom\0\0\0\0isom") + data


def _packets(suffix: str, codec: str, width: int, height: int, packets: list[bytes]) -> bytes:
    """A container whose packets are these bytes, whatever they are."""
    with TemporaryDirectory() as folder:
        path = Path(folder, f"made{suffix}")
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(codec, rate=25)
            stream.width, stream.height = width, height
            stream.pix_fmt = "gray" if codec == "png" else "yuvj420p"
            for number, data in enumerate(packets):
                packet = av.Packet(data)
                packet.stream, packet.pts, packet.dts = stream, number, number
                packet.is_keyframe = True
                container.mux(packet)
        return path.read_bytes()


def _jpeg(width: int, height: int) -> bytes:
    """A small JPEG that says it is this large."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.jpg")
        with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
            stream = container.add_stream("mjpeg", rate=25)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuvj420p"
            picture = np.full((64, 64, 3), 90, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        data = bytearray(path.read_bytes())
    place = data.find(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _mjpeg(width: int, height: int) -> bytes:
    return _packets(".avi", "mjpeg", 64, 64, [_jpeg(width, height)] * 50)


def _growing() -> bytes:
    sizes = [64, 8000, 16, 16000, 32000, 64] * 8
    return _packets(".mkv", "mjpeg", 64, 64, [_jpeg(size, size) for size in sizes])


def _packed(width: int, height: int) -> bytes:
    """A frame of zeros: 400 kB that unpack to a thousand times as much."""
    packer = zlib.compressobj(9)
    rows = [packer.compress(bytes(width + 1)) for _ in range(height)]
    frame = _png(width, height, b"".join(rows) + packer.flush())
    return _packets(".mov", "png", 64, 64, [frame] * 3)


def _video(frames: int, side: int = 32, rate: int = 25, spread: int = 1) -> bytes:
    """Black frames, `spread` periods of `rate` apart."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "made.mp4")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=rate)
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
            stream.options = {"preset": "ultrafast"}
            frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
            for number in range(frames):
                frame.pts = number * spread
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path.read_bytes()


def _sound() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, "made.mp4")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path.read_bytes()
