"""Sheets of ranked lists, activation maps and charts."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image
from splits import plain, split_of_pixels

from configs import default
from jlml_jax import pictures
from jlml_jax.checkpoints import load_run
from jlml_jax.errors import UserError
from jlml_jax.models import build_model
from jlml_jax.pictures import Curve
from jlml_jax.protocols import Trial


def color_runs(line):
    """The colours along a line of pixels, each run once."""
    changes = np.flatnonzero((line[1:] != line[:-1]).any(axis=1)) + 1
    return [tuple(map(int, run[0])) for run in np.split(line, changes)]


@pytest.fixture
def hand_made():
    """Two queries and the gallery images that they rank in the order of their features."""
    query = split_of_pixels(plain((10, 20, 30), (40, 50, 60)), [1, 2], [1, 1])
    gallery = split_of_pixels(plain((1, 1, 1), (2, 2, 2), (100, 0, 0), (0, 100, 0), (0, 0, 100)),
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
    split = split_of_pixels([crop], [1], [1])
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


def test_activation_maps_are_energies_of_the_last_unit_with_cells(tiny_run):
    run = load_run(tiny_run)
    model = build_model(run.config, 0)
    activation_maps, units = pictures.make_activation_maps(model, run.config.data)
    assert units == {"global": "conv2_1", "local": "conv2_1"}  # conv3_1's maps have 4 x 2 cells
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 16, 3), np.uint8)
    maps = activation_maps(run.variables, images)
    assert maps["global"].shape == (3, 1, 8, 4) and maps["local"].shape == (3, 2, 8, 4)
    _, state = model.apply(run.variables, images / 255 - np.array(run.config.data.mean), capture_intermediates=True,
                           mutable=["intermediates"])
    for branch, row, tower in (("global", 0, "global_tower"), ("local", 1, "local_tower_1")):
        energy = np.square(np.asarray(state["intermediates"][tower]["conv2_1"]["__call__"][0])).mean(-1)
        np.testing.assert_allclose(maps[branch][:, row], energy / energy.max((1, 2), keepdims=True), atol=1e-4)


def test_activation_maps_of_the_papers_size_are_before_the_pool():
    config = default.get_config()
    config.model.depth = 1  # tracing is quicker
    _, units = pictures.make_activation_maps(build_model(config, 0), config.data)
    assert units == {"global": "conv5_1", "local": "conv5_1"}


def test_a_heat_layer_has_each_strip_in_its_place():
    maps = np.zeros((2, 3, 3))
    maps[1, 0, 2] = 1
    layer = np.asarray(pictures.heat_layer(maps, 60, 30).convert("RGBA"))
    assert layer.shape == (60, 30, 4)
    assert tuple(layer[31, 29]) == pictures.HEAT[-1]
    assert (layer[:30, :, 3] == 0).all() and layer[55, 2, 3] == 0


def test_a_chart_leaves_out_what_is_not_finite_and_keeps_markup_as_text():
    svg = pictures.chart([Curve("<b>", [0, 1, 2, 3], [1, np.nan, 3, 97])], title="a \"b\" <c>", x_label="x",
                         y_label="y", marks=[(2.5, "&")])
    assert "<b>" not in svg and "&lt;b&gt;" in svg and "nan" not in svg
    assert "100" in re.findall(r">([^<]*)</text>", svg)  # the axis goes on to a tick
    curve = re.search(r'<path class="c0"[^>]*d="([^"]*)"', svg)[1]
    assert curve.count("L") == 2
    for curves in ([Curve("one", [5], [0.0])], [Curve("none", [], [])]):
        assert "</svg>" in pictures.chart(curves, title="t", x_label="x", y_label="y")
