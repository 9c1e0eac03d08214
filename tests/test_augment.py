import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict
from PIL import Image
from splits import drawing

from configs import default
from jlml_jax import parallel
from jlml_jax.augment import augment, normalise, step_key
from jlml_jax.datasets.images import resize

ROWS, WHOLE = PartitionSpec("batch"), PartitionSpec()
FILL = 0.2, 0.4, 0.6


def images_of(count=32, height=12, width=8):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@functools.cache
def augmentation(flip, crop_padding, axis_name=None, erasing_probability=0.0, size=None, color_jitter=0.0,
                 white_balance=0.0):
    """At an input size of `size`; that of the images if none is given."""
    settings = ConfigDict({"flip": flip, "crop_padding": crop_padding, "color_jitter": color_jitter,
                           "white_balance": white_balance, "erasing_probability": erasing_probability})

    def changed(key, images):
        height, width = size or images.shape[1:3]
        return augment(key, images, settings, ConfigDict({"height": height, "width": width, "mean": FILL}), axis_name)

    return jax.jit(changed)


def test_without_augmentation_nothing_changes():
    images = images_of()
    np.testing.assert_array_equal(augmentation(False, 0)(jax.random.key(0), images), images)


def test_half_the_images_are_mirrored_left_to_right():
    images = images_of(256)
    flipped = np.asarray(augmentation(True, 0)(jax.random.key(0), images))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    np.testing.assert_array_equal((flipped == images).all((1, 2, 3)), ~mirrored)
    assert 0.4 < mirrored.mean() < 0.6
    assert flipped.dtype == np.uint8
    again = augmentation(True, 0)(jax.random.key(1), images)
    assert not np.array_equal(again, flipped)


def test_a_crop_is_the_image_shifted_by_at_most_the_padding():
    images, pad = images_of(256), 2
    cropped = np.asarray(augmentation(False, pad)(jax.random.key(0), images))
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    shifts = {}
    for top, left in itertools.product(range(2 * pad + 1), repeat=2):
        window = padded[:, top:top + 12, left:left + 8]
        for i in np.flatnonzero((window == cropped).all((1, 2, 3))):
            shifts[i] = top, left
    assert len(shifts) == len(images)
    assert len(set(shifts.values())) == 25


def test_every_step_and_seed_draws_its_own():
    images = images_of(256)
    flipped = [np.asarray(augmentation(True, 0)(step_key(seed, step), images)) for seed, step in
               ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (0, 0))]
    mirrored = [(batch == images[:, :, ::-1]).all((1, 2, 3)) for batch in flipped]
    np.testing.assert_array_equal(mirrored[0], mirrored.pop())
    assert np.abs(np.corrcoef(mirrored) - np.eye(5)).max() < 0.2


def test_flips_and_crops_are_as_likely_and_know_nothing_of_each_other():
    pad, number = 2, 4_000
    places = np.stack([*np.mgrid[:12, :8], np.zeros((12, 8))], -1).astype(np.uint8)  # of each pixel, row and column
    changed = np.asarray(augmentation(True, pad)(jax.random.key(0), np.broadcast_to(places, (number, *places.shape))))
    middle = changed[:, 6, 3:5].astype(int)
    mirrored = middle[:, 0, 1] > middle[:, 1, 1]
    top, left = middle[:, 0, 0] - 6, middle[:, :, 1].min(1) - 3
    assert abs(mirrored.mean() - 0.5) < 0.03
    for shift in (top, left):
        assert np.abs(np.bincount(shift + pad) / number - 0.2).max() < 0.03
    assert np.abs(np.corrcoef([mirrored, top, left]) - np.eye(3)).max() < 0.06
    assert all(abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.06 for drawn in (mirrored, top, left))


@pytest.mark.parametrize(("height", "width"), [(64, 32), (48, 48)])
def test_a_rectangle_is_erased_as_in_the_paper(height, width):
    """Zhong et al. 2020: in a share of the images, 2 to 40 % of the area, sides in a ratio of 0.3 to 1 / 0.3."""
    images = np.full((4_000, height, width, 3), 255, np.uint8)
    erase = augmentation(False, 0, erasing_probability=0.5)
    erased = np.asarray(erase(jax.random.key(0), images))
    gone = (erased != 255).all(-1)
    np.testing.assert_array_equal(erased[gone], np.broadcast_to([51, 102, 153], (gone.sum(), 3)))
    rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
    np.testing.assert_array_equal(gone.sum((1, 2)), rows * columns)  # a whole rectangle, or none
    chosen = rows > 0
    assert abs(chosen.mean() - 0.5) < 0.03
    rows, columns = rows[chosen], columns[chosen]
    assert (rows < height).all() and (columns < width).all()
    share = rows * columns / (height * width)
    assert 0.015 < share.min() < 0.04 and 0.36 < share.max() < 0.43
    ratio = rows / columns
    assert 0.25 < ratio.min() < 0.4 and 2.9 < ratio.max() < 4
    assert 0.65 < (ratio > 1).mean() < 0.95  # from 0.3 to 3.3 most ratios are above 1, of tall images still more
    where = np.argwhere(gone)
    assert where[:, 1].max() == height - 1 and where[:, 2].max() == width - 1 and where.min() == 0


def test_erasing_leaves_flips_and_crops_as_they_were():
    images, key = images_of(64), jax.random.key(0)
    erased = np.asarray(augmentation(True, 2, erasing_probability=1.0)(key, images))
    kept = (erased != np.round(255 * np.array(FILL))).any(-1)
    np.testing.assert_array_equal(erased[kept], np.asarray(augmentation(True, 2)(key, images))[kept])
    assert 0.5 < kept.mean() < 0.98 and not kept.all((1, 2)).any()


def test_color_jitter_scales_brightness_contrast_and_saturation_within_bounds():
    strength, key = 0.3, jax.random.key(0)
    jitter = augmentation(False, 0, color_jitter=strength)
    grey = np.broadcast_to(np.arange(60, 156, dtype=np.uint8).reshape(12, 8, 1), (500, 12, 8, 3))
    changed = np.asarray(jitter(key, grey))
    assert np.ptp(changed, axis=3).max() < 1e-3  # what has no colour gets none
    brightness = changed.mean((1, 2, 3)) / grey[0].mean()
    contrast = changed.std((1, 2, 3)) / grey[0].std() / brightness
    for factors in (brightness, contrast):
        assert 1 - strength - 1e-3 < factors.min() < 1 - 0.9 * strength < 1 + 0.9 * strength < factors.max()
        assert factors.max() < 1 + strength + 1e-3
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.15
    plain = np.broadcast_to(np.array([120, 100, 90], np.uint8), (500, 12, 8, 3))
    colored = np.asarray(jitter(key, plain))[:, 0, 0]
    np.testing.assert_allclose(colored @ [0.299, 0.587, 0.114], 104.84 * brightness, rtol=1e-4)
    # Contrast is about the image's mean grey: in a plain one it scales colour, together with saturation.
    saturation = (colored[:, 0] - colored[:, 2]) / 30 / brightness / contrast
    assert 1 - strength - 1e-3 < saturation.min() < 0.75 and 1.25 < saturation.max() < 1 + strength + 1e-3


def test_color_jitter_stays_in_range_and_leaves_what_moves_as_it_was():
    images, key = images_of(64), jax.random.key(0)
    changed = np.asarray(augmentation(True, 2, color_jitter=1.0)(key, images))
    assert changed.min() == 0 and changed.max() == 255
    moved = np.asarray(augmentation(True, 2)(key, images)).astype(float)
    alike = [np.corrcoef(a.mean(-1).ravel(), b.mean(-1).ravel())[0, 1] for a, b in zip(changed, moved, strict=True)]
    assert np.median(alike) > 0.8


def test_white_balance_scales_each_channel_by_a_factor_of_its_own():
    strength, key = 0.2, jax.random.key(0)
    balance = augmentation(False, 0, white_balance=strength)
    images = np.random.default_rng(0).integers(20, 200, (2_000, 12, 8, 3), dtype=np.uint8)
    factors = np.asarray(balance(key, images)) / images
    np.testing.assert_allclose(factors, np.broadcast_to(factors[:, :1, :1], factors.shape), rtol=1e-5)  # one an image
    factors = factors[:, 0, 0]
    assert 0.8 - 1e-3 < factors.min() < 0.81 and 1.19 < factors.max() < 1.2 + 1e-3
    np.testing.assert_allclose(factors.mean(0), 1, atol=0.01)
    np.testing.assert_allclose(factors.std(0), 0.4 / np.sqrt(12), rtol=0.05)  # uniform
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.06


def test_white_balance_stays_in_range_and_leaves_what_else_is_drawn_as_it_was():
    images, key = images_of(64), jax.random.key(0)
    others = {"erasing_probability": 0.5, "color_jitter": 0.3}
    plain = np.asarray(augmentation(True, 2, **others)(key, images))
    changed = np.asarray(augmentation(True, 2, white_balance=0.5, **others)(key, images))
    assert changed.min() == 0 and changed.max() == 255
    erased = (plain == np.round(255 * np.array(FILL))).all(-1)
    assert 0.1 < erased.mean() < 0.3
    np.testing.assert_array_equal(changed[erased], plain[erased])
    inside = ~erased[..., None] & (changed > 0.5) & (changed < 254.5) & (plain > 0.5)
    factors = np.where(inside, changed / np.maximum(plain, 0.5), np.nan)
    assert np.nanmax(np.nanmax(factors, (1, 2)) - np.nanmin(factors, (1, 2))) < 1e-3


@pytest.mark.parametrize("size", [(24, 16), (12, 20), (31, 8), (21, 23)])
def test_smaller_crops_are_resized_as_pillow_does(size):
    images = np.stack([drawing(12, 8, seed) for seed in range(4)])
    resized = augmentation(False, 0, size=size)(jax.random.key(0), images)
    expected = np.stack([resize(Image.fromarray(image), *size) for image in images])
    assert resized.dtype == jnp.float32
    np.testing.assert_allclose(resized, expected, atol=1.01)  # Pillow rounds twice


def test_resizing_comes_before_flips_crops_and_erasing():
    images, key, size = images_of(), jax.random.key(0), (30, 28)
    resized = np.asarray(augmentation(False, 0, size=size)(key, images))
    expected = augmentation(True, 2, None, 0.5)(key, resized)
    np.testing.assert_allclose(augmentation(True, 2, None, 0.5, size)(key, images), expected, atol=1e-4)


def test_crops_larger_than_the_input_are_not_resized_on_the_device():
    with pytest.raises(ValueError, match="larger than the network's input"):
        augmentation(True, 2, size=(12, 7))(jax.random.key(0), images_of())


def test_four_devices_augment_as_one():
    assert len(jax.devices()) == 4
    images, key = images_of(16), jax.random.key(0)
    sharded = jax.jit(jax.shard_map(augmentation(True, 2, "batch", 0.5), mesh=parallel.make_mesh(),
                                    in_specs=(WHOLE, ROWS), out_specs=ROWS))
    np.testing.assert_array_equal(sharded(key, images), augmentation(True, 2, None, 0.5)(key, images))


@pytest.mark.parametrize("mean, std", [((0.485, 0.456, 0.406), (1.0, 1.0, 1.0)), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))])
def test_normalise_against_numpy(mean, std):
    data = default.get_config().data
    data.mean, data.std = mean, std
    images = images_of()
    expected = (images / 255.0 - np.array(mean)) / np.array(std)
    actual = normalise(images, data)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=1e-6, rtol=1e-5)
