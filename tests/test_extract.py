"""The extract command, on a run of a few steps."""

import os
import sys

import numpy as np
import pytest
from PIL import Image

from jlml_jax import extract, features_file
from jlml_jax.extractor import embed_all
from jlml_jax.user_images import list_images


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


def test_embedded_images_are_kept_without_their_pixels(tiny_extractor, crops):
    """Those of a hundred thousand images would fill the memory."""
    embedded, features = embed_all(list_images(str(crops)).images, tiny_extractor, keep_going=False)
    assert len(embedded) == len(features) == 20 > tiny_extractor.batch_size
    assert all(loaded.pixels is None and len(loaded.digest) == 32 for loaded in embedded)


def test_features_are_in_the_order_of_the_list_wherever_a_frame_s_boxes_are(tiny_extractor, tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (32, 40, 3), np.uint8) for _ in range(3)]
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    lines = [(number, x) for x in (0, 5, 30, 10) for number in range(3)]  # at 30 they cross the edge
    (tmp_path / "boxes.csv").write_text("image,x,y,width,height\n" + "".join(
        f"{number}.png,{x},0,16,32\n" for number, x in lines))
    embedded, features = embed_all(list_images(str(tmp_path / "boxes.csv")).images, tiny_extractor, keep_going=True)
    good = [(number, x) for number, x in lines if x != 30]
    assert [(int(loaded.image.file[0]), loaded.image.box[0]) for loaded in embedded] == good
    expected = tiny_extractor(np.stack([frames[number][:, x:x + 16] for number, x in good]))
    np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_folder_to_a_file(run_command, tiny_run, tiny_extractor, crops, tmp_path, suffix):
    output = tmp_path / f"features{suffix}"
    output.write_text("what was there before")
    status, out, err = run_command(extract, f"--workdir={tiny_run}", f"--images={crops}", f"--output={output}")
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


def test_boxes_of_frames(run_command, tiny_run, tiny_extractor, loaded_once, tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (32, 16, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(frame).save(tmp_path / "frame.png")
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("image,camera,x,y,width,height\nframe.png,7,8,16,16,32\nframe.png,7,0,0,64,128\n")
    for suffix in (".npz", ".parquet"):
        output = tmp_path / f"out{suffix}"
        status, _, err = run_command(extract, f"--workdir={tiny_run}", f"--images={boxes}", f"--output={output}")
        assert status == 0, err
        table = features_file.read(output)
        assert table.boxes.tolist() == [[8, 16, 16, 32], [0, 0, 64, 128]] and table.image(1).box == (0, 0, 64, 128)
        assert table.cameras.tolist() == ["7", "7"] and table.identities.tolist() == ["", ""]
        np.testing.assert_allclose(table.features[0], tiny_extractor(frame[16:48, 8:24][None])[0], atol=1e-5)


def test_boxes_beyond_their_frame_are_cut_if_asked_for(
        run_command, refused_by, tiny_run, tiny_extractor, loaded_once, tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (32, 16, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(frame).save(tmp_path / "frame.png")
    boxes, output = tmp_path / "boxes.csv", tmp_path / "out.npz"
    boxes.write_text("image,x,y,width,height\nframe.png,48,96,40,50\nframe.png,0,0,64,128\nframe.png,64,0,9,9\n")
    arguments = [f"--workdir={tiny_run}", f"--images={boxes}", f"--output={output}"]
    assert "2 of the first 3 images (of 3) are bad" in refused_by(extract, *arguments)
    assert "1 of the first 3 images (of 3) are bad" in refused_by(extract, *arguments, "--clip_boxes")
    status, out, err = run_command(extract, *arguments, "--clip_boxes", "--keep_going")
    assert status == 0 and "1 of 3 images were skipped" in err
    assert out.splitlines()[0] == "1 boxes cross the edge of their frame and are cut to it"
    table = features_file.read(output)
    assert table.boxes.tolist() == [[48, 96, 16, 32], [0, 0, 64, 128]]  # as they were cropped
    np.testing.assert_allclose(table.features[0], tiny_extractor(frame[96:, 48:][None])[0], atol=1e-5)


def test_bad_images_stop_it_or_are_skipped(run_command, tiny_run, loaded_once, crops, tmp_path):
    (crops / "0000_c1s1_000004_00.png").write_text("text")
    (crops / "0001_c2s1_000011_00.png").write_bytes(b"")
    arguments = [f"--workdir={tiny_run}", f"--images={crops}", f"--output={tmp_path / 'f.npz'}"]
    status, _, err = run_command(extract, *arguments)
    assert status == 2 and err.startswith("error: 2 of the first 20 images (of 20) are bad: 0000_c1s1_000004_00.png is")
    assert "0001_c2s1_000011_00.png" in err and "--keep_going" in err and err.count("\n") == 1
    assert not (tmp_path / "f.npz").exists()

    status, out, err = run_command(extract, *arguments, "--keep_going")
    assert status == 0 and "18 images" in out
    assert err.count("skipped: ") == 2 and "2 of 20 images were skipped" in err
    assert len(features_file.read(tmp_path / "f.npz")) == 18

    for path in crops.iterdir():
        path.write_text("text")
    status, _, err = run_command(extract, *arguments, "--keep_going")
    assert status == 2 and "no image can be read" in err
    assert len(features_file.read(tmp_path / "f.npz")) == 18  # as it was


@pytest.mark.parametrize(("output", "message"), [
    ("features.csv", "neither .npz nor .parquet"), ("nowhere/features.npz", "nowhere is not a folder"),
])
def test_an_output_that_cannot_be_is_refused_before_the_work(run_command, tiny_run, crops, output, message):
    status, _, err = run_command(extract, f"--workdir={tiny_run}", f"--images={crops}", f"--output={output}")
    assert status == 2 and message in err


def test_without_pyarrow_it_says_how_to_install_it(run_command, monkeypatch, tiny_run, crops, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, _, err = run_command(extract, f"--workdir={tiny_run}", f"--images={crops}",
                                 f"--output={tmp_path / 'f.parquet'}")
    assert status == 2 and "pip install pyarrow" in err


def test_a_full_disk_leaves_what_was_there(run_command, monkeypatch, tiny_run, loaded_once, crops, tmp_path):
    output = tmp_path / "f.npz"
    arguments = [f"--workdir={tiny_run}", f"--images={crops}", f"--output={output}"]
    assert run_command(extract, *arguments)[0] == 0
    before = output.read_bytes()

    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    status, _, err = run_command(extract, *arguments)
    assert status == 2 and "No space left" in err
    assert output.read_bytes() == before and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["f.npz"]


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        extract.main(["--help"])
    assert stop.value.code == 0 and "python -m jlml_jax.extract --workdir=runs/market1501" in capsys.readouterr().out
