"""Metrics of the server in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters, in a registry of their own, so that two servers can share a process.

    Args:
        busy: Gives the number of requests that are being read, waiting or running.
        kept: Gives the number of jobs, finished ones included.
    """

    def __init__(self, busy: Callable[[], int], kept: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "mfmjt_requests", "Answers to POST /v1/generate.", ["status"], registry=self._registry
        )
        self.jobs = Counter("mfmjt_jobs", "Jobs that ended.", ["status"], registry=self._registry)
        self.sounds = Counter(
            "mfmjt_sound_seconds", "Seconds of sound made.", registry=self._registry
        )
        self.batch = Histogram(
            "mfmjt_batch_jobs",
            "Jobs worked at together.",
            buckets=(1, 2, 4, 8, 16),
            registry=self._registry,
        )
        self.stages = Histogram(
            "mfmjt_stage_seconds",
            "Seconds that jobs spent in a stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        for name, text, function in (
            ("mfmjt_busy", "Requests that are read, wait or are worked at.", busy),
            ("mfmjt_jobs_kept", "Jobs whose state can be asked.", kept),
        ):
            Gauge(name, text, registry=self._registry).set_function(function)

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self._registry)
