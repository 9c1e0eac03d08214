"""load_extractor, on a run of a few steps."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from processes import ROOT, run_program

from jlml_jax import datasets, evaluate, extract, features_file, load_extractor, parallel
from jlml_jax.checkpoints import load_run
from jlml_jax.errors import UserError
from jlml_jax.extractor import Extractor
from jlml_jax.models import build_model


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 16, 3), np.uint8)


def test_importing_the_package_imports_no_jax():
    program = ("import sys, jlml_jax; assert 'jax' not in sys.modules; "
               "jlml_jax.load_extractor; assert 'jax' in sys.modules")
    done = run_program(program)
    assert done.returncode == 0, done.stderr


def test_commands_on_a_users_own_images_do_without_tfds():
    program = ("import sys; from jlml_jax import adapt, calibrate, compare, export, extract, group, pack, search, "
               "unpack; assert 'tensorflow_datasets' not in sys.modules")
    done = run_program(program)
    assert done.returncode == 0, done.stderr


def test_features_are_those_of_the_evaluation(tiny_extractor, tiny_run, market1501_dir):
    """The run's own forward, with its identity layers, on a split of its own data set."""
    run = load_run(tiny_run)
    split = datasets.load("market1501", ("query",), str(market1501_dir))["query"]
    mesh = parallel.make_mesh(jax.devices()[:1])
    forward = evaluate.make_forward(build_model(run.config, 4), run.config, mesh)
    decoded = split.decode(32, 16)
    branches = {name: np.asarray(values) for name, values in forward(run.variables, decoded).items()}
    expected = evaluate.matching_features(branches, "per_branch")["joint"]
    assert (tiny_extractor.height, tiny_extractor.width, tiny_extractor.dim) == (32, 16, 32)
    got = tiny_extractor(decoded)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.std(got, axis=0).max() > 1e-3  # not all alike


def test_any_number_of_images_by_few_programs(tiny_extractor):
    batch = images(37)
    whole = tiny_extractor(batch)
    for count in range(38):
        features = tiny_extractor(batch[:count])
        assert features.shape == (count, 32)
        np.testing.assert_allclose(features, whole[:count], atol=1e-5)
    assert tiny_extractor.batch_size == 16
    assert tiny_extractor._forward._cache_size() == 3  # of 4, 8 and 16 images, on 4 devices


@pytest.mark.parametrize(("devices", "batch_size", "sizes"), [
    (1, 16, {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 9: 16, 16: 16}),
    (4, 16, {1: 4, 4: 4, 5: 8, 8: 8, 9: 16, 16: 16}),
    (3, 18, {1: 3, 3: 3, 4: 6, 7: 12, 13: 18, 18: 18}),  # 24 would be more than a full batch
])
def test_few_images_are_not_filled_up_to_a_full_batch(tiny_run, devices, batch_size, sizes):
    run = load_run(tiny_run)
    run.config.evaluate.batch_size = batch_size
    extractor = Extractor(run, parallel.make_mesh(jax.devices()[:devices]))
    fed, forward = [], extractor._forward
    extractor._forward = lambda variables, rows: fed.append(len(rows)) or forward(variables, rows)
    for count in sizes:
        extractor(images(count))
    assert fed == list(sizes.values())
    extractor(images(batch_size + 1))
    assert fed[len(sizes):] == [batch_size, devices]


@pytest.mark.parametrize("wrong", [
    np.zeros((2, 32, 16, 3), np.float32), np.zeros((32, 16, 3), np.uint8), np.zeros((2, 16, 32, 3), np.uint8),
    np.zeros((2, 3, 32, 16), np.uint8),
])
def test_other_shapes_and_dtypes_are_refused(tiny_extractor, wrong):
    with pytest.raises(ValueError, match=r"uint8 \[B, 32, 16, 3\], got"):
        tiny_extractor(wrong)


def test_crops_of_any_kind_and_size_are_embedded_as_extract_does(tiny_extractor, tiny_run, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "crops"
    folder.mkdir()
    arrays = [rng.integers(0, 256, (40 + 7 * i, 30 - i, 3), np.uint8) for i in range(19)]  # more than a batch
    files = [folder / f"{i:02d}.png" for i in range(len(arrays))]
    for array, file in zip(arrays, files, strict=True):
        Image.fromarray(array).save(file)
    assert extract.main([f"--workdir={tiny_run}", f"--images={folder}", f"--output={tmp_path / 'f.npz'}"]) == 0
    expected = features_file.read(tmp_path / "f.npz").features
    bgr = [np.ascontiguousarray(array[..., ::-1])[..., ::-1] for array in arrays]  # a view of what OpenCV gives
    for crops in (arrays, bgr, files, [str(file) for file in files], [Image.open(file) for file in files]):
        np.testing.assert_array_equal(tiny_extractor.embed_crops(crops), expected)
    assert tiny_extractor.embed_crops([]).shape == (0, 32)
    grey = arrays[0][..., 0]
    np.testing.assert_array_equal(tiny_extractor.embed_crops([grey, Image.fromarray(grey)]),
                                  tiny_extractor.embed_crops([np.stack([grey] * 3, axis=-1)] * 2))


def test_the_guides_function_for_trackers_embeds_the_boxes_of_a_frame(tiny_run):
    guide = (ROOT / "docs" / "own_crops.md").read_text()
    program, = re.findall(r"```python\n(import jlml_jax.*?)```", guide, re.DOTALL)
    defined = {}
    exec(program.replace("runs/pretrained", str(tiny_run)), defined)
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    features = defined["embed"](frame, [(-7.6, -3.2, 20.4, 40), (50, 20.5, 95.1, 70)])
    expected = defined["extractor"].embed_crops([frame[:40, :20, ::-1], frame[20:, 50:, ::-1]])
    np.testing.assert_array_equal(features, expected)
    assert np.abs(features - defined["extractor"].embed_crops([frame[:40, :20], frame[20:, 50:]])).max() > 1e-3


def test_crops_that_cannot_be_used_are_named(tiny_extractor, tmp_path):
    good = np.zeros((20, 10, 3), np.uint8)
    for bad in (good.astype(np.float32), good[..., :2], good[:0], np.zeros((1, 20, 10, 3), np.uint8)):
        with pytest.raises(ValueError, match="crop 1 must be uint8"):
            tiny_extractor.embed_crops([good, bad])
    for small in (good[:2], Image.new("RGB", (10, 2)), Image.new("RGB", (0, 0))):
        with pytest.raises(UserError, match=r"crop 1 has \d+ x \d pixels, which shows nobody"):
            tiny_extractor.embed_crops([good, small])
    Image.fromarray(good).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-30])
    with pytest.raises(UserError, match="crop 1 does not decode"):
        tiny_extractor.embed_crops([good, Image.open(tmp_path / "cut.png")])
    with pytest.raises(UserError, match="crop 1 has more than 8 bits"):
        tiny_extractor.embed_crops([good, Image.new("I;16", (10, 20))])
    with pytest.raises(UserError, match=r"nobody\.png cannot be read"):
        tiny_extractor.embed_crops([good, tmp_path / "nobody.png"])
    with pytest.raises(ValueError, match="1 cameras for 2 crops"):
        tiny_extractor.embed_crops([good, good], ["door"])


def test_one_crop_in_place_of_a_sequence_is_refused(tiny_extractor):
    """The rows of an array would count as grey crops."""
    for one in ("crop.jpg", Image.new("RGB", (16, 32)), images(1)[0], np.zeros((32, 16, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"not one.*; for one give \[crop\]"):
            tiny_extractor.embed_crops(one)
    assert tiny_extractor.embed_crops(images(2)[..., 0]).shape == (2, 32)


def test_a_forked_process_is_told_in_place_of_waiting_for_ever(tiny_run):
    program = f"""
import os
import signal
import warnings
import numpy as np
import jlml_jax

warnings.simplefilter("ignore")  # of JAX, of the fork
extractor = jlml_jax.load_extractor({str(tiny_run)!r})
for use in (lambda: extractor(np.zeros((1, 32, 16, 3), np.uint8)), lambda: jlml_jax.load_extractor({str(tiny_run)!r})):
    if not os.fork():
        signal.alarm(30)
        try:
            use()
        except jlml_jax.errors.UserError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
"""
    done = run_program(program)
    assert done.stdout.count("load it in each process, after the fork") == 2, done.stderr


@pytest.mark.parametrize("cameras", ["ab", [1, 2], np.array([1, 2]), ["a", None]])
def test_cameras_that_are_not_text_are_refused(tiny_extractor, cameras):
    """They would be none of the run's, and go by the statistics of all, unnoticed."""
    for embed in (tiny_extractor, tiny_extractor.embed_crops):
        with pytest.raises(ValueError, match="cameras must be a sequence of str"):
            embed(images(2), cameras)


def test_the_fingerprint_is_of_what_changes_features(tiny_extractor, tiny_run):
    def fingerprint(change):
        run = load_run(tiny_run)
        change(run)
        return type(tiny_extractor)(run, parallel.make_mesh()).fingerprint

    assert fingerprint(lambda run: None) == tiny_extractor.fingerprint
    same = [lambda run: run.config.train.update(steps=99), lambda run: run.config.data.update(data_dir="elsewhere"),
            lambda run: run.variables["params"]["global_identity"]["bias"].fill(7)]
    other = [lambda run: run.config.evaluate.update(normalize="none"),
             lambda run: run.config.data.update(mean=(0.0, 0.0, 0.0)),
             lambda run: run.variables["params"]["stem"]["conv"]["kernel"].__setitem__((0, 0, 0, 0), 7)]
    assert all(fingerprint(change) == tiny_extractor.fingerprint for change in same)
    assert len({tiny_extractor.fingerprint, *map(fingerprint, other)}) == 4


@pytest.mark.parametrize("of_run", [True, False])
def test_flip_average_is_the_runs_unless_it_is_given(tiny_run, tmp_path, of_run):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = json.loads((run / "config.json").read_text())
    config["evaluate"]["flip_average"] = of_run
    (run / "config.json").write_text(json.dumps(config))
    with_mirror, without = (load_extractor(run, flip_average=given) for given in (True, False))
    assert with_mirror.fingerprint != without.fingerprint
    assert load_extractor(run).fingerprint == (with_mirror if of_run else without).fingerprint
    batch = images(3)
    np.testing.assert_allclose(with_mirror(batch), with_mirror(batch[:, :, ::-1]), atol=1e-6)
    assert np.abs(without(batch) - without(batch[:, :, ::-1])).max() > 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(tiny_run, monkeypatch, bad):
    run = load_run(tiny_run)
    run.variables["params"]["global_head"]["fc"]["bias"][3] = bad
    monkeypatch.setattr("jlml_jax.extractor.load_run", lambda workdir: run)
    with pytest.raises(UserError, match="features are not finite; the weights are unusable"):
        load_extractor(tiny_run)(images(2))
