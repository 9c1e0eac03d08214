"""The VIPeR builder, on a miniature of the original layout."""

import numpy as np
import pytest
from miniatures import VIPER_PREFIXES, write_viper
from PIL import Image

from jlml_jax import datasets, prepare
from jlml_jax.datasets.viper import FOLDERS, ROOT, Viper


@pytest.fixture
def original(tmp_path, monkeypatch):
    folder = tmp_path / "original" / ROOT
    monkeypatch.setattr(Viper, "EXPECTED", write_viper(folder))
    return folder


@pytest.fixture
def arguments(original, tmp_path):
    return "viper", f"--source={original}", f"--data_dir={tmp_path / 'data'}"


def test_published_counts():
    assert {split: counts["identities"] for split, counts in Viper.EXPECTED.items()} == {"cam_a": 632, "cam_b": 632}


@pytest.mark.parametrize("above", [False, True])
def test_splits_hold_the_original_pixels_and_their_labels(capsys, original, tmp_path, above):
    prepare.prepare("viper", original.parent if above else original, tmp_path / "data")
    out = capsys.readouterr().out
    assert ["cam_b", "identities", "5", "5"] in [line.split() for line in out.splitlines()]
    assert "left out" not in out  # Thumbs.db is of the data set
    splits = datasets.load("viper", FOLDERS, tmp_path / "data")
    for camera, (folder, split) in enumerate(splits.items(), 1):
        files = sorted((original / folder).glob("*.bmp"))
        assert split.dataset == "viper"
        assert split.names.tolist() == [f"{folder}/{path.name}" for path in files]
        assert split.identities.tolist() == [prefix + 1 for prefix in VIPER_PREFIXES]
        assert set(split.cameras) == {camera}
        for image, pixels, path in zip(split.images, split.decode(128, 48), files, strict=True):
            assert image.startswith(b"\x89PNG")
            np.testing.assert_array_equal(pixels, np.asarray(Image.open(path)))


def test_missing_folders(refused, original, arguments):
    assert "is not a folder; give the unpacked VIPeR, which has cam_a/, cam_b/" in refused(
        "viper", f"--source={original / 'no such'}", arguments[2])
    (original / "cam_b").rename(original / "cam_c")
    assert "lacks cam_b/;" in refused(*arguments)


def test_another_release(refused, original, arguments):
    for path in original.glob("cam_*/*.bmp"):  # as the normalised ones, and others, come
        path.rename(path.with_suffix(".png"))
    assert "cam_a has 0 images instead of 5" in refused(*arguments)
    assert "has no images of cam_a, cam_b;" in refused(*arguments, "--incomplete=PNG")


def test_unparsable_names(refused, original, arguments):
    for name in ("1_45.bmp", "001_45 (1).bmp", "001.BMP", "001_45.bmp.bmp"):
        (original / "cam_b" / name).touch()
    error = refused(*arguments)
    assert "4 image names in" in error
    assert "not like 001_45.bmp: cam_b/001.BMP, cam_b/001_45 (1).bmp, cam_b/001_45.bmp.bmp, ...;" in error


def test_strays_are_reported(capsys, original, tmp_path):
    (original / "cam_a" / "._001_45.bmp").touch()
    prepare.prepare("viper", original, tmp_path / "data")
    assert "1 files not of the data set are left out: cam_a/._001_45.bmp" in capsys.readouterr().out


def test_people_in_one_camera_alone(refused, original, arguments, tmp_path):
    (original / "cam_b" / "873_90.bmp").rename(original / "cam_b" / "872_90.bmp")  # the counts are right
    (original / "cam_a" / "000_0.bmp").unlink()
    alone = ("3 people are in one of cam_a and cam_b alone and left out: "
             "cam_a/873_45.bmp, cam_b/000_180.bmp, cam_b/872_90.bmp;")
    assert f"does not hold the data set as published: {alone}" in refused(*arguments)

    assert prepare.main([*arguments, "--incomplete=some were lost"]) == 0
    splits = datasets.load("viper", FOLDERS, tmp_path / "data")
    assert [split.identities.tolist() for split in splits.values()] == [[2, 6, 18]] * 2
    incomplete = datasets.metadata("viper", tmp_path / "data")["incomplete"]
    assert incomplete.startswith(f"some were lost; {alone} cam_a has 3 images instead of 5; ")


def test_wrong_counts(refused, original, arguments):
    for path in original.glob("cam_*/017_*"):
        path.unlink()
    (original / "cam_a" / "000_90.bmp").write_bytes((original / "cam_a" / "000_0.bmp").read_bytes())
    assert "cam_a has 4 identities instead of 5; cam_b has 4 images instead of 5;" in refused(*arguments)


def test_undecodable_images(refused, original, arguments, tmp_path):
    path = original / "cam_a" / "001_45.bmp"
    path.write_bytes(path.read_bytes()[:5000])
    (original / "cam_b" / "000_180.bmp").write_bytes(b"")
    error = refused(*arguments)
    assert "2 of 10 images in" in error
    assert "cam_a/001_45.bmp does not decode" in error
    assert "cam_b/000_180.bmp is not an image" in error
    assert not Viper(data_dir=tmp_path / "data").is_prepared()
