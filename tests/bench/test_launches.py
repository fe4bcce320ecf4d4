from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_a_step_of_small_16k_takes_few_launches():
    command = [sys.executable, "-m", "bench.launches", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(done.stdout)
    launches = counted["launches"]
    assert launches["mfmjt"] <= counted["bar"] < launches["mfmjt_eager"] < launches["eager"]
    assert counted["by_kernel"]["triton::_attention_fwd_kernel"] == 12
