from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import av
import numpy as np
import pytest
import soundfile
import torch

from mfmjt.pipeline import Audio, Pipeline
from tests.serve.client import Client
from tests.support.clips import grey, packets, write_video

SLOW = {"prompt": "x", "duration": 9, "steps": 100, "count": 8, "guidance_mode": ["cfg", "none"]}
"""A request that keeps the server busy until it is removed."""


def made(server: Client, video: bytes | None = None, **fields: Any) -> dict[str, Any]:
    """The state of a job that is done."""
    answer = server.generate(video, **fields)
    assert answer.status == 202, answer.body
    assert answer.headers["location"] == f"/v1/jobs/{answer.json['id']}"
    state = server.wait(answer.json["id"])
    assert state["status"] == "done", state
    return state


def samples(server: Client, state: dict[str, Any], number: int = 0) -> np.ndarray:
    """int16 samples of a sound, as they come over the wire."""
    answer = server.get(f"/v1/jobs/{state['id']}/sounds/{number}.wav")
    assert answer.status == 200
    assert answer.headers["content-type"] == "audio/wav"
    wave, rate = soundfile.read(io.BytesIO(answer.body), dtype="int16")
    assert rate == state["sounds"][number]["sample_rate"]
    return wave


def written(sound: Audio | list[Audio], folder: Path) -> np.ndarray:
    """The same of a pipeline's sound."""
    assert isinstance(sound, Audio)
    sound.save(folder / "a.wav")
    return soundfile.read(folder / "a.wav", dtype="int16")[0]


def close(one: np.ndarray, other: np.ndarray) -> None:
    """The same sound, but for rounding to 16 bits and what a batch rounds otherwise."""
    scale = 2.0**-15
    torch.testing.assert_close(
        torch.from_numpy(one * scale).float(),
        torch.from_numpy(other * scale).float(),
        atol=2 * scale,
        rtol=0,
    )


# --- sounds ------------------------------------------------------------------------------------


def test_a_video_gets_the_sound_that_the_pipeline_makes(
    server: Client, pipe: Pipeline, clip: bytes, tmp_path: Path
) -> None:
    state = made(server, clip, prompt="a bell", seed=3, count=2, steps=2, guidance=2.5)
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    for number, seed in enumerate((3, 4)):
        assert state["sounds"][number]["seed"] == seed
        expected = pipe(path, "a bell", seed=seed, steps=2, guidance=2.5)
        close(samples(server, state, number), written(expected, tmp_path))
    assert state["video"]
    assert {"receive", "video", "wait", "read", "encode", "generate", "decode", "write"} == set(
        state["timings"]
    )


def test_a_prompt_alone(server: Client, pipe: Pipeline, tmp_path: Path) -> None:
    state = made(server, prompt="rain 🌧 on tin", duration=1.1)
    close(samples(server, state), written(pipe(None, "rain 🌧 on tin", duration=1.1), tmp_path))
    assert not state["video"]
    assert server.get(f"/v1/jobs/{state['id']}/sounds/0.mp4").status == 404


def test_a_negative_prompt(server: Client, pipe: Pipeline, clip: bytes, tmp_path: Path) -> None:
    words = {"prompt": "a bell", "negative_prompt": "rain 🌧"}
    state = made(server, duration=1.1, **words)
    close(samples(server, state), written(pipe(duration=1.1, **words), tmp_path))
    state = made(server, clip, guidance=4, **words)
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    close(samples(server, state), written(pipe(path, guidance=4.0, **words), tmp_path))


def test_ways_of_guidance_side_by_side(
    server: Client, pipe: Pipeline, clip: bytes, tmp_path: Path
) -> None:
    state = made(server, clip, guidance_mode=["none", "cfg"], count=2, guidance=3)
    assert [(s["guidance_mode"], s["seed"]) for s in state["sounds"]] == [
        ("none", 0), ("none", 1), ("cfg", 0), ("cfg", 1),
    ]  # fmt: skip
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    expected = pipe(path, mode="cfg", seed=1, guidance=3)
    close(samples(server, state, 3), written(expected, tmp_path))


def test_the_video_with_its_sound(server: Client, clip: bytes, tmp_path: Path) -> None:
    state = made(server, clip)
    source = tmp_path / "clip.mp4"
    source.write_bytes(clip)
    assert state["containers"] == ["mp4", "mov", "mkv"]
    for kind in state["containers"]:
        answer = server.get(f"/v1/jobs/{state['id']}/sounds/0.{kind}")
        assert answer.status == 200, answer.body
        path = tmp_path / f"made.{kind}"
        path.write_bytes(answer.body)
        assert packets(path, "video") == packets(source, "video")
        assert len(packets(path, "audio")) > 1


def test_a_video_that_mp4_does_not_hold(server: Client, tmp_path: Path) -> None:
    source = write_video(tmp_path / "a.webm", frames=10, codec="libvpx")
    state = made(server, source.read_bytes())
    assert state["containers"] == ["webm", "mkv"]
    sounds = f"/v1/jobs/{state['id']}/sounds"
    for kind in ("mp4", "mov"):
        answer = server.get(f"{sounds}/0.{kind}")
        assert answer.status == 409
        assert ".webm" in answer.json["detail"]
    for kind, name in (("webm", "video/webm"), ("mkv", "video/x-matroska")):
        answer = server.get(f"{sounds}/0.{kind}")
        assert (answer.status, answer.headers["content-type"]) == (200, name)
        path = tmp_path / f"made.{kind}"
        path.write_bytes(answer.body)
        assert packets(path, "video") == packets(source, "video")


def test_what_a_copy_does_not_hold_is_told(server: Client, tmp_path: Path) -> None:
    """Of two streams one is used, which is said at once; of the cover when a copy is asked for."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as target:
        film = target.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        other, cover = (target.add_stream("mjpeg", rate=25) for _ in range(2))
        for stream in (film, other, cover):
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuv420p" if stream is film else "yuvj420p"
        film.disposition = av.stream.Disposition.default
        cover.disposition = av.stream.Disposition.attached_pic
        for stream, count in ((film, 20), (other, 20), (cover, 1)):
            for i in range(count):
                frame = av.VideoFrame.from_ndarray(grey(i, 48, 64), "rgb24")
                frame = frame.reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = i, Fraction(1, 25)
                target.mux(stream.encode(frame))
            target.mux(stream.encode())
    state = made(server, path.read_bytes())
    (chosen,) = state["notes"]
    assert chosen.startswith("The video has 2 video streams")
    for _ in range(2):
        assert server.get(f"/v1/jobs/{state['id']}/sounds/0.mkv").status == 200
        notes = server.get(f"/v1/jobs/{state['id']}").json["notes"]
        assert notes == [chosen, "Not copied from the video: 1 cover image."]


def test_what_is_drawn(server: Client, clip: bytes) -> None:
    state = made(server, clip, duration=0.8)
    drawn = server.get(f"/v1/jobs/{state['id']}/sounds/0.json").json
    wave = samples(server, state) * 2.0**-15
    assert drawn["duration"] == pytest.approx(0.8)
    rounding = 0.0005 + 2.0**-15  # to three digits here, to 16 bits there
    assert max(drawn["peaks"][1]) == pytest.approx(float(wave.max()), abs=rounding)
    assert min(drawn["peaks"][0]) == pytest.approx(float(wave.min()), abs=rounding)
    assert len(drawn["onsets"]) == state["sounds"][0]["onsets"]


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".mov", ".ts"])
def test_other_containers(server: Client, tmp_path: Path, suffix: str) -> None:
    video = write_video(tmp_path / f"a{suffix}", frames=20).read_bytes()
    assert made(server, video)["sounds"][0]["duration"] == pytest.approx(0.8, abs=0.05)


def test_a_video_of_a_phone(server: Client, tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", frames=10, size=(1080, 1920), sound=True)
    assert made(server, video.read_bytes())["status"] == "done"


def test_longer_than_a_window(server: Client, tmp_path: Path) -> None:
    video = write_video(
        tmp_path / "a.mp4", frames=300, picture=lambda i, h, w: grey(i % 50, h, w)
    ).read_bytes()
    assert made(server, video)["sounds"][0]["duration"] == pytest.approx(12.0)


def test_notes_name_no_path(server: Client, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", options={"movflags": "faststart"}).read_bytes()
    state = made(server, whole[: len(whole) * 3 // 4], prompt="a word " * 200)
    assert [note.partition(" is ")[0] for note in state["notes"]][:2] == ["The prompt", "The video"]
    assert not any("/" in note or "upload" in note for note in state["notes"])


# --- jobs --------------------------------------------------------------------------------------


def test_events_tell_each_stage_until_the_end(server: Client, clip: bytes) -> None:
    job = server.generate(clip, steps=30).json["id"]
    answer = server.get(f"/v1/jobs/{job}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    states = [json.loads(data) for data in re.findall(rb"data: (.*)\n", answer.body)]
    assert states[-1]["status"] == "done"
    parts = [s["progress"] for s in states if s["stage"] == "generate"]
    assert parts == sorted(parts)
    assert states[-1] == server.get(f"/v1/jobs/{job}").json


def test_a_removed_job_is_gone_with_its_files(server: Client, clip: bytes, folder: Path) -> None:
    before = set(folder.glob("*/job-*"))
    state = made(server, clip)
    (own,) = set(folder.glob("*/job-*")) - before
    assert {path.name for path in own.iterdir()} == {"upload", "0.wav", "0.json"}
    assert server.ask("DELETE", f"/v1/jobs/{state['id']}").status == 204
    assert not own.exists()
    for path in ("", "/events", "/sounds/0.wav"):
        assert server.get(f"/v1/jobs/{state['id']}{path}").status == 404
    assert server.ask("DELETE", f"/v1/jobs/{state['id']}").status == 404


def test_work_ends_when_its_job_is_removed(start: Any, clip: bytes) -> None:
    with start() as server:
        long = server.generate(**SLOW).json["id"]
        while server.get(f"/v1/jobs/{long}").json["status"] == "queued":
            time.sleep(0.01)
        server.ask("DELETE", f"/v1/jobs/{long}")
        begin = time.perf_counter()
        state = made(server, clip)
        assert state["timings"]["wait"] <= time.perf_counter() - begin
        assert b'mfmjt_jobs_total{status="cancelled"} 1.0' in server.get("/metrics").body


def test_work_ends_when_who_follows_it_goes_away(start: Any) -> None:
    with start(grace=0.1) as server:
        job = server.generate(**SLOW).json["id"]
        connection = http.client.HTTPConnection(server.host, server.port)
        connection.request("GET", f"/v1/jobs/{job}/events")
        answer = connection.getresponse()
        assert answer.read(5) == b"event"
        answer.close()
        connection.close()
        state = server.wait(job)
        assert state["status"] == "cancelled"
        assert "Nobody" in state["error"]


def test_a_full_queue_says_when_to_come_again(start: Any, clip: bytes) -> None:
    with start(queue=2) as server:
        first = [server.generate(**SLOW) for _ in range(2)]
        assert [answer.status for answer in first] == [202, 202]
        refused = server.generate(clip)
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        for answer in first:
            server.ask("DELETE", f"/v1/jobs/{answer.json['id']}")
        assert server.generate(clip).status == 202


def test_results_expire(start: Any, clip: bytes, tmp_path: Path) -> None:
    with start(keep=0.2, folder=tmp_path) as server:
        state = made(server, clip)
        time.sleep(0.3)
        assert server.get(f"/v1/jobs/{state['id']}").status == 404
        assert list(tmp_path.glob("*/job-*")) == []
    with start(kept=2, folder=tmp_path) as server:
        jobs = [made(server, prompt="x", duration=0.2)["id"] for _ in range(4)]
        answers = [server.get(f"/v1/jobs/{job}").status for job in jobs]
        assert answers == [404, 404, 200, 200]


def test_many_clients_at_once_are_answered(start: Any, clip: bytes) -> None:
    with start(workers=4) as server, ThreadPoolExecutor(8) as pool:
        states = list(pool.map(lambda seed: made(server, clip, seed=seed), range(12)))
        assert [state["sounds"][0]["seed"] for state in states] == list(range(12))
        assert b'mfmjt_requests_total{status="202"} 12.0' in server.get("/metrics").body


def test_jobs_that_wait_are_one_batch(start: Any, clip: bytes) -> None:
    with start() as server:
        slow = server.generate(**SLOW).json["id"]
        while server.get(f"/v1/jobs/{slow}").json["status"] == "queued":
            time.sleep(0.01)
        waiting = [server.generate(clip, seed=seed).json["id"] for seed in range(4)]
        assert server.get(f"/v1/jobs/{slow}").json["status"] == "running"
        server.ask("DELETE", f"/v1/jobs/{slow}")
        assert {server.wait(job)["status"] for job in waiting} == {"done"}
        until = time.monotonic() + 10  # figures come after the last job
        while b'jobs_total{status="done"} 4.0' not in server.get("/metrics").body:
            assert time.monotonic() < until
        figures = server.get("/metrics").body
        assert b"mfmjt_batch_jobs_count 2.0" in figures
        assert b"mfmjt_batch_jobs_sum 5.0" in figures


def test_an_error_of_the_model_is_told_and_the_server_goes_on(
    start: Any, pipe: Pipeline, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start() as server:
        with monkeypatch.context() as patch:
            patch.setattr(pipe.codec, "decode", lambda latent: latent.sum(-1) * float("nan"))
            job = server.generate(clip).json["id"]
            state = server.wait(job)
            assert state["status"] == "failed"
            assert "not finite" in state["error"]
            assert server.get(f"/v1/jobs/{job}/sounds/0.wav").status == 409
        made(server, clip)


def test_the_server_ends_while_it_works(start: Any, clip: bytes) -> None:
    def ask(server: Client) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # it is gone, or going
            server.generate(clip)

    with start() as server:
        server.generate(**SLOW)
        threading.Thread(target=ask, args=(server,), daemon=True).start()
    # `start` has seen that the thread ended and nothing was left.


# --- what is asked wrongly ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"guidance": "nan"}, "guidance"),
        ({"guidance": -1}, "guidance"),
        ({"guidance_mode": ["cfg", "cfg"]}, "twice"),
        ({"guidance_mode": "loud"}, "guidance_mode"),
        ({"count": 9}, "count"),
        ({"count": [1, 2]}, "twice"),
        ({"seed": -1}, "seed"),
        ({"seed": "9" * 400}, "seed"),
        ({"duration": 31}, "at most 30 s"),
        ({"duration": 0}, "duration"),
        ({"duration": 5}, "lasts 1.20 s"),
        ({"prompt": "x" * 2001}, "prompt"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt"),
        ({"negative_prompt": "x", "guidance": 1}, "guidance above 1"),
        ({"negative_prompt": "x", "guidance_mode": ["cfg", "none"]}, "guidance above 1"),
        ({"path": "/etc/passwd"}, "no such field"),
        ({"url": "http://127.0.0.1/"}, "no such field"),
    ],
)
def test_fields_that_cannot_be(
    server: Client, clip: bytes, fields: dict[str, Any], says: str
) -> None:
    answer = server.generate(clip, **fields)
    assert answer.status == 422
    assert says in answer.json["detail"]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{}", "application/json", 422),
        (b'{"prompt": "  "}', "application/json", 422),
        (b'{"prompt": 3}', "application/json", 422),
        (b'{"prompt": "x", "steps": "2"}', "application/json", 422),
        (b'{"prompt": "x", "video": "/etc/passwd"}', "application/json", 422),
        (b'{"prompt": "x", "guidance": NaN}', "application/json", 400),
        (b"[" * 60_000, "application/json", 400),
        (b"\xff", "application/json", 400),
        (b'{"prompt": "' + b"x" * 70_000 + b'"}', "application/json", 413),
        (b"{}", "text/plain", 415),
        (b"", "multipart/form-data", 400),
        (b"nothing", "multipart/form-data; boundary=x", 400),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=x", 400),
    ],
)
def test_bodies_that_cannot_be(server: Client, body: bytes, kind: str, status: int) -> None:
    answer = server.ask("POST", "/v1/generate", body, {"Content-Type": kind})
    assert answer.status == status, answer.body
    assert answer.json["detail"]


def test_a_form_without_a_file_but_with_a_prompt(server: Client) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nrain\r\n--x--\r\n'
    answer = server.ask(
        "POST", "/v1/generate", body, {"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert answer.status == 202, answer.body


def test_paths_that_are_not(server: Client, clip: bytes) -> None:
    state = made(server, clip)
    for path, status in (
        ("/v1/jobs/nobody", 404),
        (f"/v1/jobs/{state['id']}/sounds/1.wav", 404),
        (f"/v1/jobs/{state['id']}/sounds/0.exe", 422),
        (f"/v1/jobs/{state['id']}/sounds/..%2fupload", 404),
        ("/page/..%2f..%2fapi.py", 404),
        ("/page/%2e%2e/api.py", 404),
        ("/examples/..%2fa.mp4", 404),
        ("/docs", 404),
    ):
        answer = server.get(path)
        assert answer.status == status, path
        assert answer.json["detail"]
    assert server.get("/v1/generate").status == 405


def test_small_questions(server: Client, pipe: Pipeline) -> None:
    assert server.get("/healthz").json["status"] == "ok"
    (model,) = server.get("/v1/models").json["models"]
    assert (model["name"], model["device"]) == ("random", "cpu")
    assert model["sample_rate"] == pipe.codec.sample_rate
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    names = re.findall(rb'(?:href|src)="([^"#]+)"', page.body)
    assert names
    for name in names:
        assert server.get(urljoin("/", name.decode())).status == 200


def test_the_examples_are_drawn(server: Client, tmp_path: Path) -> None:
    answer = server.get("/examples/bell.mp4")
    assert answer.body == (Path(__file__).parents[2] / "examples" / "bell.mp4").read_bytes()
    assert server.get("/examples/cow.mp4").status == 404
