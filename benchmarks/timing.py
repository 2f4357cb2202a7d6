"""Timing as a ratio: methods take turns in one run, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Timing", "interleave"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one method: the median of the samples and the bounds of their middle half."""

    median: float
    low: float
    high: float
    samples: int


def interleave(
    steps: Mapping[str, Callable[[], object]], seconds: float, *, rounds: int = 10, device: str = "cpu"
) -> dict[str, Timing]:
    """Time every step, in turns, for about ``seconds`` in all and at least ``rounds`` rounds.

    Each sample follows an untimed step of the same method, so that caches hold what it would find in training's
    best case ("hot"); on an accelerator it is synchronised before and after.
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    synchronize: Callable[[], object] = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    end, done = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or done < rounds:
        for name, step in steps.items():
            step()
            synchronize()
            begin = time.perf_counter()
            step()
            synchronize()
            samples[name].append(time.perf_counter() - begin)
        done += 1
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high, len(values))
