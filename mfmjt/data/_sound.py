"""Sound from physics: struck bodies as decaying modes, the rest as shaped noise. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SAMPLE_RATE", "Body", "leveled", "mix_strikes", "shaped_noise", "smooth_random"]

SAMPLE_RATE = 16_000
"""Samples per second of every clip (Hz)."""

Array = NDArray[np.floating[Any]]


class Body:
    """A struck body: modes with their own frequency, decay and gain, and a noisy contact.

    Args:
        rng: Draws the phases and the contact noise, so two bodies never sound the same.
        frequencies: Mode frequencies in Hz; those above 7.6 kHz are left out.
        decays: Time for each mode to fall by 60 dB, in seconds.
        gains: Linear gain of each mode.
        contact: Gain of the contact noise against the modes.
        contact_seconds: Time constant of the contact noise.
        glide: Relative pitch rise at the impact (drums, soft bodies), decaying in 30 ms.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        frequencies: Sequence[float] | NDArray[np.float64],
        decays: Sequence[float] | NDArray[np.float64],
        gains: Sequence[float] | NDArray[np.float64],
        contact: float,
        contact_seconds: float,
        glide: float = 0.0,
    ) -> None:
        f, d, g = (np.asarray(v, dtype=np.float64) for v in (frequencies, decays, gains))
        heard = f < 7600.0
        f, d, g = f[heard], d[heard], g[heard]
        length = int(SAMPLE_RATE * min(3.0, float(d.max()) + 0.02))
        t = np.arange(length) / SAMPLE_RATE
        stretched = t + glide * 0.03 * (1.0 - np.exp(-t / 0.03))
        phase = rng.uniform(0.0, 0.5, size=f.shape)
        modes = np.sin(2 * np.pi * (f[:, None] * stretched + phase[:, None]))
        modes *= np.exp(-6.9078 * t / d[:, None]) * g[:, None]
        # Half a millisecond of attack: no body starts with a step.
        modes *= np.minimum(1.0, t / 5e-4)
        self.modes = modes.astype(np.float32)
        self.brightness = f / f.min()
        self.contact = contact
        self.contact_seconds = contact_seconds
        peak = float(np.abs(self.modes.sum(0)).max())
        self.modes /= max(peak, 1e-6)

    def strike(self, rng: np.random.Generator, velocity: float) -> Array:
        """Make an impact; harder ones are louder and brighter. `velocity` in (0, 1] is relative."""
        tilt = self.brightness ** (0.5 * (velocity - 1.0))
        place = rng.uniform(0.75, 1.0, size=tilt.shape)
        sound = (tilt * place).astype(np.float32) @ self.modes
        n = int(SAMPLE_RATE * 6 * self.contact_seconds)
        click = rng.standard_normal(n).astype(np.float32)
        click *= np.exp(-np.arange(n, dtype=np.float32) / (SAMPLE_RATE * self.contact_seconds))
        m = min(n, sound.size)
        sound[:m] += self.contact * click[:m]
        return (sound * velocity**1.2).astype(np.float32)


def mix_strikes(
    rng: np.random.Generator,
    duration: float,
    times: Sequence[float] | Array,
    velocities: Sequence[float] | Array,
    bodies: Sequence[Body],
) -> Array:
    """Place one strike per time on a silent track; bodies take turns. Returns `(samples,)`."""
    samples = round(duration * SAMPLE_RATE)
    track = np.zeros(samples, dtype=np.float32)
    for i, (time, velocity) in enumerate(zip(times, velocities, strict=True)):
        start = round(float(time) * SAMPLE_RATE)
        sound = bodies[i % len(bodies)].strike(rng, float(velocity))[: samples - start]
        track[start : start + sound.size] += sound
    return track


def leveled(rng: np.random.Generator, audio: Array) -> NDArray[np.float32]:
    """Bring a clip to a random level, its peak 1 to 10 dB below full scale, above faint noise."""
    peak = float(np.abs(audio).max())
    audio = audio * (0.9 * 10.0 ** (-rng.uniform(0.0, 9.0) / 20.0) / max(peak, 1e-6))
    audio = audio + 10.0 ** (-rng.uniform(62.0, 75.0) / 20.0) * rng.standard_normal(audio.size)
    return audio.astype(np.float32)


def shaped_noise(
    rng: np.random.Generator, samples: int, low: float, high: float, slope: float = 0.0
) -> Array:
    """Unit-variance noise with the spectrum f**slope between two soft edges in Hz, `(samples,)`."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    f = np.maximum(np.fft.rfftfreq(samples, 1.0 / SAMPLE_RATE), 1.0)
    gain = (f / 1000.0) ** slope / np.sqrt((1 + (low / f) ** 6) * (1 + (f / high) ** 6))
    noise = np.fft.irfft(spectrum * gain, samples)
    return (noise / (noise.std() + 1e-9)).astype(np.float32)


def smooth_random(
    rng: np.random.Generator, duration: float, low: float, high: float, knots_per_second: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Knots (times in s, values) of a slowly wandering quantity, to be read with `np.interp`."""
    n = max(2, int(duration * knots_per_second) + 2)
    return np.linspace(0.0, duration, n), rng.uniform(low, high, n)
