from __future__ import annotations

import time

import torch

from bench.clock import MIN_CALLS, on_cpu, take_turns
from bench.machine import Ceilings, environment, peak_mib
from bench.rows import Rows

CPU = torch.device("cpu")


def test_providers_take_turns_and_are_told_apart():
    calls = []

    def sleeper(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)

        return on_cpu(call)

    timings = take_turns({"short": sleeper("short", 0.001), "long": sleeper("long", 0.01)}, 0.0)
    assert calls[:6] == ["short", "long", "long", "short", "short", "long"]
    short, long = timings["short"], timings["long"]
    assert short.n == long.n == MIN_CALLS
    # A sleep lasts at least as long as asked, and asks no CPU time.
    assert short.ms_p20 >= 1
    assert long.ms_p20 >= 10
    assert short.ms_p20 <= short.ms_p50 <= short.ms_p80
    assert long.cpu_ms_p80 < long.ms_p20


def test_quantiles_are_those_of_the_samples():
    samples = iter([(5.0, 50.0), (1.0, 10.0), (4.0, 40.0), (2.0, 20.0), (3.0, 30.0)])
    timing = take_turns({"a": lambda: next(samples)}, 0.0)["a"]
    assert (timing.ms_p50, timing.cpu_ms_p50, timing.n) == (3.0, 30.0, 5)
    assert 1 < timing.ms_p20 < 2 < 4 < timing.ms_p80 < 5
    assert timing.cpu_ms_p80 == 10 * timing.ms_p80


def test_time_is_spent_as_told():
    start = time.monotonic()
    timing = take_turns({"a": on_cpu(lambda: time.sleep(0.001))}, 0.1)["a"]
    assert time.monotonic() - start >= 0.1
    assert timing.n > MIN_CALLS
    assert take_turns({}, 1.0) == {}


def test_rows_are_kept_and_found(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = Rows(path, ("op", "mode"))
    timing = take_turns({"a": on_cpu(lambda: None)}, 0.0)["a"]
    rows.add({"op": "linear", "mode": "jvp", "rate": 1 / 3, "of": [2 / 3, "a"]}, timing)
    again = Rows(path, ("op", "mode"))
    assert again.has(op="linear", mode="jvp", provider="another")
    assert not again.has(op="linear", mode="value")
    assert again.rows[0]["n"] == MIN_CALLS
    assert (again.rows[0]["rate"], again.rows[0]["of"]) == (0.33333, [0.66667, "a"])
    assert again.rows == rows.rows


def test_environment_says_where():
    stamp = environment(CPU)
    assert stamp["torch"] == str(torch.__version__)
    assert stamp["cores"] >= 1
    assert stamp["cpu"]
    assert "gpu" not in stamp
    assert peak_mib(lambda: None, CPU) is None


def test_ceilings_are_measured():
    ceilings = Ceilings.measure(CPU, (torch.float32,), tiny=True)
    assert ceilings.copy_gbps > 0
    assert ceilings.gemm_tflops.keys() == {"float32"}
    assert ceilings.gemm_tflops["float32"] > 0
