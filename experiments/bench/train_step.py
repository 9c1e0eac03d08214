"""The train step against the same network of plain nn.Conv, nn.BatchNorm and nn.max_pool.

The same weights and the same loss, step by step in turn, so that a noisy machine slows both alike.
"""

import contextlib
import time
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from experiments.bench.timing import ratio_of
from jlml_jax import models, optim, parallel, train_step
from jlml_jax.device_data import DeviceData

NUM_IDENTITIES = 751  # Market-1501's


class PlainConv(nn.Module):
    """What `layers.Conv` would be if written down without a thought of speed; the same parameters."""

    features: int
    kernel_size: int
    stride: int = 1
    native: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        pad = (self.kernel_size - 1) // 2
        conv = nn.Conv(self.features, (self.kernel_size,) * 2, self.stride, ((pad, pad), (pad, pad)), use_bias=False,
                       dtype=self.dtype)
        nn.share_scope(self, conv)
        return conv(x)


class PlainBatchNorm(nn.Module):
    """Likewise for `layers.BatchNorm`."""

    axis_name: str | None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(not train, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype,
                            axis_name=self.axis_name)
        nn.share_scope(self, norm)
        return norm(x)


def bench_train(height: int, width: int, batch_size: int, repeats: int) -> dict:
    """Seconds a train step, ours and plain, and their ratio, each the median over `repeats` pairs."""
    config = default.get_config()
    config.data.height, config.data.width, config.train.batch_size = height, width, batch_size
    mesh = parallel.make_mesh(jax.devices()[:1])
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    rng = np.random.default_rng(0)
    data = parallel.replicate(DeviceData(rng.integers(0, 256, (2 * batch_size, height, width, 3), np.uint8),
                                         rng.integers(0, NUM_IDENTITIES, 2 * batch_size, np.int32)), mesh)
    seed = parallel.replicate(np.uint32(config.seed), mesh)
    ours = models.build_model(config, NUM_IDENTITIES)
    plain = ours.clone(native=True)
    plain_layers = mock.patch.multiple(models, Conv=PlainConv, BatchNorm=PlainBatchNorm)
    steps, states, compile_seconds = {}, {}, {}
    for name, model, layers in (("ours", ours, contextlib.nullcontext()), ("plain", plain, plain_layers)):
        state = train_step.init_state(config, model, optimizer, mesh)
        start = time.perf_counter()
        with layers:
            step = train_step.make_train_step(config, model, optimizer, mesh, from_device_data=True)
            steps[name] = step.lower(state, data, seed).compile()
        compile_seconds[name] = time.perf_counter() - start
        states[name] = state
    seconds = {name: [] for name in steps}
    first = {}
    for _ in range(repeats + 1):  # the first pair warms up
        for name, step in steps.items():
            start = time.perf_counter()
            states[name], metrics = step(states[name], data, seed)
            metrics = jax.device_get(metrics)
            seconds[name].append(time.perf_counter() - start)
            first.setdefault(name, metrics)
    for term in first["plain"]:  # it is the same work, forward and backward
        np.testing.assert_allclose(first["ours"][term], first["plain"][term], rtol=1e-3, err_msg=term)
    seconds = {name: values[1:] for name, values in seconds.items()}
    return {
        "height": height, "width": width, "batch_size": batch_size, "repeats": repeats,
        "seconds_a_step": {name: float(np.median(values)) for name, values in seconds.items()},
        "images_per_second": {name: float(batch_size / np.median(values)) for name, values in seconds.items()},
        "compile_seconds": compile_seconds,
        "over_plain": ratio_of(seconds["plain"], seconds["ours"]),
    }
