"""From uint8 crops to the network's input, on the device: flip, crop, erase and normalise."""

import functools
from collections.abc import Sequence

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


def augment(key: jax.Array, images: jax.Array, settings: ml_collections.ConfigDict, fill: Sequence[float],
            axis_name: str | None = None, parts: int = 1) -> jax.Array:
    """Random changes to a batch of uint8 crops [b, H, W, 3], independent for each.

    `fill` is the colour, by channel from 0 to 1, of what is erased: the data's mean, which is normalised to 0.
    `key` is the global batch's: the device's rows, as `sampling.device_rows` has them, take their own share of what is
    drawn for all, so that the number of devices changes nothing.
    """
    devices = jax.lax.axis_size(axis_name) if axis_name else 1
    device = jax.lax.axis_index(axis_name) if axis_name else 0
    keys = sampling.device_rows(jax.random.split(key, devices * len(images)), devices, parts)[device]
    return jax.vmap(functools.partial(_augment_one, settings, fill))(keys, images)


def _augment_one(settings, fill, key, image):
    flip_key, crop_key = jax.random.split(key)
    if settings.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    if settings.crop_padding:
        pad = settings.crop_padding
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        top, left = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
        image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
    if settings.erasing_probability:
        erased = _erased_area(jax.random.fold_in(key, 2), image.shape, settings.erasing_probability)
        image = jnp.where(erased[..., None], jnp.round(255 * jnp.asarray(fill)).astype(jnp.uint8), image)
    return image


# Random erasing (Zhong et al. 2020, Algorithm 1): bounds of the erased share of the image and of its height over its
# width. They draw until a rectangle fits; of this many drawn at once, fewer than one in a million images has none.
_ERASED_SHARE, _ERASED_ASPECT, _ERASING_DRAWS = (0.02, 0.4), (0.3, 1 / 0.3), 20


def _erased_area(key: jax.Array, shape: Sequence[int], probability: float) -> jax.Array:
    """Which pixels of an image [H, W, ...] to erase, bool [H, W]."""
    height, width = shape[:2]
    chance, share, aspect, corner = jax.random.split(key, 4)
    area = height * width * jax.random.uniform(share, (_ERASING_DRAWS,), minval=_ERASED_SHARE[0],
                                               maxval=_ERASED_SHARE[1])
    aspect = jax.random.uniform(aspect, (_ERASING_DRAWS,), minval=_ERASED_ASPECT[0], maxval=_ERASED_ASPECT[1])
    size = jnp.round(jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)], 1)).astype(int)
    fits = (size < jnp.array([height, width])).all(1)
    size = jnp.where(fits.any() & jax.random.bernoulli(chance, probability), size[jnp.argmax(fits)], 0)
    top, left = jax.random.randint(corner, (2,), 0, jnp.array([height, width]) - size + 1)
    rows, columns = jnp.arange(height) - top, jnp.arange(width) - left
    return ((rows >= 0) & (rows < size[0]))[:, None] & ((columns >= 0) & (columns < size[1]))
