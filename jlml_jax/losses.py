"""Cross-entropy a branch, and the two structured-sparsity penalties on the feature layers (paper, Eqs. 1 to 5).

Beyond the paper, and off unless asked for: a margin on the true identity's cosine, and a triplet loss a branch.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from jlml_jax.errors import UserError
from jlml_jax.layers import unit_length


def l21_norm(kernel: jax.Array) -> jax.Array:
    """Group LASSO, Eq. 1: sum over inputs i of ||kernel[i, :]||_2; kernel [inputs, outputs] -> scalar.

    The gradient at an all-zero row is 0.
    """
    return optax.safe_norm(kernel, 0.0, axis=1).sum()


def exclusive_l12_norm(kernel: jax.Array, num_strips: int) -> jax.Array:
    """Exclusive group LASSO, Eq. 2: sum over strips j and outputs i of (sum_k |kernel[j, k, i]|)^2 -> scalar.

    kernel [num_strips * d, outputs], its rows strip-major: strip j owns rows j * d to (j + 1) * d - 1. The gradient at
    a zero weight is 0.

    Raises:
        ValueError: the rows do not divide into the strips.
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


def batch_hard_triplet(features: jax.Array, labels: jax.Array, margin: float, axis_name: str | None = None
                       ) -> jax.Array:
    """Batch-hard triplet loss (Hermans et al. 2017, Eq. 5) of one branch: features [B, D], labels int [B] -> scalar.

    Features are scaled to length 1, so that Euclidean distances, 0 to 2, and the margin mean the same in every network.
    For each image of this device the farthest other one of its person and the nearest of someone else are looked for in
    the batch of all devices on the mesh axis `axis_name`: the mean of max(0, margin + farthest - nearest). An image
    without either counts 0.
    """
    features = unit_length(features, axis=1)
    batch, its_labels, first = features, labels, 0
    if axis_name is not None:
        batch, its_labels = jax.lax.all_gather((features, labels), axis_name, tiled=True)
        first = jax.lax.axis_index(axis_name) * len(labels)
    same = labels[:, None] == its_labels
    others = same & (first + jnp.arange(len(labels))[:, None] != jnp.arange(len(its_labels)))
    similarity = jax.lax.stop_gradient(features @ batch.T)
    farthest = jnp.where(others, similarity, jnp.inf).argmin(axis=1)
    nearest = jnp.where(same, -jnp.inf, similarity).argmax(axis=1)
    to_farthest, to_nearest = (optax.safe_norm(features - batch[chosen], 0.0, axis=1) for chosen in (farthest, nearest))
    has_both = others.any(axis=1) & ~same.all(axis=1)
    return jnp.where(has_both, jax.nn.relu(margin + to_farthest - to_nearest), 0.0).mean()


def check_fields(loss: ml_collections.ConfigDict, cosine_scale: float, images_per_identity: int) -> None:
    """Refuses fields of `config.loss` that have no meaning with those of `config.model` and `config.train`."""
    if loss.margin and not cosine_scale:
        raise UserError(f"loss.margin={loss.margin} is taken from a cosine; give --config.model.cosine_scale too, "
                        "such as 30")
    if loss.triplet_weight and not images_per_identity:
        raise UserError(f"loss.triplet_weight={loss.triplet_weight} compares images of a person, which a batch in "
                        "random order hardly has; give --config.train.images_per_identity too, such as 4")


def jlml_loss(outputs: Mapping[str, Any], params: Mapping[str, Any], labels: jax.Array, *, lambda_global: float,
              lambda_local: float, num_strips: int, label_smoothing: float = 0.0, margin: float = 0.0,
              cosine_scale: float = 0.0, triplet_weight: float = 0.0, triplet_margin: float = 0.0,
              axis_name: str | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss, Eq. 5 summed over the branches, and its terms by name (all scalars).

    `outputs` and `params` are those of `models.JLML`. The terms are `cross_entropy/HEAD` and `accuracy/HEAD` for every
    classifier, `penalty/BRANCH` and, if it has a weight, `triplet/BRANCH`, already weighted, for every branch.

    With `margin` the true identity's cosine counts as so much less (CosFace, Wang et al. 2018, Eq. 4); `cosine_scale`
    is the model's. `axis_name` is the mesh axis over which triplets are looked for.
    """
    terms = {}
    for head, logits in outputs["logits"].items():
        if margin:
            logits = logits - margin * cosine_scale * jax.nn.one_hot(labels, logits.shape[-1])
        terms[f"cross_entropy/{head}"] = cross_entropy(logits, labels, label_smoothing)
    if "global" in outputs["features"]:
        terms["penalty/global"] = lambda_global * l21_norm(params["global_head"]["fc"]["kernel"])
    if "local" in outputs["features"]:
        terms["penalty/local"] = lambda_local * exclusive_l12_norm(params["local_head"]["fc"]["kernel"], num_strips)
    if triplet_weight:
        for branch, features in outputs["features"].items():
            triplet = batch_hard_triplet(features, labels, triplet_margin, axis_name)
            terms[f"triplet/{branch}"] = triplet_weight * triplet
    loss = sum(terms.values())
    for head, logits in outputs["logits"].items():
        terms[f"accuracy/{head}"] = (logits.argmax(-1) == labels).astype(jnp.float32).mean()
    return loss, {"loss": loss, **terms}
