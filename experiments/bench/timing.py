"""Timing two ways to do the same work, in turn, so that a noisy machine slows both alike; our step as a way."""

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import ml_collections
import numpy as np

from jlml_jax import models, optim, parallel, train_step
from jlml_jax.device_data import DeviceData

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


def bare_step(config: ml_collections.ConfigDict, images: np.ndarray, labels: np.ndarray, num_steps: int,
              native: bool | None = None) -> tuple[Callable[[], float], float]:
    """Our train step on the first device, `num_steps` steps a call, each of a batch of `images` (uint8) that lie there.

    A call gives the loss of its first step, when all have ended. `native` as the network's, by default what suits the
    device. Also the seconds of compilation.
    """
    mesh = parallel.make_mesh(jax.devices()[:1])
    model = models.build_model(config, NUM_IDENTITIES)
    model = model if native is None else model.clone(native=native)
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    data, seed = parallel.replicate((DeviceData(images, labels), np.uint32(config.seed)), mesh)
    state = train_step.init_state(config, model, optimizer, mesh)
    start = time.perf_counter()
    step = train_step.make_train_step(config, model, optimizer, mesh, True, num_steps)
    step = step.lower(state, data, seed).compile()
    compile_seconds = time.perf_counter() - start

    def first_loss():
        nonlocal state
        state, metrics = step(state, data, seed)
        return float(np.ravel(metrics["loss"])[0])

    return first_loss, compile_seconds
