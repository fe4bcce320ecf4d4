"""Measure a served nano: under load, under faults, and the page in a browser.

Each starts `mfmjt serve` on a free port with a folder of its own for temporary files, asks it over
loopback, ends it, and writes one JSON file.

Examples:
  python -m bench serve load
  python -m bench serve faults --out output/bench
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch

from bench import ROOT, parser
from bench.machine import environment
from bench.rows import Row, write_json
from tests.serve.client import Answer, Client
from tests.serve.hostile import crafted, mutated

__all__ = ["main"]

T = TypeVar("T")

EXAMPLES = ROOT / "examples"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-quic", "--disable-component-update", "--disable-sync"]
FLAGS += ["--autoplay-policy=no-user-gesture-required"]


@dataclass
class Served:
    """A server that runs: how to ask it, and where its process and files are."""

    client: Client
    pid: int
    folder: Path

    @property
    def memory(self) -> float:
        """The megabytes that the process holds."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found
        return round(int(found[1]) / 1024, 1)

    @property
    def files(self) -> int:
        """How many temporary files and folders are not the run's own."""
        return len(list(self.folder.glob("*/*"))) - 1

    def sounds(self, answer: Answer) -> list[bytes]:
        """Wait for what was asked for, download it and delete it; nothing where it was refused."""
        if answer.status != 202:
            return []
        job = f"/v1/jobs/{answer.json['id']}"
        state = self.client.wait(answer.json["id"])
        found = [self.client.get(f"{job}/sounds/{s['number']}.wav") for s in state["sounds"]]
        self.client.ask("DELETE", job)
        return [sound.body if sound.status == 200 else b"" for sound in found]

    def in_parts(
        self, one: Callable[[Any], T], requests: Sequence[Any], at_once: int
    ) -> tuple[list[T], list[float]]:
        """Ask all requests in four parts; return the answers, and the memory after each part."""
        answers: list[T] = []
        memory, part = [], len(requests) // 4
        with ThreadPoolExecutor(at_once) as pool:
            for start in range(0, len(requests), part):
                answers += pool.map(one, requests[start : start + part])
                memory.append(self.memory)
        return answers, memory


@contextlib.contextmanager
def served(*options: str) -> Iterator[Served]:
    """Run `mfmjt serve` with these options."""
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "mfmjt.cli", "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": folder},
        )
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()[-1]
            client = Client(address)
            client.get("/healthz")
            yield Served(client, process.pid, Path(folder))
        finally:
            process.terminate()
            process.wait(30)
            process.stdout.close()
        left = [path.name for path in Path(folder).glob("mfmjt-serve-*")]
        if process.returncode != 128 + signal.SIGTERM or left:
            raise RuntimeError(f"the server ended with {process.returncode} and left {left}")


CLIPS = [path.read_bytes() for path in sorted(EXAMPLES.glob("*.mp4"))]
GOOD: list[tuple[bool, dict[str, Any]]] = [
    (True, {}),
    (True, {"prompt": "a bell", "count": 2}),
    (False, {"prompt": "rain on a tin roof", "duration": 4}),
    (True, {"duration": 3, "steps": 2}),
]
"""Whether a video is sent, and the fields."""
BROKEN: list[tuple[bytes | None, dict[str, Any]]] = [
    (CLIPS[0][:3000], {}),
    (b"no video" * 1000, {}),
    (CLIPS[0], {"steps": 0}),
    (None, {"prompt": ""}),
    (None, {}),
]


def load(out: Path) -> None:
    """Ask 200 mixed requests, 8 at a time, every tenth broken; then 1 client against 8."""
    with served() as server:

        def one(i: int) -> tuple[bool, bool, float]:
            """Return whether the request was broken and its answer is right, and the seconds."""
            begin = time.perf_counter()
            if i % 10 == 9:
                video, fields = BROKEN[(i // 10) % len(BROKEN)]
                answer = server.client.generate(video, **fields)
                right = 400 <= answer.status < 500 and bool(answer.json["detail"])
                return True, right, time.perf_counter() - begin
            wants_video, fields = GOOD[i % len(GOOD)]
            video = CLIPS[i % 3] if wants_video else None
            sounds = server.sounds(server.client.generate(video, seed=i, **fields))
            right = bool(sounds) and all(sound[:4] == b"RIFF" for sound in sounds)
            return False, right, time.perf_counter() - begin

        begin = time.perf_counter()
        answers, memory = server.in_parts(one, range(200), 8)
        spent, files = time.perf_counter() - begin, server.files

        def ask(i: int) -> None:
            server.sounds(server.client.generate(CLIPS[i % 3], seed=i))

        def pace(clients: int, requests: int) -> float:
            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(ask, range(requests)))
            return requests / (time.perf_counter() - start)

        pace(8, 8)
        paces: dict[int, list[float]] = {1: [], 8: []}
        for _ in range(2):  # in turns: a machine that slows down slows both
            for clients in paces:
                paces[clients].append(pace(clients, 16))
        memory.append(server.memory)
    taken = [seconds for bad, _, seconds in answers if not bad]
    refused = [seconds for bad, _, seconds in answers if bad]
    write(
        out / "serve-load.json",
        {
            "requests": len(answers),
            "at_once": 8,
            "broken": len(refused),
            "wrongly_answered": sum(not right for _, right, _ in answers),
            "seconds": round(spent, 2),
            "good_seconds": spread(taken),
            "broken_seconds": spread(refused),
            "memory_mb_after_each_50_and_at_the_end": memory,
            "files_left": files,
            "requests_per_second": {
                str(clients): middle(found) for clients, found in paces.items()
            },
            "eight_clients_over_one": round(
                statistics.median(paces[8]) / statistics.median(paces[1]), 2
            ),
        },
    )


def faults(out: Path, count: int = 500) -> None:
    """Upload hostile files, 4 at a time: what was answered, how soon, and what was left."""
    rng = random.Random(0)
    with served() as server, socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.1)
        files = list(crafted(trap.getsockname()[1]).items())
        made = len(files)
        files += [mutated(rng.choice(CLIPS), rng) for _ in range(count - made)]

        def one(file: tuple[str, bytes]) -> tuple[str, int, float]:
            name, data = file
            answer = server.client.generate(data)
            server.sounds(answer)
            if answer.status != 202 and not answer.json["detail"]:
                raise RuntimeError(f"{name}: refused without a reason")
            return name, answer.status, answer.seconds

        memory = [server.memory]
        answers, later = server.in_parts(one, files, 4)
        memory += later
        knocked = True
        try:
            trap.accept()[0].close()
        except TimeoutError:
            knocked = False
        alive = server.client.generate(CLIPS[0]).status == 202
        while server.client.get("/healthz").json["busy"]:
            time.sleep(0.05)
        left = server.files - 1  # of the request just made
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    refused = [seconds for _, status, seconds in answers if status != 202]
    slowest = max(answers, key=lambda answer: answer[2])
    write(
        out / "serve-faults.json",
        {
            "uploads": len(answers),
            "made_to_do_harm": made,
            "damaged_clips": len(answers) - made,
            "answers": dict(sorted(Counter(str(status) for _, status, _ in answers).items())),
            "refused_seconds": spread(refused),
            "slowest_answer": {"upload": slowest[0], "seconds": round(slowest[2], 3)},
            "memory_mb": memory,
            "an_address_was_opened": knocked,
            "alive_afterwards": alive,
            "files_left": left,
            "processes_left": len(children),
        },
    )


def page(out: Path) -> None:
    """Time the page until it is ready and, after a drop, the first sound (Chromium, Playwright)."""
    from playwright.sync_api import sync_playwright

    clip = (EXAMPLES / "ball_wood.mp4").read_bytes()
    ready, heard = [], []
    with served() as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        tab = browser.new_page()
        for _ in range(6):
            begin = time.perf_counter()
            tab.goto(f"http://{server.client.host}:{server.client.port}/")
            tab.wait_for_selector("body[data-ready]")
            ready.append(round(time.perf_counter() - begin, 3))
            begin = time.perf_counter()
            tab.evaluate(
                """(bytes) => {
                    const data = new DataTransfer();
                    data.items.add(new File([new Uint8Array(bytes)], "clip.mp4"));
                    document.body.dispatchEvent(
                        new DragEvent("drop", { dataTransfer: data, bubbles: true }),
                    );
                }""",
                list(clip),
            )
            tab.wait_for_selector("#result:not([hidden])")
            tab.click("#play")
            while not tab.inner_text("#clock") > "0.0 /":
                time.sleep(0.01)
            heard.append(round(time.perf_counter() - begin, 3))
        version = browser.version
        browser.close()
    write(
        out / "serve-page.json",
        {
            "browser": f"Chromium {version}, headless, on the same cores",
            "ready_seconds": {"first": ready[0], "warm_median": middle(ready[1:])},
            "first_sound_seconds": {"first": heard[0], "warm_median": middle(heard[1:])},
            "all_ready_seconds": ready,
            "all_first_sound_seconds": heard,
        },
    )


def middle(values: list[float]) -> float:
    """Return the median, to milliseconds."""
    return round(statistics.median(values), 3)


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the largest value, to milliseconds."""
    return {"median": middle(values), "largest": round(max(values), 3)}


def write(path: Path, figures: Row) -> None:
    """Print figures and write them with where they were taken."""
    where = environment(torch.device("cpu")) | {"load_at_the_end": round(os.getloadavg()[0], 1)}
    write_json(path, {"machine": where, **figures})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the measurements."""
    usage = parser("serve", __doc__, out="bench/results/serve")
    ways = {"load": load, "faults": faults, "page": page}
    usage.add_argument("what", choices=ways)
    given = usage.parse_args(argv)
    ways[given.what](given.out)
    return 0
