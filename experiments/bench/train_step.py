"""The train step against the same network in PyTorch and, on a CPU, of plain nn.Conv, nn.BatchNorm and nn.max_pool.

The same weights and the same loss, in turn, so that a noisy machine slows all alike: step by step on a CPU; elsewhere
several steps at a time, as `main` gives them to the device, PyTorch waited for at the end of as many.
"""

import functools
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from experiments.bench import floor, torch_peer
from experiments.bench.timing import NUM_IDENTITIES, bare_step, ratio_of, time_in_turn
from jlml_jax import models, optim, parallel, train_step
from jlml_jax.device_data import DeviceData


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
    """Likewise for `layers.BatchNorm` without cameras."""

    axis_name: str | None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train, cameras=None):
        assert cameras is None
        norm = nn.BatchNorm(not train, momentum=self.momentum, epsilon=self.epsilon, dtype=self.dtype,
                            axis_name=self.axis_name)
        nn.share_scope(self, norm)
        return norm(x)


def bench_train(height: int, width: int, batch_size: int, dtype: str, repeats: int) -> dict:
    """Images a second of our step, of PyTorch's ways and of plain Flax layers, ratios, pair by pair, and the floor.

    Every batch is the same `batch_size` images in another order, and nothing is random, so that all ways have the same
    loss in their first step.
    """
    config = default.get_config()
    config.data.height, config.data.width = height, width
    config.train.batch_size, config.train.dtype, config.augment.flip = batch_size, dtype, False
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, height, width, 3), np.uint8)
    labels = rng.integers(0, NUM_IDENTITIES, batch_size, np.int32)
    ours = models.build_model(config, NUM_IDENTITIES)
    on_cpu = jax.default_backend() == "cpu"
    num_steps = train_step.most_steps_per_dispatch()
    compile_seconds, ways = {}, {}
    ways["ours"], compile_seconds["ours"] = bare_step(config, images, labels, num_steps)
    if on_cpu:  # elsewhere of our layers BN alone is another one
        with mock.patch.multiple(models, Conv=PlainConv, BatchNorm=PlainBatchNorm):
            ways["plain"], compile_seconds["plain"] = bare_step(config, images, labels, num_steps, native=True)

    mesh = parallel.make_mesh(jax.devices()[:1])
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    work = floor.count_work(
        train_step.make_train_step(config, ours.clone(native=True), optimizer, mesh, from_device_data=True).__wrapped__,
        train_step.init_state(config, ours, optimizer, mesh), DeviceData(images, labels), np.uint32(config.seed))
    variables = models.init_variables(ours, config.seed, height, width)
    ways |= {name: functools.partial(trainer.steps, num_steps) for name, trainer in
             torch_peer.trainers(ours, variables, images, labels, config).items()}
    losses = {name: way() for name, way in ways.items()}
    for name, loss in losses.items():  # it is the same work
        np.testing.assert_allclose(loss, losses["ours"], rtol=1e-4 if dtype == "float32" else 2e-2, err_msg=name)
    seconds = {name: [value / num_steps for value in values] for name, values in time_in_turn(ways, repeats).items()}
    best = min((name for name in seconds if name.startswith("torch")), key=lambda name: np.median(seconds[name]))
    return {
        "height": height, "width": width, "batch_size": batch_size, "dtype": dtype, "repeats": repeats,
        "steps_at_once": num_steps,
        "seconds_a_step": {name: float(np.median(values)) for name, values in seconds.items()},
        "images_per_second": {name: float(batch_size / np.median(values)) for name, values in seconds.items()},
        "compile_seconds": compile_seconds, "first_loss": losses,
        **({"over_plain": ratio_of(seconds["plain"], seconds["ours"])} if on_cpu else {}),
        "best_of_torch": best, "over_torch": ratio_of(seconds[best], seconds["ours"]),
        "floor": floor.floor_of(work, dtype, float(np.median(seconds["ours"]))),
    }
