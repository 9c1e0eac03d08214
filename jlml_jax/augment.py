"""From uint8 crops to the network's input, on the device: resize, flip, crop, recolour, erase and normalise."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections

from jlml_jax import sampling


def normalise(images: jax.Array, data: ml_collections.ConfigDict) -> jax.Array:
    """Pixels from 0 to 255, uint8 or float32 [B, H, W, 3] -> float32: (pixel / 255 - mean) / std by channel."""
    scale = 1.0 / (255.0 * jnp.asarray(data.std, jnp.float32))
    shift = jnp.asarray(data.mean, jnp.float32) / jnp.asarray(data.std, jnp.float32)
    return images.astype(jnp.float32) * scale - shift


# Sets the random numbers of augmentation apart from those of sampling, which come from the same seed.
_STREAM = 0x617567


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of the augmentations of the global batch at `step`."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _STREAM), step)


def augment(key: jax.Array, images: jax.Array, settings: ml_collections.ConfigDict, data: ml_collections.ConfigDict,
            axis_name: str | None = None, micro_batches: int = 1) -> jax.Array:
    """Random changes to a batch of uint8 crops [b, h, w, 3], independent for each, at the network's input size.

    Smaller crops are resized by bilinear interpolation: so they travel, and lie on the device, in their own few bytes.
    The result is uint8 where pixels only move, else float32 from 0 to 255.

    What is erased gets the data's mean, which is normalised to 0.
    `key` is the global batch's: the device's rows, as `sampling.device_rows` has them, take their own share of what is
    drawn for all, so that the number of devices changes nothing.
    """
    devices = jax.lax.axis_size(axis_name) if axis_name else 1
    device = jax.lax.axis_index(axis_name) if axis_name else 0
    keys = sampling.device_rows(jax.random.split(key, devices * len(images)), devices, micro_batches)[device]
    return jax.vmap(functools.partial(_augment_one, settings, data))(keys, images)


def _augment_one(settings, data, key, image):
    height, width = data.height, data.width
    rows, columns = jnp.arange(height), jnp.arange(width)  # of the resized image, where each of the result comes from
    flip_key, crop_key = jax.random.split(key)  # what else is drawn is set apart by fold_in: this stays as it is
    if settings.crop_padding:  # by repeated edges
        pad = settings.crop_padding
        top, left = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
        rows = jnp.clip(rows + top - pad, 0, height - 1)
        columns = jnp.clip(columns + left - pad, 0, width - 1)
    if settings.flip:
        columns = jnp.where(jax.random.bernoulli(flip_key), width - 1 - columns, columns)
    image = _resample(_resample(image, rows, height, axis=0), columns, width, axis=1)
    if settings.color_jitter:
        image = _jitter_color(jax.random.fold_in(key, 3), image.astype(jnp.float32), settings.color_jitter)
    if settings.white_balance:
        image = _change_white_balance(jax.random.fold_in(key, 4), image.astype(jnp.float32), settings.white_balance)
    if settings.erasing_probability:
        erased = _erased_area(jax.random.fold_in(key, 2), image.shape, settings.erasing_probability)
        image = jnp.where(erased[..., None], _mean_pixel(data).astype(image.dtype), image)
    return image


def _mean_pixel(data: ml_collections.ConfigDict) -> jax.Array:
    """The data's mean as a pixel [3], 0 to 255; the nearest there is, where a config's mean is none."""
    return jnp.clip(jnp.round(255 * jnp.asarray(data.mean)), 0, 255)


def _resample(image: jax.Array, positions: jax.Array, size: int, axis: int) -> jax.Array:
    """What the image [h, w, 3] has at `positions` (int, 0 to size - 1) of an axis, were that resized to `size`."""
    length = image.shape[axis]
    if length == size:
        return jnp.take(image, positions, axis, mode="clip")
    if length > size:
        raise ValueError(f"crops of {image.shape} are larger than the network's input; resize them as they are decoded")
    centre = (positions + 0.5) * (length / size) - 0.5
    before = jnp.floor(centre).astype(int)
    weight = jnp.expand_dims(centre - before, [other for other in range(image.ndim) if other != axis])
    first, second = (jnp.take(image, position, axis, mode="clip").astype(jnp.float32)
                     for position in (jnp.maximum(before, 0), before + 1))
    return first * (1 - weight) + second * weight


_LUMA = 0.299, 0.587, 0.114  # of red, green and blue (ITU-R BT.601)


def _jitter_color(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """Brightness, contrast and saturation of pixels 0 to 255, each by a factor from 1 - strength to 1 + strength."""
    brightness, contrast, saturation = jax.random.uniform(key, (3,), minval=1 - strength, maxval=1 + strength)
    image = image * brightness
    grey = (image @ jnp.asarray(_LUMA))[..., None]
    mean = grey.mean()
    return jnp.clip(mean + contrast * (grey - mean + saturation * (image - grey)), 0, 255)


def _change_white_balance(key: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """Each channel of pixels 0 to 255 by its own factor from 1 - strength to 1 + strength, as cameras differ."""
    return jnp.clip(image * jax.random.uniform(key, (3,), minval=1 - strength, maxval=1 + strength), 0, 255)


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
