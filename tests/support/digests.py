"""Stored digests: what was computed to the last bit before a change is so after it.

The last bits depend on processor, libraries and the C++ kernels, so a digest belongs to one kind of
machine. They are kept beside the test module, in `test_name.digests.json`, and written by
`pytest --record-digests tests/folder/test_name.py` (without `-n`), before the change. A test asks
for the fixture `digests`, of which `tests/conftest.py` knows by `pytest_plugins`, and calls
`digests.check("a name", tensor, ...)`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfmjt.files import atomic_path
from mfmjt.kernels import _native

CPU_INFO = Path("/proc/cpuinfo")
MODEL = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")  # x86, then Arm


@functools.cache
def machine() -> str:
    """Name all that the last bits of a float may depend on, given one thread."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    fields = dict(map(str.strip, line.split(":", 1)) for line in reversed(lines) if ":" in line)
    cpu = " ".join(fields[name] for name in MODEL if name in fields) or platform.machine()
    kernels = _native.status().get("used", "none")
    code = torch.backends.cpu.get_cpu_capability()
    return f"{cpu}, {code}, C++ kernels {kernels}, torch {torch.__version__}"


def digest(*parts: Tensor | bytes | str) -> str:
    """Digest of tensors (dtype, shape and bits, on any device), bytes and texts, in this order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            head = f"{part.dtype} {list(part.shape)}"
            bits = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        else:
            head, bits = type(part).__name__, part.encode() if isinstance(part, str) else part
        total.update(f"{head} {len(bits)} ".encode() + bits)
    return total.hexdigest()[:32]


class Digests:
    """The digests of one test module, on this kind of machine.

    Args:
        path: The JSON file: machine -> name -> digest.
        record: Whether `check` stores what it is given.
    """

    def __init__(self, path: Path, record: bool) -> None:
        self.path, self.record = path, record
        self.stored = json.loads(path.read_text()) if path.exists() else {}

    def check(self, name: str, *parts: Tensor | bytes | str) -> None:
        """Compare with the digest stored under `name`, which is unique in the module.

        The test is skipped on a kind of machine that has no digests in this file.
        """
        now, here = digest(*parts), self.stored.get(machine())
        module = os.path.relpath(self.path).replace(".digests.json", ".py")
        again = f"pytest --record-digests {module}"
        if self.record:
            self.stored.setdefault(machine(), {})[name] = now
            with atomic_path(self.path) as file:
                file.write_text(json.dumps(self.stored, indent=1, sort_keys=True) + "\n")
        elif here is None:
            pytest.skip(f"no digests for {machine()}; record them before a change: {again}")
        else:
            assert here.get(name) == now, f"{name} is not what it was; if that is meant: {again}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-digests", action="store_true", help="store digests instead of comparing them"
    )


@pytest.fixture
def digests(request: pytest.FixtureRequest) -> Iterator[Digests]:
    """Stored digests of this test module; the test runs on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    path = request.path.with_suffix(".digests.json")
    yield Digests(path, request.config.getoption("--record-digests"))
    torch.set_num_threads(threads)
