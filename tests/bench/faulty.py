"""A piece that measures three things, the second of which goes wrong in the way that it is told."""

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

from bench.gpu.job import Job
from bench.rows import KERNELS


class Lossy(Job):
    def synchronize(self) -> None:
        if (self.work / "lost").exists():
            (self.work / "lost").unlink()  # a new process has a new context
            self.lost = True
        if getattr(self, "lost", False):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


class Tainting(Exception):
    taints = True


def go_wrong(way: str, job: Job) -> None:
    if way == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if way == "hangs":
        time.sleep(600)
    if way == "loses":
        (job.work / "lost").touch()
    if way == "taints":
        raise Tainting("no graph")
    if way == "raises":
        raise ValueError("of no use\nand more")


name, out, work = sys.argv[1:]
seconds = float(sys.stdin.readline() or sys.exit(0))
job = Lossy(name, Path(out), Path(work), "cpu", True, time.monotonic() + seconds)
rows = job.rows(KERNELS)
faulthandler.enable()
for case in ("first", "second", "third"):
    about = {"op": name, "case": case}
    if not rows.has(**about):
        with job.trying(rows, about):
            if case == "second":
                go_wrong(name.split()[-1], job)
            job.synchronize()
            rows.add({**about, "status": "ok"})
job.facts["compiled"] = 0
job.note()
