"""Batch normalisation by the statistics of the tested images, without their labels."""

import dataclasses

import jax
import numpy as np
import pytest
from splits import split_of_pixels

from configs import default
from jlml_jax import augment, evaluate, norm_statistics, parallel
from jlml_jax.layers import GLOBAL_PSEUDO_COUNT
from jlml_jax.models import JLML, init_variables
from jlml_jax.protocols import Trial


class Network:
    def __init__(self, devices=4):
        self.config = default.get_config()
        self.config.data.height, self.config.data.width = 32, 16
        self.mesh = parallel.make_mesh(jax.devices()[:devices])
        self.model = JLML(0, num_strips=2, stem_features=4, global_widths=(4,), local_widths=(4,), depth=1,
                          global_feature_dim=3, local_feature_dim=5, feature_norm=True, native=False,
                          axis_name="batch")
        self.variables = init_variables(self.model, 0, 32, 16)
        self.statistics = norm_statistics.make_statistics(self.model, self.config, self.mesh)
        self.forward = evaluate.make_forward(self.model, self.config, self.mesh)

    def of_images(self, split, batch_size):
        return norm_statistics.of_images(self.statistics, self.variables, split, self.config.data, batch_size,
                                         self.mesh)

    def adapted(self, split, source, batch_size=8):
        return norm_statistics.adapted(self.statistics, self.variables, split, source, self.config.data, batch_size,
                                       self.mesh)

    def features(self, variables, split):
        return evaluate.extract_features(self.forward, variables, split, self.config.data, 8, self.mesh)


@pytest.fixture(scope="module")
def network():
    return Network()


def smooth(number, seed=0):
    """Random pictures of few levels, so that a camera's change of light loses nothing to rounding."""
    return np.random.default_rng(seed).integers(0, 60, (number, 32, 16, 3)).astype(np.uint8) * 2


@pytest.fixture(scope="module")
def two_cameras():
    """The same 16 pictures by two cameras, the second of which sees all at half the contrast, and brighter."""
    pixels = smooth(16)
    return split_of_pixels(np.concatenate([pixels, pixels // 2 + 100]), [*range(1, 17)] * 2, [1] * 16 + [2] * 16)


def test_one_batch_is_normalised_as_in_training(network, two_cameras):
    split = two_cameras.select(np.arange(8))
    variables = network.variables | {"batch_stats": network.of_images(split, 8)}
    images = augment.normalise(split.decode(32, 16), network.config.data)
    expected, _ = network.model.clone(axis_name=None).apply(network.variables, images, train=True,
                                                            mutable=["batch_stats"])
    for branch, values in network.features(variables, split).items():
        np.testing.assert_allclose(values, expected["features"][branch], rtol=1e-3, atol=1e-3)


def test_batches_are_averaged_by_their_moments(network, two_cameras):
    """Of the first layer, whose input the statistics do not change: those of all images at once."""
    at_once, in_parts = (network.of_images(two_cameras, size)["stem"]["norm"] for size in (32, 8))
    np.testing.assert_allclose(in_parts["mean"], at_once["mean"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(in_parts["var"], at_once["var"], rtol=1e-3)
    single = network.of_images(two_cameras, 8)
    assert jax.tree.structure(single) == jax.tree.structure(network.variables["batch_stats"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(single))


def test_fewer_images_than_a_batch_are_repeated(network, two_cameras):
    few = two_cameras.select(np.arange(4))
    once, twice = (network.of_images(few, size) for size in (4, 8))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def distance(features):
    """Of the same pictures by the two cameras, as a share of the distance between different pictures."""
    first, second = np.split(features["global"], 2)
    same = np.linalg.norm(first - second, axis=1).mean()
    return same / np.linalg.norm(first[:, None] - first[None], axis=2).mean()


def test_each_cameras_own_statistics_undo_its_light(network, two_cameras, monkeypatch):
    monkeypatch.setattr(norm_statistics, "GLOBAL_PSEUDO_COUNT", 0)
    shares = {}
    for source in ("data", "camera"):
        variables = network.adapted(two_cameras, source)
        assert variables.keys() == ({None} if source == "data" else {None, 1, 2})
        shares[source] = distance(norm_statistics.extract_by_camera(network.features, variables, two_cameras))
    shares["run"] = distance(network.features(network.variables, two_cameras))
    assert shares["camera"] < 0.3 * min(shares["data"], shares["run"]), shares


def test_a_cameras_few_images_share_in_those_of_all(network, two_cameras):
    split = two_cameras.select(np.array([*range(16), 16, 17]))  # two by the second camera
    variables = network.adapted(split, "camera")
    own, every = (network.of_images(images, 8)["stem"]["norm"] for images in (split.select(np.array([16, 17])), split))
    share = GLOBAL_PSEUDO_COUNT / (2 + GLOBAL_PSEUDO_COUNT)
    np.testing.assert_allclose(variables[2]["batch_stats"]["stem"]["norm"]["mean"],
                               (1 - share) * own["mean"] + share * every["mean"], rtol=1e-5)
    assert np.abs(own["mean"] - every["mean"]).max() > 1e-2


def test_features_come_in_the_splits_order_and_of_an_unknown_camera_by_all(network, two_cameras):
    variables = network.adapted(two_cameras, "camera")
    mixed = two_cameras.select(np.random.default_rng(1).permutation(32)[:12])
    mixed.cameras[5] = 7

    features = norm_statistics.extract_by_camera(network.features, variables, mixed)
    for row in range(12):
        camera = int(mixed.cameras[row])
        expected = network.features(variables.get(camera, variables[None]), mixed.select(np.array([row])))
        for branch, values in expected.items():
            np.testing.assert_allclose(features[branch][[row]], values, rtol=1e-4, atol=1e-4)


def test_one_device_measures_what_four_do(network, two_cameras):
    one = Network(devices=1)
    for a, b in zip(*(jax.tree.leaves(some.of_images(two_cameras, 8)) for some in (one, network)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("source", ["run", "data", "camera"])
def test_test_images_are_normalised_by_training_images(network, two_cameras, source):
    """Never by one another; by camera, an image that is there by two cameras has the features of each."""
    query = split_of_pixels(smooth(8, seed=1), [*range(20, 28)], [1, 2] * 4)
    config = network.config.copy_and_resolve_references()
    config.evaluate.norm_statistics, config.evaluate.batch_size = source, 8
    trial = Trial("test", "single-query", train=two_cameras, query=query, gallery=query)
    features_of = norm_statistics.features_of(trial, network.forward, network.statistics, network.variables, config,
                                              network.mesh)
    variables = {None: network.variables} if source == "run" else network.adapted(two_cameras, source)
    for split in (query, dataclasses.replace(query, cameras=3 - query.cameras)):
        expected = norm_statistics.extract_by_camera(network.features, variables, split)
        for branch, values in features_of(split).items():
            np.testing.assert_allclose(values[:], expected[branch], rtol=1e-4, atol=1e-4)


def test_of_many_images_some_are_measured_at_random():
    assert sorted(norm_statistics.chosen_images(5)) == [0, 1, 2, 3, 4]
    chosen = norm_statistics.chosen_images(5_000)
    assert len(set(chosen)) == len(chosen) == norm_statistics.MOST_IMAGES
    assert abs(np.mean(chosen) - 2_500) < 250 and abs(np.corrcoef(chosen, np.arange(len(chosen)))[0, 1]) < 0.15


def test_no_variance_is_below_zero():
    """Where a camera's images are all alike, rounding leaves E[x^2] - E[x]^2 on either side of 0."""
    alike = {"norm": {"mean": np.random.default_rng(0).normal(size=100).astype(np.float32), "var": np.zeros(100)}}
    assert (norm_statistics.of_camera(alike, 3, alike)["norm"]["var"] >= 0).all()
