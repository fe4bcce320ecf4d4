from __future__ import annotations

import time

import torch

from bench.harness import MIN_CALLS, Rows, environment, measure, peak_mib

CPU = torch.device("cpu")


def test_providers_take_turns_and_are_told_apart():
    calls = []

    def sleeper(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)

        return call

    timings = measure({"short": sleeper("short", 0.001), "long": sleeper("long", 0.01)}, CPU, 0.0)
    assert calls[:6] == ["short", "long", "short", "long", "long", "short"]
    short, long = timings["short"], timings["long"]
    assert short.n == long.n == MIN_CALLS
    # A sleep lasts at least as long as asked, and asks no CPU time.
    assert short.ms_p20 >= 1
    assert long.ms_p20 >= 10
    assert short.ms_p20 <= short.ms_p50 <= short.ms_p80
    assert long.cpu_ms_p50 < long.ms_p50


def test_rows_are_kept_and_found(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = Rows(path, ("op", "mode"))
    (timing,) = measure({"a": lambda: None}, CPU, 0.0).values()
    rows.add(timing, op="linear", mode="jvp", provider="a")
    again = Rows(path, ("op", "mode"))
    assert again.has(op="linear", mode="jvp", provider="another")
    assert not again.has(op="linear", mode="value")
    assert again.rows[0]["n"] == MIN_CALLS
    assert again.rows == rows.rows


def test_environment_says_where():
    stamp = environment(CPU)
    assert stamp["torch"] == str(torch.__version__)
    assert stamp["cores"] >= 1
    assert stamp["cpu"]
    assert "gpu" not in stamp
    assert peak_mib(lambda: None, CPU) is None
