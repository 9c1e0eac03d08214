"""Timing two ways to do the same work, in turn, so that a noisy machine slows both alike."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

NUM_IDENTITIES = 751  # that the networks measured tell apart: Market-1501's


def time_in_turn(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls of every way; one call of each before warms up and is not counted."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratio_of(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is, pair by pair: median and spread."""
    ratios = np.asarray(theirs) / np.asarray(ours)
    return {"median": float(np.median(ratios)), "minimum": float(ratios.min()), "maximum": float(ratios.max())}
