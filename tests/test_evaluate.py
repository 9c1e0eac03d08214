import math
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from runs import ROW_FIELDS, ROW_FRACTIONS
from splits import split_of, split_of_pixels

from configs import default
from jlml_jax import baselines, evaluate, metrics, parallel, prepare, protocols, result_rows
from jlml_jax.augment import normalise
from jlml_jax.checkpoints import load_run
from jlml_jax.distances import numpy_products
from jlml_jax.errors import UserError
from jlml_jax.models import JLML, init_variables
from jlml_jax.train import train_and_evaluate

# --- extraction

@pytest.fixture(scope="module")
def small():
    """A small network, its weights, ten images and a config."""
    model = JLML(0, num_strips=2, stem_features=4, global_widths=(4,), local_widths=(4,), depth=1,
                 global_feature_dim=3, local_feature_dim=5, native=False, axis_name="batch")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 16, 3), dtype=np.uint8)
    config = default.get_config()
    config.data.height, config.data.width = 32, 16
    mesh = parallel.make_mesh()
    return model, init_variables(model, 0, 32, 16), split_of_pixels(pixels, range(1, 11), [1] * 10), config, mesh


def test_no_image_is_lost_or_taken_twice_on_four_devices(small):
    model, variables, split, config, mesh = small
    data = config.data
    assert mesh.size == 4
    expected = jax.jit(lambda images: model.apply(variables, normalise(images, data)))(split.decode(32, 16))["features"]
    forward = evaluate.make_forward(model, config, mesh)
    for batch_size in (4, 8):  # both leave a part of the last batch empty
        features = evaluate.extract_features(forward, variables, split, data, batch_size, mesh)
        assert features.keys() == {"global", "local"}
        for branch, values in features.items():
            assert values.dtype == np.float32
            np.testing.assert_allclose(values, expected[branch], rtol=1e-4, atol=1e-4)
    assert len(np.unique(np.round(features["local"], 3), axis=0)) == 10


def test_features_may_be_the_mean_of_an_image_and_its_mirror_image(small):
    model, variables, split, config, mesh = small
    images = split.decode(32, 16)[:8]
    once, mirrored = (evaluate.make_forward(model, config, mesh)(variables, x) for x in (images, images[:, :, ::-1]))
    averaging = config.copy_and_resolve_references()
    averaging.evaluate.flip_average = True
    both = evaluate.make_forward(model, averaging, mesh)(variables, images)
    for branch, values in both.items():
        np.testing.assert_allclose(values, (once[branch] + mirrored[branch]) / 2, rtol=1e-5, atol=1e-6)
        assert np.abs(values - once[branch]).max() > 1e-3


def mean_pixels(_, images):
    """Stands for a network: an image's mean by channel."""
    return {"global": images.astype(np.float32).mean((1, 2))}


def test_every_batch_has_one_shape(small):
    _, variables, split, config, mesh = small
    data = config.data
    shapes = []

    def forward(variables, images):
        shapes.append((images.shape, len(images.sharding.device_set)))
        return mean_pixels(variables, images)

    features = evaluate.extract_features(forward, variables, split, data, 4, mesh)
    assert shapes == [((4, 32, 16, 3), 4)] * 3
    np.testing.assert_allclose(features["global"], split.decode(32, 16).mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(small, bad):
    _, variables, split, config, mesh = small
    data = config.data
    marked = split.decode(32, 16).mean((1, 2))[[9, 6]].astype(np.float32)

    def forward(variables, images):
        means = mean_pixels(variables, images)["global"]
        hit = (np.abs(np.asarray(means)[:, None] - marked).max(axis=-1) < 1e-3).any(axis=1)
        return {"global": np.where(hit[:, None], np.float32(bad), means)}

    with pytest.raises(UserError, match=r"global features of 2 images of test.*006\.png"):
        evaluate.extract_features(forward, variables, split, data, 4, mesh)


def test_a_batch_that_the_devices_do_not_divide_is_refused(small):
    _, variables, split, config, mesh = small
    data = config.data
    with pytest.raises(UserError, match=r"evaluate\.batch_size=6.*4 devices"):
        evaluate.extract_features(mean_pixels, variables, split, data, 6, mesh)


@pytest.mark.parametrize("asked_before", [range(10), [8, 1, 3], [8, 1]])
def test_features_that_are_known_already_are_those_of_the_images(small, asked_before):
    """Of one extraction before, in another order, or of several."""
    split = small[2]
    means = split.decode(32, 16).mean((1, 2))
    cache = evaluate.FeatureCache(lambda part: {"global": part.decode(32, 16).mean((1, 2))})
    cache(split.select(np.array(asked_before)))
    rows = np.array([3, 8, 1, 8])
    for _ in range(2):
        found = cache(split.select(rows))["global"]
        np.testing.assert_array_equal(found[:], means[rows])
        np.testing.assert_array_equal(found[np.array([2, 0])], means[rows][[2, 0]])


# --- matching features

@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return {"global": 3 * rng.normal(size=(7, 4)), "local": rng.normal(size=(7, 6))}


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_matching_features(features):
    left, right = features["global"], features["local"]
    joint = np.concatenate([left, right], axis=1)
    expected = {
        "none": (left, right, joint),
        "joint": (unit(left), unit(right), unit(joint)),
        "per_branch": (unit(left), unit(right), np.concatenate([unit(left), unit(right)], axis=1)),
    }
    for normalize, values in expected.items():
        matching = evaluate.matching_features(features, normalize)
        assert list(matching) == ["global", "local", "joint"]
        for actual, wanted in zip(matching.values(), values, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-6, err_msg=normalize)
    lengths = np.linalg.norm(evaluate.matching_features(features, "per_branch")["joint"], axis=1)
    np.testing.assert_allclose(lengths, np.sqrt(2), rtol=1e-6)


def test_one_branch_has_no_joint_feature(features):
    assert list(evaluate.matching_features({"local": features["local"]}, "joint")) == ["local"]


def test_a_feature_of_zeros_stays_finite(features):
    features["global"][2] = 0
    for normalize in ("joint", "per_branch"):
        matching = evaluate.matching_features(features, normalize)
        assert all(np.isfinite(values).all() for values in matching.values())


def test_an_unknown_normalisation_is_refused(features):
    with pytest.raises(UserError, match=r"evaluate\.normalize='l2'.*none, joint, per_branch"):
        evaluate.matching_features(features, "l2")


def test_features_to_match_by_are_read_by_rows(features):
    for normalize in evaluate.NORMALIZE:
        for values in evaluate.matching_features(features, normalize).values():
            whole = values[:]
            assert whole.shape == values.shape and whole.dtype == values.dtype
            np.testing.assert_array_equal(values[np.array([5, 0, 5])], whole[[5, 0, 5]])
            whole[:] = 0  # what is read belongs to the reader
            assert np.asarray(values).any()


# --- products on the devices

@pytest.mark.parametrize("num_devices", [1, 4])
def test_distances_sharded_over_devices_rank_as_numpy_does(monkeypatch, num_devices):
    monkeypatch.setattr(metrics, "BLOCK", 50)  # that the devices do not divide
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(30, 16)).astype(np.float32), rng.normal(size=(190, 16)).astype(np.float32)
    labels = (rng.integers(1, 6, 30), rng.integers(-1, 9, 190), rng.integers(1, 3, 30), rng.integers(1, 3, 190))
    products = evaluate.sharded_products(parallel.make_mesh(jax.devices()[:num_devices]))
    np.testing.assert_allclose(products(gallery)(query), query @ gallery.T, rtol=1e-5, atol=1e-5)
    sharded = metrics.evaluate_ranking(query, gallery, *labels, products=products)
    expected = metrics.evaluate_ranking(query, gallery, *labels)
    np.testing.assert_array_equal(sharded.cmc, expected.cmc)
    assert (sharded.mean_ap, sharded.mean_inp) == (expected.mean_ap, expected.mean_inp)


def test_products_are_on_the_devices_where_these_are_no_cpu():
    mesh = parallel.make_mesh()
    assert evaluate.products_on(mesh) is numpy_products
    accelerator = mock.Mock(platform="gpu")
    with mock.patch.object(evaluate, "sharded_products") as sharded:
        assert evaluate.products_on(mock.Mock(local_devices=[accelerator])) is sharded.return_value


# --- rows

def test_features_that_tell_persons_apart_score_one(trial):
    def one_hot(split):
        return {"local": np.eye(12)[split.identities + 1] * 5}

    row, = evaluate.evaluate_trials([trial], one_hot, default.get_config().evaluate)
    assert row["feature"] == "local" and all(row[field] == 1 for field in ROW_FRACTIONS)
    table = result_rows.format_rows([row])
    assert "single-query" in table and "20 queries" in table and "39 gallery" in table
    assert table.splitlines()[-1].split() == ["local"] + ["100.0"] * 7


def test_images_of_classes_count_as_right_where_no_other_class_scores_as_much():
    classes = np.arange(10, 90, 10)  # of training; an image's class is its rank among them
    trial = protocols.Trial("imagenet2012", "classification", train=split_of([b""] * 8, classes),
                            validation=split_of([b""] * 5, [30, 80, 10, 20, 50]))
    logits = np.zeros((5, 8), np.float32)
    for row, (label, rank) in enumerate(zip((2, 7, 0, 1, 4), (1, 5, 6, 2, 1), strict=True)):
        logits[row] = np.roll(-np.arange(8), label - rank + 1)
    logits[4] = 1  # of equal logits the wrong class comes first
    row, = evaluate.evaluate_validation(trial, {"joint": logits})
    assert (row["top1"], row["top5"], row["num_images"], row["num_classes"]) == (1 / 5, 3 / 5, 5, 8)


def test_chance_is_near_its_expectation_and_a_colour_histogram_above_it(trial, monkeypatch):
    useless = mock.Mock(side_effect=lambda query, gallery: np.zeros((len(query), len(gallery))))
    monkeypatch.setitem(baselines.HISTOGRAM_METRICS, "useless", useless)  # the best one counts
    data = default.get_config().data
    data.height, data.width = 32, 16
    chance, histogram = evaluate.evaluate_baselines(trial, data)
    assert chance["feature"] == "chance" and chance.keys() == histogram.keys() == ROW_FIELDS
    counted, right = 30 - 1 + 5, 2  # without junk and the query's own camera
    for rank in (1, 5, 10, 20):
        expected = 1 - math.comb(counted - right, rank) / math.comb(counted, rank)
        assert chance[f"rank{rank}"] == pytest.approx(expected, abs=0.07)
    harmonic = sum(1 / rank for rank in range(1, counted + 1))
    expected = ((right - 1) / (counted - 1) * (counted - harmonic) + harmonic) / counted
    assert chance["mean_ap"] == pytest.approx(expected, abs=0.03)
    assert chance["mean_ap_trapezoid"] < chance["mean_ap"] - 0.01
    assert chance["num_queries"] == 20
    assert histogram["rank1"] > 0.9 > 3 * chance["rank1"]


# --- extra distractors

def test_a_run_is_evaluated_against_extra_distractors(tiny_run, tmp_path):
    """Prepared by the commands that docs/large_galleries.md gives."""
    shutil.copytree(tiny_run, tmp_path / "run")
    config = load_run(tiny_run).config
    rng = np.random.default_rng(0)
    (tmp_path / "distractors" / "more").mkdir(parents=True)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (8, 4, 3), np.uint8)).save(
            tmp_path / "distractors" / "more" / f"{number}.jpg")
    page = (Path(__file__).parents[1] / "docs" / "large_galleries.md").read_text()
    listing = next(line for line in page.splitlines() if line.startswith("(echo"))
    subprocess.run(["bash", "-c", listing], cwd=tmp_path, check=True)
    prepare.prepare("folder/distractors", tmp_path / "distractors" / "list.csv", config.data.data_dir)

    config.evaluate.extra_gallery = "folder/distractors"
    rows = train_and_evaluate(config, tmp_path / "run", "evaluate")
    assert {row["protocol"] for row in rows} == {"single-query, 3 extra distractors",
                                                 "multi-query, 3 extra distractors"}
    trial = protocols.load("market1501", config.data).trial(0)
    assert {row["num_gallery"] for row in rows} == {len(trial.gallery) + 3}
    assert (tmp_path / "run" / "ranked.png").exists()
