import dataclasses
import io
import math
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from configs import default
from jlml_jax import evaluate, metrics, parallel, pictures, prepare, protocols, reranking, result_rows
from jlml_jax.augment import normalise
from jlml_jax.checkpoints import load_run
from jlml_jax.datasets.base import Split
from jlml_jax.distances import numpy_products
from jlml_jax.errors import UserError
from jlml_jax.models import JLML, init_variables
from jlml_jax.protocols import Trial
from jlml_jax.train import train_and_evaluate

FIELDS = {"dataset", "protocol", "trial", "feature", "normalize", "rank1", "rank5", "rank10", "rank20", "mean_ap",
          "mean_ap_trapezoid", "mean_inp", "num_queries", "num_gallery"}  # DESIGN.md, section 7
FRACTIONS = [field for field in FIELDS if field.startswith(("rank", "mean_"))]


def split_of(pixels, identities, cameras, dataset="test"):
    images = []
    for crop in pixels:
        file = io.BytesIO()
        Image.fromarray(crop).save(file, "PNG")
        images.append(file.getvalue())
    return Split(dataset, images, np.array(identities, np.int64), np.array(cameras, np.int64),
                 np.array([f"{i:03d}.png" for i in range(len(images))]))


def plain(*colors):
    return np.broadcast_to(np.array(colors, np.uint8)[:, None, None], (len(colors), 32, 16, 3))


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
    return model, init_variables(model, 0, 32, 16), split_of(pixels, range(1, 11), [1] * 10), config, mesh


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

@pytest.fixture(scope="module")
def trial():
    """Ten persons, a colour each: 20 queries from cameras 1 and 2; 30 gallery images, 5 distractors, 4 junk."""
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (13, 3))

    def split(identities, cameras):
        noisy = plain(*colors[np.maximum(identities, 0)]) + rng.normal(0, 8, (len(identities), 32, 16, 3))
        return split_of(np.clip(noisy, 0, 255).astype(np.uint8), identities, cameras)

    persons = np.arange(1, 11)
    gallery = np.concatenate([np.tile(persons, 3), np.zeros(5), -np.ones(4)]).astype(int)
    return Trial("test", "single-query", train=split(np.array([11, 12]), [1, 2]),
                    query=split(np.tile(persons, 2), np.repeat([1, 2], 10)),
                    gallery=split(gallery, [*np.repeat([1, 2, 3], 10), *[3] * 9]))


def test_rows_have_the_fields_of_results_json(trial):
    config = default.get_config().evaluate
    config.normalize, config.max_rank = "per_branch", 5  # fewer than the ranks reported
    rng = np.random.default_rng(0)

    def extract(split):
        return {"global": rng.normal(size=(len(split), 4)), "local": rng.normal(size=(len(split), 6))}

    rows = evaluate.evaluate_trials([trial], extract, config)
    assert [row["feature"] for row in rows] == ["global", "local", "joint"]
    for row in rows:
        assert row.keys() == FIELDS
        assert all(0 < row[field] < 1 for field in FRACTIONS if field != "rank20")
        assert row["rank1"] <= row["rank5"] <= row["rank10"] <= row["rank20"] <= 1
        assert (row["dataset"], row["protocol"], row["trial"], row["normalize"]) == (
            "test", "single-query", 0, "per_branch")
        assert (row["num_queries"], row["num_gallery"]) == (20, 39)


def test_features_that_tell_persons_apart_score_one(trial):
    def one_hot(split):
        return {"local": np.eye(12)[split.identities + 1] * 5}

    row, = evaluate.evaluate_trials([trial], one_hot, default.get_config().evaluate)
    assert row["feature"] == "local" and all(row[field] == 1 for field in FRACTIONS)
    table = result_rows.format_rows([row])
    assert "single-query" in table and "20 queries" in table and "39 gallery" in table
    assert table.splitlines()[-1].split() == ["local"] + ["100.0"] * 7


def test_of_several_trials_the_table_shows_the_mean(trial):
    rng = np.random.default_rng(0)

    def extract(split):
        return {"global": np.eye(12)[split.identities + 1] + rng.normal(size=(len(split), 12))}

    trials = [trial, dataclasses.replace(trial, number=1, incomplete="")]
    rows = evaluate.evaluate_trials(trials, extract, default.get_config().evaluate)
    assert [row["trial"] for row in rows] == [0, 1, "mean"]
    title, _, line = result_rows.format_rows(rows).splitlines()
    assert "mean of 2 trials" in title
    mean, deviation = np.mean([row["rank1"] for row in rows[:2]]), np.std([row["rank1"] for row in rows[:2]], ddof=1)
    assert line.split()[1:4] == [f"{100 * mean:.1f}", "±", f"{100 * deviation:.1f}"]


def test_re_ranking_has_columns_of_its_own(trial):
    def extract(split):
        rng = np.random.default_rng(len(split))
        return {"global": np.eye(12)[split.identities + 1] + 0.3 * rng.normal(size=(len(split), 12))}

    trials = [trial, dataclasses.replace(trial, number=1)]
    config = default.get_config().evaluate
    plain = evaluate.evaluate_trials(trials, extract, config)
    config.reranking = True
    rows = evaluate.evaluate_trials(trials, extract, config)
    for row, without in zip(rows, plain, strict=True):
        assert {field: row[field] for field in without} == without
        added = row.keys() - without.keys()
        assert {field.removesuffix("_std") for field in added} == {f"reranked_{score}" for score in result_rows.SCORES}
    reranked = reranking.Reranking(*(extract(split)["global"] for split in (trial.query, trial.gallery)))
    expected = metrics.rank_blocks(reranked.distances, *evaluate.labels_of(trial))
    assert rows[0]["reranked_mean_ap"] == expected.mean_ap != rows[0]["mean_ap"]
    _, header, line = result_rows.format_rows(rows).splitlines()
    assert header.split("mINP")[1].split() == ["R1", "re-r.", "mAP", "re-r."] and line.count("±") == 9
    drawn = dataclasses.replace(trial, single_gallery_shot=True)
    assert evaluate.evaluate_trials([drawn], extract, config)[0].keys() == FIELDS


def test_means_are_of_what_all_trials_have(trial):
    def extract(split):
        return {"global": np.random.default_rng(len(split)).normal(size=(len(split), 12))}

    def rows_of(number, **fields):
        config = default.get_config().evaluate
        config.update(fields)
        return evaluate.evaluate_trials([dataclasses.replace(trial, number=number)], extract, config)

    mean, = result_rows.mean_rows(rows_of(0, reranking=True) + rows_of(1))
    assert mean["trials"] == [0, 1] and "rank1_std" in mean
    assert not [field for field in mean if field.startswith("reranked")]


def test_a_table_has_the_columns_that_any_of_its_rows_has(trial):
    def extract(split):
        return {"global": np.random.default_rng(len(split)).normal(size=(len(split), 12))}

    config = default.get_config().evaluate
    config.reranking, config.norm_statistics = True, "camera"
    row, = evaluate.evaluate_trials([trial], extract, config)
    chance = {field: value for field, value in row.items() if "reranked" not in field and field != "norm_statistics"}
    _, statistics, header, first, second = result_rows.format_rows([chance | {"feature": "chance"}, row]).splitlines()
    assert "each camera's" in statistics and header.endswith("mAP re-r.")
    assert len(first.split()) == 8 and len(second.split()) == 10


def test_one_image_of_each_person_and_every_distractor_are_drawn_from(trial):
    drawn = dataclasses.replace(trial, single_gallery_shot=True)
    row, = evaluate.evaluate_trials([drawn], lambda split: {"global": np.eye(12)[split.identities + 1]},
                                    default.get_config().evaluate)
    assert row["num_gallery"] == 10 + 5


def test_chance_is_near_its_expectation_and_a_colour_histogram_above_it(trial):
    data = default.get_config().data
    data.height, data.width = 32, 16
    chance, histogram = evaluate.evaluate_baselines(trial, data)
    assert chance["feature"] == "chance" and chance.keys() == histogram.keys() == FIELDS
    counted, right = 30 - 1 + 5, 2  # without junk and the query's own camera
    for rank in (1, 5, 10, 20):
        expected = 1 - math.comb(counted - right, rank) / math.comb(counted, rank)
        assert chance[f"rank{rank}"] == pytest.approx(expected, abs=0.07)
    harmonic = sum(1 / rank for rank in range(1, counted + 1))
    expected = ((right - 1) / (counted - 1) * (counted - harmonic) + harmonic) / counted
    assert chance["mean_ap"] == pytest.approx(expected, abs=0.03)
    assert chance["num_queries"] == 20
    assert histogram["rank1"] > 0.9 > 3 * chance["rank1"]


# --- pictures

def color_runs(line):
    """The colours along a line of pixels, each run once."""
    changes = np.flatnonzero((line[1:] != line[:-1]).any(axis=1)) + 1
    return [tuple(map(int, run[0])) for run in np.split(line, changes)]


@pytest.fixture
def hand_made():
    """Two queries and the gallery images that they rank in the order of their features."""
    query = split_of(plain((10, 20, 30), (40, 50, 60)), [1, 2], [1, 1])
    gallery = split_of(plain((1, 1, 1), (2, 2, 2), (100, 0, 0), (0, 100, 0), (0, 0, 100)),
                       [1, -1, 2, 1, 0], [1, 2, 2, 2, 3])
    trial = Trial("test", "single-query", query=query, gallery=gallery)
    return trial, np.array([[0.0], [9.0]]), np.array([[0.0], [0.1], [1], [2], [3]])


def frames(path, rows, row):
    """(frame colour, crop colour) of each picture in a row of the sheet."""
    sheet = np.asarray(Image.open(path))
    white, *runs, last = color_runs(sheet[int((row + 0.5) * len(sheet) / rows)])
    assert white == last == (255, 255, 255)
    runs = [run for run in runs if run != white]
    assert runs[::3] == runs[2::3]  # a frame on both sides
    return list(zip(runs[::3], runs[1::3], strict=True))


def kind(frame):
    red, green, blue = frame
    return "query" if red == green == blue else "right" if green > max(red, blue) else "wrong"


def test_ranked_lists(hand_made, tmp_path):
    pictures.ranked_lists(*hand_made, tmp_path / "ranked.png")
    first, second = (frames(tmp_path / "ranked.png", 2, row) for row in (0, 1))
    # Left out: the first query's own camera, and junk. The second query has no image of its own camera.
    assert [(kind(frame), crop) for frame, crop in first] == [
        ("query", (10, 20, 30)), ("wrong", (100, 0, 0)), ("right", (0, 100, 0)), ("wrong", (0, 0, 100))]
    assert [(kind(frame), crop) for frame, crop in second] == [
        ("query", (40, 50, 60)), ("wrong", (0, 0, 100)), ("wrong", (0, 100, 0)), ("right", (100, 0, 0)),
        ("wrong", (1, 1, 1))]


def test_ranked_lists_are_as_long_and_as_many_as_asked(hand_made, tmp_path):
    pictures.ranked_lists(*hand_made, tmp_path / "ranked.png", num_queries=1, top_k=2)
    (query, _), *ranked = frames(tmp_path / "ranked.png", 1, 0)
    assert kind(query) == "query" and len(ranked) == 2
    pictures.ranked_lists(*hand_made, tmp_path / "all.png", num_queries=5)  # more than there are
    assert len(frames(tmp_path / "all.png", 2, 1)) == 5


def test_crops_of_a_picture_are_where_they_belong(tmp_path):
    """Upright, and not mirrored."""
    crop = plain((200, 0, 0))[0].copy()
    crop[:16, :8] = (0, 0, 200)
    split = split_of([crop], [1], [1])
    gallery = dataclasses.replace(split, cameras=np.array([2]))
    pictures.ranked_lists(Trial("test", "single-query", query=split, gallery=gallery), np.zeros((1, 2)),
                          np.zeros((1, 2)), tmp_path / "one.png")
    sheet = np.asarray(Image.open(tmp_path / "one.png"))
    blue = np.argwhere((sheet == (0, 0, 200)).all(axis=2))
    red = np.argwhere((sheet == (200, 0, 0)).all(axis=2))
    assert len(blue) and len(red)
    assert blue[:, 0].max() < red[:, 0].max() and blue[:, 1].min() < red[:, 1].min() + 8
    first = sheet[blue[0, 0], blue[0, 1]:blue[0, 1] + 64]  # the first picture's uppermost line, to its right border
    assert (first[0] == (0, 0, 200)).all() and (first[-1] == (200, 0, 0)).all()


def test_a_picture_that_cannot_be_written_is_told(hand_made, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        pictures.ranked_lists(*hand_made, tmp_path / "nowhere" / "ranked.png")


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
