"""One step of training: the state, its step function, and that function over the mesh."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from jlml_jax import augment, device_data, losses, parallel
from jlml_jax.checkpoints import SavedRun
from jlml_jax.device_data import DeviceData
from jlml_jax.errors import UserError
from jlml_jax.models import init_variables, is_identity_layer, join_frozen, split_frozen
from jlml_jax.parallel import BATCH_AXIS


@flax.struct.dataclass
class TrainState:
    """All that a step reads and writes; `step` counts the steps done."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


# A data set to draw from, or this device's images, labels, and cameras as `DeviceData` has them.
Batch = DeviceData | tuple[jax.Array, jax.Array, jax.Array | None]


def init_state(config: ml_collections.ConfigDict, model: nn.Module, optimizer: optax.GradientTransformation,
               mesh: Mesh, initial: SavedRun | None = None) -> TrainState:
    """The state before the first step, replicated over the mesh.

    Weights are those of `initial` if it is given: all but the identity layers, or with `config.keep_identity_layers`
    all. Frozen layers have no momentum.
    """
    variables = init_variables(model, config.seed, config.data.height, config.data.width)
    if initial:
        taken = {name: layer for name, layer in initial.variables["params"].items()
                 if config.keep_identity_layers or not is_identity_layer(name)}
        variables = {"params": variables["params"] | taken, "batch_stats": initial.variables["batch_stats"]}
    # SGD's momentum starts from zeros, and optax would place them one by one: seconds of every start.
    opt_state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype),
                             jax.eval_shape(optimizer.init, split_frozen(model, variables["params"])[0]))
    state = TrainState(np.zeros((), np.int32), variables["params"], variables["batch_stats"], opt_state)
    return parallel.replicate(state, mesh)


def train_step(state: TrainState, batch: Batch, seed: jax.Array | int, *, model: nn.Module,
               optimizer: optax.GradientTransformation, config: ml_collections.ConfigDict
               ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of one device, under the named axis "batch": the same under `shard_map` and under `pmap`.

    Gradient accumulation: with `config.train.accumulation_steps` k > 1 the batch is taken in k micro-batches, and
    gradients and metrics are their means. BN normalises each by its own statistics (over all devices), and updates the
    running ones k times.

    Nothing is differentiated by the parameters of frozen layers, so there is no backward pass through these.

    Returns the next state and the step's metrics (scalars), both the same on every device.
    """
    micro_batches = config.train.accumulation_steps
    model = model.clone(dtype=compute_dtype(config.train.dtype))
    if isinstance(batch, DeviceData):
        images, labels, cameras = device_data.draw(batch, seed, state.step, config.train.batch_size, BATCH_AXIS,
                                                   micro_batches)
    else:
        images, labels, cameras = batch
    trained, frozen = split_frozen(model, state.params)
    key = augment.step_key(seed, state.step)
    images = augment.augment(key, images, config.augment, config.data, BATCH_AXIS, micro_batches)

    def micro_batch_gradients(batch_stats, micro_batch):
        micro_images, micro_labels, micro_cameras = augment.normalise(micro_batch[0], config.data), *micro_batch[1:]

        def loss_of(trained):
            params = join_frozen(trained, frozen)
            outputs, updates = model.apply({"params": params, "batch_stats": batch_stats}, micro_images, train=True,
                                           cameras=micro_cameras, mutable=["batch_stats"])
            loss, terms = losses.jlml_loss(outputs, params, micro_labels, num_strips=config.model.num_strips,
                                           cosine_scale=config.model.cosine_scale, axis_name=BATCH_AXIS,
                                           **config.loss)
            return loss, (terms, updates["batch_stats"])

        gradients, (metrics, batch_stats) = jax.grad(loss_of, has_aux=True)(trained)
        return batch_stats, (gradients, metrics)

    batch_stats, means = _accumulate(micro_batch_gradients, state.batch_stats, (images, labels, cameras),
                                     micro_batches)
    gradients, metrics = jax.lax.pmean(means, BATCH_AXIS)
    metrics["gradient_norm"] = _norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, trained)
    params = join_frozen(optax.apply_updates(trained, updates), frozen)
    metrics["parameter_norm"] = _norm((params, batch_stats))  # finite if all that is saved and evaluated is
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


_LEAVES_AT_ONCE = 64  # a GPU's kernel takes only so many arrays


def _norm(tree: Any) -> jax.Array:
    """The l2 norm of all leaves together.

    Of a few long vectors: a sum a leaf, as `optax.tree.norm` has it, would be half of all kernels of a step, and XLA's
    CPU backend looks at every pair of them when it compiles or loads a program.
    """
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(tree)]
    groups = [jnp.concatenate(leaves[start:start + _LEAVES_AT_ONCE])
              for start in range(0, len(leaves), _LEAVES_AT_ONCE)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(group)) for group in groups))


def compute_dtype(name: str) -> jnp.dtype:
    """The type that `train.dtype` names, of convolutions and activations while training.

    Whatever it is, parameters, BN statistics, feature layers, logits, penalties and the optimizer are float32, and so
    is all inference: the features of an evaluation are those of `extract` and of an exported model.

    Raises:
        UserError: the name is unknown.
    """
    known = {"float32": jnp.float32, "bfloat16": jnp.bfloat16,
             "auto": jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16}
    if name not in known:
        raise UserError(f"train.dtype={name!r} is unknown; known are auto, float32, bfloat16")
    return known[name]


def _accumulate(function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any, micro_batches: int
                ) -> tuple[Any, Any]:
    """`function` (carry, micro-batch) -> (carry, values), over all micro-batches in order; the values' mean."""
    if micro_batches == 1:
        return function(carry, rows)
    rows = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), rows)

    def add(carry_and_sum, micro_batch):
        carry, values = function(carry_and_sum[0], micro_batch)
        return (carry, jax.tree.map(jnp.add, carry_and_sum[1], values)), None

    _, values = jax.eval_shape(function, carry, jax.tree.map(lambda x: x[0], rows))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), values)
    (carry, total), _ = jax.lax.scan(add, (carry, zeros), rows)
    return carry, jax.tree.map(lambda x: x / micro_batches, total)


def make_train_step(config: ml_collections.ConfigDict, model: nn.Module, optimizer: optax.GradientTransformation,
                    mesh: Mesh, from_device_data: bool, num_steps: int = 1):
    """The compiled step over the mesh: (state, donated; DeviceData or a sharded batch; seed) -> (state, metrics).

    The seed, of sampling and augmentation, is an argument so that all seeds are one program, compiled once.

    With `num_steps` > 1, for DeviceData alone, that many steps in one dispatch, the metrics [num_steps].

    Within another `jit`, or to trace it alone, take its `__wrapped__`: only the outermost program has compiler options.
    """
    step = functools.partial(train_step, model=model, optimizer=optimizer, config=config)

    def steps(state, data, seed):
        return jax.lax.scan(lambda state, _: step(state, data, seed), state, length=num_steps)

    batch_spec = PartitionSpec() if from_device_data else PartitionSpec(BATCH_AXIS)
    # check_vma=False: gradients of replicated parameters stay per device until the pmean, as under pmap.
    return jax.jit(
        jax.shard_map(steps if num_steps > 1 else step, mesh=mesh,
                      in_specs=(PartitionSpec(), batch_spec, PartitionSpec()),
                      out_specs=(PartitionSpec(), PartitionSpec()), check_vma=False),
        donate_argnums=0, compiler_options=parallel.compiler_options())


def most_steps_per_dispatch() -> int:
    """Where `train.steps_per_dispatch` is 0: a CPU gains nothing, as a step takes it far longer than a dispatch."""
    return 1 if jax.default_backend() == "cpu" else 25


def steps_per_dispatch(config: ml_collections.ConfigDict, first_step: int) -> int:
    """How many steps the device takes at a time, so that whatever falls due does so between dispatches."""
    if config.data.loader != "device":
        return 1
    most = config.train.steps_per_dispatch or most_steps_per_dispatch()
    common = math.gcd(config.log_every, config.checkpoint_every, config.evaluate.every, config.train.steps, first_step)
    return max(number for number in range(1, most + 1) if common % number == 0)
