"""Which images a batch holds: a function of (seed, step), the same for every loader and any number of processes."""

from collections.abc import Iterator

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jlml_jax.errors import UserError


@flax.struct.dataclass
class IdentityGroups:
    """Groups of K images of one person each, which batches of P people and K images of each are made of ("PK")."""

    labels: jax.Array  # int32 [N], of all images
    # int32 [groups, images_per_identity]: of a group's images among all of them, sorted by person
    places: jax.Array


def identity_groups(labels: np.ndarray, images_per_identity: int) -> IdentityGroups | None:
    """The groups of `train.images_per_identity` images each, labels int [N]; None if it is 0.

    Every image is in one. What lacks in a person's last group are some of their others, again the same ones where the
    person has too few.
    """
    if not images_per_identity:
        return None
    counts = np.bincount(labels)
    places = [end - count + np.arange(-(-count // images_per_identity) * images_per_identity) % count
              for end, count in zip(counts.cumsum(), counts, strict=True) if count]
    places = np.concatenate(places, dtype=np.int32).reshape(-1, images_per_identity)
    return IdentityGroups(labels.astype(np.int32), places)


def check_fields(train: ml_collections.ConfigDict) -> None:
    """Refuses a `train.images_per_identity` that makes no groups, or groups that the batch does not divide into."""
    images = train.images_per_identity
    if images == 1:
        raise UserError(f"train.images_per_identity={images} must be 0, for images in random order, or at least 2")
    micro_batch = train.batch_size // train.accumulation_steps
    if images and micro_batch % images:
        nearest = min((divisor for divisor in range(2, micro_batch + 1) if micro_batch % divisor == 0),
                      key=lambda divisor: abs(divisor - images), default=0)
        raise UserError(f"train.images_per_identity={images} does not divide the {micro_batch} images of a "
                        + ("micro-batch" if train.accumulation_steps > 1 else "batch") + f"; give such as {nearest}")


def steps_per_epoch(num_images: int, batch_size: int, groups: IdentityGroups | None = None) -> int:
    """Whole batches in one pass; the few images left over in an epoch come elsewhere in the next one's order.

    Raises:
        UserError: a batch is larger than an epoch.
    """
    in_epoch = num_images if groups is None else groups.places.size
    if batch_size > in_epoch:
        raise UserError(f"train.batch_size={batch_size} is larger than the training set of {num_images} images; give "
                        f"--config.train.batch_size={in_epoch} or less")
    return in_epoch // batch_size


def epoch_order(seed: int, epoch: jax.Array | int, num_images: int, groups: IdentityGroups | None = None) -> jax.Array:
    """The order of the images in an epoch, int32 [num_images], or of all groups' images, a group side by side.

    May be traced; the same on every backend.
    """
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    order = jax.random.permutation(key, num_images)
    if groups is None:
        return order
    by_identity = order[jnp.argsort(groups.labels[order], stable=True)]
    return jax.random.permutation(jax.random.fold_in(key, 1), by_identity[groups.places]).reshape(-1)


def batch_indices(seed: int, step: jax.Array | int, num_images: int, batch_size: int,
                  groups: IdentityGroups | None = None) -> jax.Array:
    """Indices int32 [batch_size] of the images of the global batch at `step` (0 and up). May be traced."""
    epoch, position = divmod(step, steps_per_epoch(num_images, batch_size, groups))
    return jax.lax.dynamic_slice_in_dim(epoch_order(seed, epoch, num_images, groups), position * batch_size, batch_size)


def device_rows(rows: jax.Array | np.ndarray, num_devices: int, micro_batches: int = 1) -> jax.Array | np.ndarray:
    """Rows [B, ...] of a global batch, by device [num_devices, B / num_devices, ...].

    A micro-batch is `B / micro_batches` rows side by side, whatever the number of devices, and every device has equally
    many of each: row r of device d's part of micro-batch m is row (m * num_devices + d) * n + r of the global batch,
    with n = B / (micro_batches * num_devices).
    """
    by_micro_batch = rows.reshape(micro_batches, num_devices, -1, *rows.shape[1:])
    return by_micro_batch.swapaxes(0, 1).reshape(num_devices, -1, *rows.shape[1:])


def training_batches(seed: int, first_step: int, last_step: int, num_images: int, batch_size: int,
                     groups: IdentityGroups | None = None) -> Iterator[np.ndarray]:
    """The `batch_indices` of steps `first_step` to `last_step` - 1, on the host, which draws an epoch's order once."""
    draw = jax.jit(epoch_order, static_argnums=(0, 2))
    host = jax.local_devices(backend="cpu")[0]  # leaves the accelerator to the training steps
    groups = jax.device_put(groups, host)
    drawn = None
    for step in range(first_step, last_step):
        epoch, position = divmod(step, steps_per_epoch(num_images, batch_size, groups))
        if epoch != drawn:
            order, drawn = np.asarray(draw(seed, jax.device_put(np.int32(epoch), host), num_images, groups)), epoch
        yield order[position * batch_size:(position + 1) * batch_size]


def evaluation_batches(num_images: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices int [batch_size], mask bool [batch_size]) that hold every image exactly once where mask is true.

    The last batch is padded with image 0, so that every batch has the same shape.
    """
    for start in range(0, num_images, batch_size):
        indices = np.arange(start, start + batch_size)
        mask = indices < num_images
        yield np.where(mask, indices, 0), mask
