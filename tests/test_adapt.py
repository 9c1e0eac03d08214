"""The adapt command, on a run of a few steps."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from jlml_jax import adapt, load_extractor, norm_statistics, parallel
from jlml_jax.checkpoints import load_run
from jlml_jax.models import build_model
from jlml_jax.train import train_and_evaluate


def write_crops(folder, count, offset=0):
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 100, (count, 32, 16, 3), np.uint8) + np.uint8(offset)
    for i, crop in enumerate(pixels):
        Image.fromarray(crop).save(folder / f"{i:03d}.png")
    return folder, pixels


@pytest.fixture(scope="module")
def adapted(tiny_run, tmp_path_factory):
    """A folder that adapt has made, and the images that it was given."""
    folder = tmp_path_factory.mktemp("adapted")
    crops, pixels = write_crops(folder / "crops", 20, offset=120)
    adapt.adapt(tiny_run, str(crops), folder / "run")
    return folder / "run", pixels


def test_statistics_are_those_of_the_images_and_all_else_is_the_runs(adapted, tiny_run):
    folder, pixels = adapted
    ours, theirs = load_run(folder), load_run(tiny_run)
    for a, b in zip(*(jax.tree.leaves(run.variables["params"]) for run in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (ours.step, ours.label_map, ours.config) == (theirs.step, theirs.label_map, theirs.config)

    mesh = parallel.make_mesh()
    statistics = norm_statistics.make_statistics(build_model(theirs.config, 0), theirs.config, mesh)
    order = norm_statistics.chosen_images(len(pixels))
    assert sorted(order) == list(range(20))
    size = theirs.config.evaluate.batch_size
    expected = norm_statistics.of_batches(statistics, theirs.variables,
                                          norm_statistics.full_batches(pixels[order], size), mesh)
    for a, b, before in zip(*map(jax.tree.leaves, (ours.variables["batch_stats"], expected,
                                                   theirs.variables["batch_stats"])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert np.abs(a - before).max() > 1e-3


def test_commands_take_the_folder_and_its_features_are_others(adapted, tiny_extractor, capsys):
    folder, pixels = adapted
    extractor = load_extractor(folder)
    assert extractor.fingerprint != tiny_extractor.fingerprint
    assert np.abs(extractor(pixels) - tiny_extractor(pixels)).max() > 1e-2
    config = load_run(folder).config
    config.evaluate.picture = False
    rows = train_and_evaluate(config, folder)
    assert "is finished: 12 steps" in capsys.readouterr().out and rows[-1]["feature"] == "joint"


def test_a_run_that_has_not_ended_is_refused(tiny_run, tmp_path, refused_by):
    """It would train on, by another schedule than its own."""
    crops, _ = write_crops(tmp_path / "crops", 20)
    shutil.copytree(tiny_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["train"]["steps"] = 13
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert "at step 12 of 13; train it to its end" in refused_by(
        adapt, "--workdir", tmp_path / "run", "--images", crops, "--output", tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


def test_boxes_beyond_their_frame_are_cut_if_asked_for(tiny_run, tmp_path, run_command, refused_by):
    pixels = np.random.default_rng(0).integers(0, 100, (64, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    table = tmp_path / "boxes.csv"
    lines = [f"frame.png,{x % 2},{x},8,16,32" for x in range(18)] + ["frame.png,0,40,40,16,32", "frame.png,1,99,0,9,9"]
    table.write_text("\n".join(["image,camera,x,y,width,height", *lines]))
    arguments = ["--workdir", tiny_run, "--images", table, "--by_camera"]
    assert "2 of the first 20 images" in refused_by(adapt, *arguments, "--output", tmp_path / "run")
    status, told, error = run_command(adapt, *arguments, "--output", tmp_path / "cut", "--clip_boxes", "--keep_going")
    assert status == 0 and "adapted to 19 images, 10 of camera 0, 9 of camera 1" in told
    assert told.count("1 boxes cross the edge of their frame and are cut to it") == 1
    assert error.count("skipped: ") == 1
    lines[-2:] = ["frame.png,0,40,40,8,24"]  # as it is cut
    table.write_text("\n".join(["image,camera,x,y,width,height", *lines]))
    status, told, _ = run_command(adapt, *arguments, "--output", tmp_path / "same")
    assert status == 0 and "cut to it" not in told
    assert load_extractor(tmp_path / "cut").fingerprint == load_extractor(tmp_path / "same").fingerprint


def test_boxes_that_lie_apart_are_as_crops_in_their_order(tiny_run, tmp_path):
    crops, pixels = write_crops(tmp_path / "crops", 20)
    for number in range(2):
        Image.fromarray(np.concatenate(pixels[number::2])).save(tmp_path / f"{number}.png")
    (tmp_path / "boxes.csv").write_text("image,x,y,width,height\n" + "".join(
        f"{i % 2}.png,0,{i // 2 * 32},16,32\n" for i in range(20)))
    for name, images in (("of_crops", crops), ("of_boxes", tmp_path / "boxes.csv")):
        adapt.adapt(str(tiny_run), str(images), tmp_path / name)
    assert load_extractor(tmp_path / "of_crops").fingerprint == load_extractor(tmp_path / "of_boxes").fingerprint


def test_what_the_user_can_mend(adapted, tiny_run, tmp_path, run_command):
    crops, _ = write_crops(tmp_path / "crops", 15)

    def adapt_run(workdir, *flags):
        return run_command(adapt, "--workdir", workdir, "--images", crops, "--output", tmp_path / "run", *flags)

    status, _, error = adapt_run(tiny_run)
    assert status == 2 and "15 images are too few to adapt to; give at least 16" in error and error.count("\n") == 1
    (crops / "bad.png").write_bytes(b"no picture")
    for name in ("015.png", "016.png"):
        Image.new("RGB", (16, 32)).save(crops / name)
    status, _, error = adapt_run(tiny_run)
    assert status == 2 and "bad.png" in error and "--keep_going" in error
    status, _, error = adapt_run(tmp_path / "nothing")
    assert status == 2 and "nothing is not a run's folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["crops"]  # nothing half-written

    status, told, error = adapt_run(tiny_run, "--keep_going")
    assert status == 0 and "adapted to 17 images" in told and "bad.png" in error
    status, _, error = adapt_run(tiny_run)
    assert status == 2 and "is there already; give another --output" in error
