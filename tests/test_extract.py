"""load_extractor and the extract command, on a run of two steps."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jlml_jax import datasets, evaluate, extract, features_file, load_extractor, parallel
from jlml_jax.checkpoints import load_run
from jlml_jax.errors import UserError
from jlml_jax.models import build_model

ROOT = Path(__file__).parents[1]


@pytest.fixture
def crops(tmp_path):
    """Twenty noise images of several sizes, of two identities and two cameras by their names."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "crops"
    folder.mkdir()
    for i in range(20):
        pixels = rng.integers(0, 256, (40 + i, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i % 2:04d}_c{1 + i // 10}s1_{i:06d}_00.png")
    return folder


def run(capsys, *arguments):
    status = extract.main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 16, 3), np.uint8)


def test_importing_the_package_imports_no_jax():
    program = ("import sys, jlml_jax; assert 'jax' not in sys.modules; "
               "jlml_jax.load_extractor; assert 'jax' in sys.modules")
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)


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


def test_any_number_of_images_and_no_compilation_for_each(tiny_extractor):
    batch = images(37)
    whole = tiny_extractor(batch)
    tiny_extractor(batch[:1])
    compiled = tiny_extractor._forward._cache_size()
    for count in (0, 1, 2, 3, 5, 15, 16, 17, 37):
        features = tiny_extractor(batch[:count])
        assert features.shape == (count, 32)
        np.testing.assert_allclose(features, whole[:count], atol=1e-5)
    assert tiny_extractor._forward._cache_size() == compiled == 2


@pytest.mark.parametrize("wrong", [
    np.zeros((2, 32, 16, 3), np.float32), np.zeros((32, 16, 3), np.uint8), np.zeros((2, 16, 32, 3), np.uint8),
    np.zeros((2, 3, 32, 16), np.uint8),
])
def test_other_shapes_and_dtypes_are_refused(tiny_extractor, wrong):
    with pytest.raises(ValueError, match=r"uint8 \[B, 32, 16, 3\], got"):
        tiny_extractor(wrong)


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


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_folder_to_a_file(capsys, tiny_run, tiny_extractor, crops, tmp_path, suffix):
    output = tmp_path / f"features{suffix}"
    output.write_text("what was there before")
    status, out, err = run(capsys, f"--workdir={tiny_run}", f"--images={crops}", f"--output={output}")
    assert status == 0, err
    table = features_file.read(output)
    names = sorted(path.name for path in crops.iterdir())
    assert table.files.tolist() == names and "20 images" in out
    assert table.identities.tolist() == ["distractor"] * 10 + ["1"] * 10 and set(table.cameras) == {"1", "2"}
    assert (table.root, table.fingerprint, table.boxes) == (str(crops), tiny_extractor.fingerprint, None)
    for row in (0, 17):
        pixels = np.asarray(Image.open(crops / names[row]).resize((16, 32), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(table.features[row], tiny_extractor(pixels[None])[0], atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crops", output.name]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_flipped_bit_is_told_or_changes_nothing(tmp_path, suffix):
    rng = np.random.default_rng(0)
    table = features_file.FeaturesFile(rng.standard_normal((50, 8)).astype(np.float32), *np.array([["a"] * 50] * 3),
                                       None, "root", "f" * 16)
    path = tmp_path / f"features{suffix}"
    features_file.write(path, table)
    whole = path.read_bytes()
    start = whole.index(table.features.tobytes()[:64])  # NumPy and Parquet both have the numbers as they are
    for position in rng.integers(start, start + table.features.nbytes, 50):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a whole file of features|checksum verification failed"):
            features_file.read(path)


def test_boxes_of_frames(capsys, tiny_run, tiny_extractor, loaded_once, tmp_path):
    frame = images(1)[0].repeat(4, 0).repeat(4, 1)
    Image.fromarray(frame).save(tmp_path / "frame.png")
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("image,camera,x,y,width,height\nframe.png,7,8,16,16,32\nframe.png,7,0,0,64,128\n")
    for suffix in (".npz", ".parquet"):
        output = tmp_path / f"out{suffix}"
        status, _, err = run(capsys, f"--workdir={tiny_run}", f"--images={boxes}", f"--output={output}")
        assert status == 0, err
        table = features_file.read(output)
        assert table.boxes.tolist() == [[8, 16, 16, 32], [0, 0, 64, 128]] and table.image(1).box == (0, 0, 64, 128)
        assert table.cameras.tolist() == ["7", "7"] and table.identities.tolist() == ["", ""]
        np.testing.assert_allclose(table.features[0], tiny_extractor(frame[16:48, 8:24][None])[0], atol=1e-5)


def test_bad_images_stop_it_or_are_skipped(capsys, tiny_run, loaded_once, crops, tmp_path):
    (crops / "0000_c1s1_000004_00.png").write_text("text")
    (crops / "0001_c2s1_000011_00.png").write_bytes(b"")
    arguments = [f"--workdir={tiny_run}", f"--images={crops}", f"--output={tmp_path / 'f.npz'}"]
    status, _, err = run(capsys, *arguments)
    assert status == 2 and err.startswith("error: 2 of the first 20 images (of 20) are bad: 0000_c1s1_000004_00.png is")
    assert "0001_c2s1_000011_00.png" in err and "--keep_going" in err and err.count("\n") == 1
    assert not (tmp_path / "f.npz").exists()

    status, out, err = run(capsys, *arguments, "--keep_going")
    assert status == 0 and "18 images" in out
    assert err.count("skipped: ") == 2 and "2 of 20 images were skipped" in err
    assert len(features_file.read(tmp_path / "f.npz")) == 18

    for path in crops.iterdir():
        path.write_text("text")
    status, _, err = run(capsys, *arguments, "--keep_going")
    assert status == 2 and "no image can be read" in err
    assert len(features_file.read(tmp_path / "f.npz")) == 18  # as it was


@pytest.mark.parametrize(("output", "message"), [
    ("features.csv", "neither .npz nor .parquet"), ("nowhere/features.npz", "nowhere is not a folder"),
])
def test_an_output_that_cannot_be_is_refused_before_the_work(capsys, tiny_run, crops, output, message):
    status, _, err = run(capsys, f"--workdir={tiny_run}", f"--images={crops}", f"--output={output}")
    assert status == 2 and message in err


def test_without_pyarrow_it_says_how_to_install_it(capsys, monkeypatch, tiny_run, crops, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, _, err = run(capsys, f"--workdir={tiny_run}", f"--images={crops}", f"--output={tmp_path / 'f.parquet'}")
    assert status == 2 and "pip install pyarrow" in err


def test_a_full_disk_leaves_what_was_there(capsys, monkeypatch, tiny_run, loaded_once, crops, tmp_path):
    output = tmp_path / "f.npz"
    arguments = [f"--workdir={tiny_run}", f"--images={crops}", f"--output={output}"]
    assert run(capsys, *arguments)[0] == 0
    before = output.read_bytes()

    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    status, _, err = run(capsys, *arguments)
    assert status == 2 and "No space left" in err
    assert output.read_bytes() == before and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["f.npz"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(tiny_run, monkeypatch, bad):
    run = load_run(tiny_run)
    run.variables["params"]["global_head"]["fc"]["bias"][3] = bad
    monkeypatch.setattr("jlml_jax.extractor.load_run", lambda workdir: run)
    with pytest.raises(UserError, match="features are not finite; the weights are unusable"):
        load_extractor(tiny_run)(images(2))


def test_files_that_are_not_whole_or_hold_pickles_are_refused(tmp_path):
    good = features_file.FeaturesFile(np.ones((2, 3), np.float32), np.array(["a", "b"]), np.array(["", ""]),
                                      np.array(["", ""]), None, "/", "f" * 16)
    path = tmp_path / "f.npz"
    features_file.write(path, good)
    whole = path.read_bytes()
    arrays = dict(np.load(path))
    path.write_bytes(whole[:-40])
    damaged = [path]
    for name, change in {
        "pickle": {"files": np.array(["a", {}], object)}, "short": {"cameras": np.array(["a"])},
        "text": {"root": np.array(3)},
        "nan": {"features": np.full((2, 3), np.nan, np.float32)}, "double": {"features": np.ones((2, 3))},
    }.items():
        damaged.append(tmp_path / f"{name}.npz")
        np.savez(damaged[-1], **arrays | change)
    for at, value, name in ((6, 1, "encrypted"), (6, 32, "patched"), (8, 99, "compressed"), (4, 99, "version")):
        damaged.append(tmp_path / f"{name}.npz")
        changed = bytearray(whole)
        changed[whole.index(b"PK\1\2") + 2 + at] = value
        changed[at] = value
        damaged[-1].write_bytes(changed)
    np.savez_compressed(tmp_path / "deflated.npz", **arrays)
    deflated = bytearray((tmp_path / "deflated.npz").read_bytes())
    deflated[60:100] = b"\xff" * 40
    damaged.append(tmp_path / "deflated.npz")
    damaged[-1].write_bytes(deflated)
    for name in ("lacking.npz", "other.parquet"):
        (tmp_path / name).write_bytes(b"text")
        damaged.append(tmp_path / name)
    for bad in damaged:
        with pytest.raises(features_file.UserError, match=bad.name):
            features_file.read(bad)


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        extract.main(["--help"])
    assert stop.value.code == 0 and "python -m jlml_jax.extract --workdir=runs/market1501" in capsys.readouterr().out


def test_a_file_beside_the_output_is_left_alone(tmp_path):
    """Two at once write to files of their own, and nobody's file has such a name."""
    table = features_file.FeaturesFile(np.zeros((1, 2), np.float32), *[np.array(["a"])] * 3, None, "/", "f" * 16)
    (tmp_path / "f.npz.part").write_text("mine")
    features_file.write(tmp_path / "f.npz", table)
    assert (tmp_path / "f.npz.part").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
