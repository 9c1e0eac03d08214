"""From uint8 crops to the network's input, on the device: flip and normalise."""

import functools

import jax
import jax.numpy as jnp
import ml_collections

from jlml_jax import sampling


def normalise(images: jax.Array, data: ml_collections.ConfigDict) -> jax.Array:
    """uint8 [B, H, W, 3] -> float32: (pixel / 255 - mean) / std by channel."""
    scale = 1.0 / (255.0 * jnp.asarray(data.std, jnp.float32))
    shift = jnp.asarray(data.mean, jnp.float32) / jnp.asarray(data.std, jnp.float32)
    return images.astype(jnp.float32) * scale - shift


# Sets the random numbers of augmentation apart from those of sampling, which come from the same seed.
_STREAM = 0x617567


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of the augmentations of the global batch at `step`."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAM), step)


def augment(key: jax.Array, images: jax.Array, settings: ml_collections.ConfigDict, axis_name: str | None = None,
            parts: int = 1) -> jax.Array:
    """Random changes to a batch of uint8 crops [b, H, W, 3], independent for each.

    `key` is the global batch's: the device's rows, as `sampling.device_rows` has them, take their own share of what is
    drawn for all, so that the number of devices changes nothing.
    """
    devices = jax.lax.axis_size(axis_name) if axis_name else 1
    device = jax.lax.axis_index(axis_name) if axis_name else 0
    keys = sampling.device_rows(jax.random.split(key, devices * len(images)), devices, parts)[device]
    return jax.vmap(functools.partial(_augment_one, settings))(keys, images)


def _augment_one(settings, key, image):
    flip_key, crop_key = jax.random.split(key)
    if settings.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    if settings.crop_padding:
        pad = settings.crop_padding
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        top, left = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
        image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
    return image
