"""Cross-entropy a branch, and the two structured-sparsity penalties on the feature layers (paper, Eqs. 1 to 5)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def l21_norm(kernel: jax.Array) -> jax.Array:
    """Group LASSO, Eq. 1: sum over inputs i of ||kernel[i, :]||_2; kernel [inputs, outputs] -> scalar.

    The gradient at an all-zero row is 0.
    """
    return optax.safe_norm(kernel, 0.0, axis=1).sum()


def exclusive_l12_norm(kernel: jax.Array, num_strips: int) -> jax.Array:
    """Exclusive group LASSO, Eq. 2: sum over strips j and outputs i of (sum_k |kernel[j, k, i]|)^2 -> scalar.

    kernel [num_strips * d, outputs], its rows strip-major: strip j owns rows j * d to (j + 1) * d - 1. The gradient at
    a zero weight is 0.
    """
    if kernel.shape[0] % num_strips:
        raise ValueError(f"{kernel.shape[0]} rows do not divide into {num_strips} strips")
    by_strip = kernel.reshape(num_strips, -1, kernel.shape[-1])
    magnitudes = by_strip * jnp.sign(by_strip)  # abs, but with gradient 0 at 0, where JAX's own has 1
    return jnp.square(magnitudes.sum(axis=1)).sum()


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy, Eqs. 3 and 4: logits [B, classes], labels int [B] -> mean over the batch.

    With label smoothing s the target is 1 - s on the label plus s / classes on every class (Szegedy et al. 2016).
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    picked = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    return -((1 - label_smoothing) * picked + label_smoothing * log_p.mean(axis=-1)).mean()


def jlml_loss(outputs: Mapping[str, Any], params: Mapping[str, Any], labels: jax.Array, *, lambda_global: float,
              lambda_local: float, num_strips: int, label_smoothing: float = 0.0
              ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss, Eq. 5 summed over the branches, and its terms by name (all scalars).

    `outputs` and `params` are those of `models.JLML`. The terms are `cross_entropy/HEAD` and `accuracy/HEAD` for every
    classifier, and `penalty/BRANCH`, already weighted, for every branch.
    """
    terms = {}
    for head, logits in outputs["logits"].items():
        terms[f"cross_entropy/{head}"] = cross_entropy(logits, labels, label_smoothing)
    if "global" in outputs["features"]:
        terms["penalty/global"] = lambda_global * l21_norm(params["global_head"]["fc"]["kernel"])
    if "local" in outputs["features"]:
        terms["penalty/local"] = lambda_local * exclusive_l12_norm(params["local_head"]["fc"]["kernel"], num_strips)
    loss = sum(terms.values())
    for head, logits in outputs["logits"].items():
        terms[f"accuracy/{head}"] = (logits.argmax(-1) == labels).astype(jnp.float32).mean()
    return loss, {"loss": loss, **terms}
