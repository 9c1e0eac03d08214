"""How long runs would take on this machine, from a few measured steps."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from jlml_jax import evaluate, models, optim, parallel, protocols, sampling, train, train_step
from jlml_jax.device_data import DeviceData

_WARM_UP, _MEASURED = 2, 6  # steps


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds, for one trial of a run, and how many trials there are."""

    compilation: float
    step: float
    evaluation: float  # features alone; ranking and decoding are not counted
    trials: int

    def run(self, steps: int, compiled: bool) -> float:
        """Of a run of so many steps a trial, evaluated; `compiled`: by an earlier run, of another seed."""
        return self.trials * ((0 if compiled else self.compilation) + steps * self.step + self.evaluation)


def estimate(config: ml_collections.ConfigDict) -> Estimate:
    """Compiles the step and the evaluation of a run, and times a few of either on black images.

    The compilation cache is left out: it is a row's first run that is estimated.
    """
    mesh = parallel.make_mesh()
    parallel.check_batch_size(config.train.batch_size, mesh, "train.batch_size")
    parallel.check_batch_size(config.evaluate.batch_size, mesh, "evaluate.batch_size")
    protocol = protocols.load(config.data.name, config.data)
    numbers = protocol.numbers(config.data.trials)
    trial = protocol.trial(numbers[0])
    model = models.build_model(config, len(trial.identities()))
    optimizer = optim.make_optimizer(config.optim, config.train.steps)

    started = time.perf_counter()
    from_device_data = train.choose_loader(config, trial.train, mesh) == "device"
    step = train_step.make_train_step(config, model, optimizer, mesh, from_device_data)
    state = train_step.init_state(config, model, optimizer, mesh)
    seed = parallel.replicate(np.uint32(config.seed), mesh)
    size = config.data.height, config.data.width
    labels, cameras = trial.labels(), trial.camera_one_hot() if config.train.norm_by_camera else None
    images = _black(len(labels) if from_device_data else config.train.batch_size, *trial.train.training_size(*size))
    groups = sampling.identity_groups(labels, config.train.images_per_identity)
    if from_device_data:
        batch = parallel.replicate(DeviceData(images, labels.astype(np.int32), groups, cameras), mesh)
    else:
        rows = np.arange(config.train.batch_size) % len(labels)
        batch = parallel.shard_batch(
            (images, labels[rows].astype(np.int32), None if cameras is None else cameras[rows]), mesh)
    state, _ = jax.block_until_ready(step(state, batch, seed))
    compilation = time.perf_counter() - started

    def one_step():
        nonlocal state
        state, metrics = step(state, batch, seed)
        return metrics

    seconds_a_step = _median_seconds(one_step)

    forward = evaluate.make_forward(model, config, mesh)
    images = parallel.shard_batch(_black(config.evaluate.batch_size, *size), mesh)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    started = time.perf_counter()
    jax.block_until_ready(forward(variables, images))
    compilation += time.perf_counter() - started
    tested = sum(len(split) for split in (trial.query, trial.gallery, trial.multi_query) if split is not None)
    batches = -(-tested // config.evaluate.batch_size)
    jax.clear_caches()
    return Estimate(compilation, seconds_a_step, batches * _median_seconds(lambda: forward(variables, images)),
                    len(numbers))


def _black(number: int, height: int, width: int) -> np.ndarray:
    return np.zeros((number, height, width, 3), np.uint8)


def _median_seconds(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(_WARM_UP + _MEASURED):
        started = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[_WARM_UP:]))
