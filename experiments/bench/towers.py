"""The local branch's towers, identical in shape with weights of their own, computed in several ways.

Forward and gradient of the towers alone, as in a training step; the stem is left out.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import default
from experiments.bench.timing import ratio_of, time_in_turn
from jlml_jax.layers import BatchNorm, Conv
from jlml_jax.models import Tower


def bench_towers(height: int, width: int, batch_size: int, dtype: str, repeats: int) -> dict:
    """Seconds of a step, of compilation, and how many times as fast as each other way `separate` is."""
    config = default.get_config().model
    strips = config.num_strips
    shape = batch_size, height // 2 // strips, -(-width // 4), config.stem_features

    def tower(native):
        return Tower(config.local_widths, config.depth, functools.partial(Conv, native=native, dtype=dtype),
                     functools.partial(BatchNorm, axis_name=None, dtype=dtype))

    here = tower(native=jax.default_backend() != "cpu")
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.standard_normal((strips, *shape), np.float32), dtype)
    variables = [here.init(jax.random.key(strip), inputs[strip], train=True) for strip in range(strips)]

    def outputs(module, variables, x):
        return module.apply(variables, x, train=True, mutable=["batch_stats"])

    def separate(variables, inputs):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves),
                            *(outputs(here, *pair) for pair in zip(variables, inputs, strict=True)))

    def stacked(function):
        return lambda variables, inputs: function(jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables), inputs)

    ways = {
        "separate": separate,
        # One program for all towers, which run one after another.
        "scan": stacked(lambda variables, inputs: jax.lax.map(lambda pair: outputs(here, *pair), (variables, inputs))),
        # Convolutions of several towers at once become grouped ones.
        "vmap": stacked(jax.vmap(functools.partial(outputs, tower(native=True)))),
        # 1x1 convolutions, too, become batched matrix products.
        "vmap of products": stacked(jax.vmap(functools.partial(outputs, tower(native=False)))),
    }

    def compiled(way):
        def loss(params: Any, stats: Any, inputs: jax.Array) -> Any:
            variables = [{"params": one, "batch_stats": other} for one, other in zip(params, stats, strict=True)]
            pooled, updates = way(variables, inputs)
            return jnp.sum(jnp.square(pooled)), (pooled, updates)

        start = time.perf_counter()
        split = [one["params"] for one in variables], [one["batch_stats"] for one in variables]
        step = jax.jit(jax.grad(loss, argnums=(0, 2), has_aux=True)).lower(*split, inputs).compile()
        return functools.partial(step, *split, inputs), time.perf_counter() - start

    steps = {name: compiled(way) for name, way in ways.items()}
    reference = steps["separate"][0]()[1][0]
    for name, (step, _) in steps.items():
        difference = jnp.linalg.norm(step()[1][0] - reference) / jnp.linalg.norm(reference)
        assert difference < (1e-3 if dtype == "float32" else 0.1), f"{name} is not the same work: {difference:.2g}"
    seconds = time_in_turn({name: lambda step=step: jax.block_until_ready(step()) for name, (step, _) in steps.items()},
                           repeats)
    return {
        "height": height, "width": width, "batch_size": batch_size, "dtype": dtype, "repeats": repeats,
        "device": jax.devices()[0].device_kind,
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "compile_seconds": {name: compile_seconds for name, (_, compile_seconds) in steps.items()},
        "separate_over": {name: ratio_of(values, seconds["separate"]) for name, values in seconds.items()
                          if name != "separate"},
    }
