"""Which images a batch holds: a function of (seed, step), the same for every loader and any number of processes."""

from collections.abc import Iterator

import jax
import numpy as np

from jlml_jax.errors import UserError


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Whole batches in one pass; the few images left over in an epoch come elsewhere in the next one's order."""
    if batch_size > num_images:
        raise UserError(f"train.batch_size={batch_size} is larger than the training set of {num_images} images")
    return num_images // batch_size


def epoch_order(seed: int, epoch: jax.Array | int, num_images: int) -> jax.Array:
    """The order of the images in an epoch, int32 [num_images]. May be traced; the same on every backend."""
    return jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), num_images)


def batch_indices(seed: int, step: jax.Array | int, num_images: int, batch_size: int) -> jax.Array:
    """Indices int32 [batch_size] of the images of the global batch at `step` (0 and up). May be traced."""
    epoch, position = divmod(step, steps_per_epoch(num_images, batch_size))
    return jax.lax.dynamic_slice_in_dim(epoch_order(seed, epoch, num_images), position * batch_size, batch_size)


def device_rows(rows: jax.Array | np.ndarray, num_devices: int, parts: int = 1) -> jax.Array | np.ndarray:
    """Rows [B, ...] of a global batch, by device [num_devices, B / num_devices, ...].

    Of each of the batch's `parts`, one after another, every device has equally many rows side by side: what a part
    holds does not depend on the number of devices.
    """
    by_part = rows.reshape(parts, num_devices, -1, *rows.shape[1:])
    return by_part.swapaxes(0, 1).reshape(num_devices, -1, *rows.shape[1:])


def training_batches(seed: int, first_step: int, last_step: int, num_images: int,
                     batch_size: int) -> Iterator[np.ndarray]:
    """The `batch_indices` of steps `first_step` to `last_step` - 1, on the host, which draws an epoch's order once."""
    draw = jax.jit(epoch_order, static_argnums=(0, 2))
    host = jax.local_devices(backend="cpu")[0]  # leaves the accelerator to the training steps
    drawn = None
    for step in range(first_step, last_step):
        epoch, position = divmod(step, steps_per_epoch(num_images, batch_size))
        if epoch != drawn:
            order, drawn = np.asarray(draw(seed, jax.device_put(np.int32(epoch), host), num_images)), epoch
        yield order[position * batch_size:(position + 1) * batch_size]


def evaluation_batches(num_images: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(indices int [batch_size], mask bool [batch_size]) that hold every image exactly once where mask is true.

    The last batch is padded with image 0, so that every batch has the same shape.
    """
    for start in range(0, num_images, batch_size):
        indices = np.arange(start, start + batch_size)
        mask = indices < num_images
        yield np.where(mask, indices, 0), mask
