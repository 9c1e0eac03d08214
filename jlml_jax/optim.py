"""SGD with momentum (optax) and its learning-rate schedule, from config."""

import jax
import ml_collections
import optax

from jlml_jax.errors import UserError


def learning_rate_schedule(optim: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """Step -> learning rate.

    `step` multiplies by `decay_factor` every `decay_every` steps (paper, Table 4); `cosine` falls to 0 at
    `total_steps`. Both rise linearly over the first `warmup_steps`.

    Raises:
        UserError: the schedule is unknown.
    """
    if optim.schedule == "step":
        def schedule(step):  # in integers: a compiled floor(step / decay_every) of optax's can come a step late
            return optim.learning_rate * jax.numpy.power(optim.decay_factor, step // optim.decay_every)
    elif optim.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(optim.learning_rate, max(total_steps, 1))  # 0: nothing is trained
    else:
        raise UserError(f"optim.schedule={optim.schedule!r} is unknown; known are step, cosine")
    if not optim.warmup_steps:
        return schedule

    def warmed_up(step):
        return schedule(step) * jax.numpy.minimum(1.0, (step + 1) / optim.warmup_steps)

    return warmed_up


def make_optimizer(optim: ml_collections.ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """SGD with momentum: v <- momentum v + gradient + weight_decay w; w <- w - learning_rate v.

    Caffe, which the paper used, has the learning rate inside v: the two differ for a few steps after each decay.
    Weight decay is on kernels alone: biases and the scales of BN are not decayed.
    """
    return optax.chain(
        optax.add_decayed_weights(optim.weight_decay, mask=_is_kernel) if optim.weight_decay else optax.identity(),
        optax.sgd(learning_rate_schedule(optim, total_steps), momentum=optim.momentum or None,
                  nesterov=optim.nesterov),
    )


def _is_kernel(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
