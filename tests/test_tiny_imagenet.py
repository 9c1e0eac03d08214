"""The Tiny-ImageNet builder, on a miniature of the original layout."""

import shutil

import numpy as np
import pytest
from tiny_imagenet_miniature import VALIDATION, WNIDS, write_annotations, write_tiny_imagenet

from configs import default
from jlml_jax import datasets, prepare, protocols
from jlml_jax.datasets.tiny_imagenet import ANNOTATIONS, ROOT, TinyImagenet
from jlml_jax.errors import UserError


@pytest.fixture
def original(tmp_path, monkeypatch):
    folder = tmp_path / "original" / ROOT
    monkeypatch.setattr(TinyImagenet, "EXPECTED", write_tiny_imagenet(folder))
    return folder


@pytest.fixture
def arguments(original, tmp_path):
    return "tiny_imagenet", f"--source={original}", f"--data_dir={tmp_path / 'data'}"


def test_published_counts():
    assert TinyImagenet.EXPECTED == {"train": {"images": 200 * 500, "identities": 200, "cameras": 1},
                                     "validation": {"images": 200 * 50, "identities": 200, "cameras": 1}}


@pytest.mark.parametrize("above", [False, True])
def test_splits_hold_the_original_files_and_their_classes(capsys, original, tmp_path, above):
    prepare.prepare("tiny_imagenet", original.parent if above else original, tmp_path / "data")
    out = capsys.readouterr().out
    assert ["validation", "identities", "3", "3"] in [line.split() for line in out.splitlines()]
    assert "left out" not in out  # test images and boxes are of the data set
    splits = datasets.load("tiny_imagenet", ("train", "validation"), tmp_path / "data")
    classes = sorted(WNIDS)
    for name, split in splits.items():
        assert split.dataset == "tiny_imagenet"
        assert set(split.cameras) == {1}
        assert split.identities.dtype == np.int64
        assert split.names.tolist() == sorted(split.names)
        for image, identity, file in zip(split.images, split.identities, split.names, strict=True):
            wnid = VALIDATION[file] if name == "validation" else file.split("_")[0]
            assert identity == classes.index(wnid) + 1
            folder = "val" if name == "validation" else f"train/{wnid}"
            assert image == (original / folder / "images" / file).read_bytes()
    assert splits["train"].decode(64, 64).shape == (12, 64, 64, 3)  # grey ones, too
    metadata = datasets.builder("tiny_imagenet", tmp_path / "data").info.metadata
    assert metadata["classes"] == classes
    assert metadata["words"] == ["goldfish, Carassius auratus", "Egyptian cat", ""]


def test_missing_files(refused, original, arguments):
    assert "is not a folder; give the unpacked tiny-imagenet-200, which has wnids.txt," in refused(
        "tiny_imagenet", f"--source={original / 'no such'}", arguments[2])
    (original / ANNOTATIONS).unlink()
    shutil.rmtree(original / "train")
    assert "lacks train/, val/val_annotations.txt;" in refused(*arguments)


def test_class_folders_and_the_list_of_classes(refused, original, arguments):
    (original / "train" / "n01443537").rename(original / "train" / "n01443538")
    error = refused(*arguments)
    assert "1 folders of" in error and "are of no class in wnids.txt: n01443538;" in error
    shutil.rmtree(original / "train" / "n01443538")
    error = refused(*arguments)
    assert "1 classes in wnids.txt have no images in" in error and ": train/n01443537/images;" in error


def test_images_that_are_not_named_after_their_class(refused, original, arguments):
    images = original / "train" / "n01443537" / "images"
    (images / "n01443537_0.JPEG").rename(images / "n02124075_7.JPEG")
    assert "another class than their folder: train/n01443537/images/n02124075_7.JPEG;" in refused(*arguments)
    (images / "n02124075_7.JPEG").rename(images / "n01443537_0 (1).jpeg")
    assert "not like n01443537_0.JPEG: train/n01443537/images/n01443537_0 (1).jpeg;" in refused(*arguments)


@pytest.mark.parametrize("change, message", [
    ({"val_99.JPEG": WNIDS[0]}, "val_annotations.txt name no file in val/images: val_99.JPEG;"),
    ({"val_1.JPEG": "n00001740"}, "val_annotations.txt have no class of wnids.txt: val_1.JPEG n00001740 0 32 44 62;"),
    ({"val_1.JPEG": ""}, "1 lines of"),
    ({"val_1.JPEG": None}, "are not in val/val_annotations.txt: val_1.JPEG;"),
])
def test_annotations_and_images_that_differ(refused, original, arguments, change, message):
    wnids = {name: wnid for name, wnid in (VALIDATION | change).items() if wnid is not None}
    write_annotations(original, wnids)
    assert message in refused(*arguments)


def test_annotations_that_are_damaged(refused, original, arguments):
    path = original / ANNOTATIONS
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[2])
    assert "val_annotations.txt has 1 images twice;" in refused(*arguments)
    path.write_bytes(whole[:-20])
    assert "no class of wnids.txt: val_3.JPEG n;" in refused(*arguments)
    path.write_bytes(b"\xff\xfe\x00" + whole)
    assert "name no file in val/images" in refused(*arguments)


def test_strays_are_reported(capsys, original, tmp_path):
    (original / "train" / ".DS_Store").touch()
    (original / "val" / "images" / "._val_0.JPEG").touch()
    prepare.prepare("tiny_imagenet", original, tmp_path / "data")
    assert ("2 files not of the data set are left out: train/.DS_Store; val/images/._val_0.JPEG"
            in capsys.readouterr().out)


def test_wrong_counts(refused, original, arguments):
    (original / "train" / "n01443537" / "images" / "n01443537_499.JPEG").unlink()
    assert "train has 11 images instead of 12;" in refused(*arguments)


def test_a_class_without_training_images_is_refused(original, tmp_path):
    """Its validation images would count as another class's."""
    for path in (original / "train" / "n02124075" / "images").iterdir():
        path.unlink()
    prepare.prepare("tiny_imagenet", original, tmp_path / "data", incomplete="a class is missing")
    config = default.get_config().data
    config.data_dir = str(tmp_path / "data")
    with pytest.raises(UserError, match="no training images, of 1 classes: n02124075; add these and prepare it again"):
        protocols.load("tiny_imagenet", config)


def test_undecodable_images(refused, original, arguments, tmp_path):
    path = original / "train" / "n01443537" / "images" / "n01443537_0.JPEG"
    path.write_bytes(path.read_bytes()[:-500])
    (original / "val" / "images" / "val_3.JPEG").write_bytes(b"")
    error = refused(*arguments)
    assert "2 of 18 images in" in error
    assert "train/n01443537/images/n01443537_0.JPEG does not decode" in error
    assert "val/images/val_3.JPEG is not an image" in error
    assert not TinyImagenet(data_dir=tmp_path / "data").is_prepared()
