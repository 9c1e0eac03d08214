import colorsys

import numpy as np
import pytest

from jlml_jax.baselines import HISTOGRAM_METRICS, NUM_STRIPES, color_histogram, random_distances, rgb_to_hsv


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (8, 48, 20, 3), dtype=np.uint8)


def test_hsv_agrees_with_the_standard_library(images):
    corners = np.array(np.meshgrid([0, 255], [0, 255], [0, 255])).reshape(3, -1).T.astype(np.uint8)
    colors = np.concatenate([images.reshape(-1, 3)[:500], corners, [[90, 90, 90], [255, 0, 1], [7, 7, 6]]])
    expected = [colorsys.rgb_to_hsv(*(color / 255)) for color in colors]
    np.testing.assert_allclose(rgb_to_hsv(colors.astype(np.uint8)), expected, atol=1e-5)


def test_each_stripe_sums_to_one(images):
    for height in (48, 50, 6):
        histogram = color_histogram(np.resize(images, (3, height, 20, 3)))
        assert histogram.dtype == np.float32
        np.testing.assert_allclose(histogram.reshape(3, NUM_STRIPES, -1).sum(axis=-1), 1, rtol=1e-5)


def test_a_histogram_forgets_places_within_a_stripe_but_not_the_stripe(images):
    stripes = images.reshape(8, NUM_STRIPES, -1, 3)
    order = np.random.default_rng(1).permutation(stripes.shape[2])
    histogram = color_histogram(images)
    np.testing.assert_array_equal(color_histogram(stripes[:, :, order].reshape(images.shape)), histogram)
    assert np.abs(color_histogram(images[:, ::-1]) - histogram).max() > 0.01
    turned = histogram.reshape(8, NUM_STRIPES, -1)[:, ::-1].reshape(histogram.shape)
    np.testing.assert_array_equal(color_histogram(images[:, ::-1]), turned)


def test_greys_have_no_hue_and_colors_have():
    def plain(*color):
        return color_histogram(np.full((1, 12, 4, 3), color, np.uint8))

    np.testing.assert_array_equal(plain(128, 120, 120), plain(120, 120, 128))
    np.testing.assert_array_equal(plain(60, 0, 0), plain(0, 0, 0))
    assert np.abs(plain(200, 20, 20) - plain(20, 20, 200)).max() == 1


@pytest.mark.parametrize("name", HISTOGRAM_METRICS)
def test_distances(name, images):
    histograms = color_histogram(images).astype(np.float64)
    distances = HISTOGRAM_METRICS[name](histograms[:5], histograms)
    assert distances.shape == (5, 8)
    np.testing.assert_allclose(np.diag(distances), 0, atol=1e-6)
    assert (distances[~np.eye(5, 8, dtype=bool)] > 0.01).all()
    formula = {
        "l1": lambda q, g: sum(abs(q - g)),
        "l2": lambda q, g: sum((q - g) ** 2) ** 0.5,
        "chi_squared": lambda q, g: sum((q - g)[q + g > 0] ** 2 / (q + g)[q + g > 0]) / 2,
        "hellinger": lambda q, g: (2 * NUM_STRIPES - 2 * sum((q * g) ** 0.5)) ** 0.5,  # by way of Bhattacharyya
    }[name]
    for q, g in ((0, 1), (4, 7), (3, 0)):
        np.testing.assert_allclose(distances[q, g], formula(histograms[q], histograms[g]), rtol=1e-4)


def test_random_distances_are_even_and_the_same_in_any_block():
    rows, columns = np.arange(200), np.arange(300)
    whole = random_distances(3, 300, rows, columns)
    assert whole.dtype == np.uint32 and len(np.unique(whole)) > 59_990
    counts = np.histogram(whole, 16, (0, 2**32))[0]
    assert np.abs(counts - 3750).max() < 5 * 3750**0.5
    for axis in (0, 1):  # no query and no image is nearer than others
        assert np.abs(whole.mean(axis=axis) / 2**32 - 0.5).max() < 5 * (12 * whole.shape[axis]) ** -0.5
    chosen = np.array([7, 299, 0])
    np.testing.assert_array_equal(random_distances(3, 300, rows[5:9], chosen), whole[5:9][:, chosen])
    assert (random_distances(4, 300, rows, columns) != whole).mean() > 0.999


BAD = [np.zeros((2, 12, 4, 3)), np.zeros((12, 4, 3), np.uint8), np.zeros((1, 5, 4, 3), np.uint8)]


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_batch_of_images_is_refused(bad):
    with pytest.raises(ValueError):
        color_histogram(bad)
