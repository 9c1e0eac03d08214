"""Tiny-ImageNet-200 (Stanford CS231N, 2015) from the folder as its archive unpacks: a small stand-in for ImageNet."""

import re
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from jlml_jax.datasets.base import BenchmarkBuilder, Crop, Originals, parse_names, unpacked_root
from jlml_jax.errors import UserError, first_few

ROOT = "tiny-imagenet-200"
CLASSES, WORDS = "wnids.txt", "words.txt"
ANNOTATIONS = "val/val_annotations.txt"  # val_0.JPEG, class, box: separated by tabs
CAMERA = 1  # of all images: nobody tells

_TRAIN_NAME = re.compile(r"(?P<wnid>n\d{8})_\d+\.JPEG")
_VALIDATION_NAME = re.compile(r"val_\d+\.JPEG")


class TinyImagenet(BenchmarkBuilder):
    """Splits train and validation of 64 x 64 images; test, which is published without labels, is left out.

    An identity is a class: 1 and up, in the order of the sorted WordNet ids. The metadata has, in that order,
    `classes`, the WordNet ids, and `words`, what they stand for.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The files of tiny-imagenet-200.zip."}
    DESCRIPTION = (
        "Tiny-ImageNet-200: 200 classes of ImageNet in images of 64 x 64 pixels, 500 a class for training and 50 for "
        "validation. For research only; may not be passed on."
    )
    HOMEPAGE = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    CITATION = """@techreport{le2015tiny,
  title={Tiny {ImageNet} Visual Recognition Challenge},
  author={Le, Ya and Yang, Xuan},
  institution={Stanford University, CS 231N},
  year={2015}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Get {HOMEPAGE}, unpack it, and give the unpacked folder, with train, val and {CLASSES} in it."
    )
    EXPECTED = {
        "train": {"images": 100_000, "identities": 200, "cameras": 1},
        "validation": {"images": 10_000, "identities": 200, "cameras": 1},
    }

    @classmethod
    def inspect(cls, source: Path) -> Originals:
        """Lists the images in `source`, the unpacked folder or the one above it, by its folders and annotations."""
        root = unpacked_root(source, ROOT, [CLASSES, WORDS, "train/", "val/images/", ANNOTATIONS])
        classes = sorted(set(_read_text(root / CLASSES).split()))
        words = dict(line.split("\t", 1) for line in _read_text(root / WORDS).splitlines() if "\t" in line)
        identities = {wnid: identity for identity, wnid in enumerate(classes, 1)}
        train, train_strays = _list_train(root, identities)
        validation, validation_strays = _list_validation(root, identities)
        return Originals({"train": train, "validation": validation}, train_strays + validation_strays,
                         {"classes": classes, "words": [words.get(wnid, "") for wnid in classes]})


def _read_text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace")  # what is damaged is told by what then is not found


def _list_train(root: Path, identities: dict[str, int]) -> tuple[list[Crop], list[str]]:
    entries = sorted((root / "train").iterdir())
    strays = [f"train/{path.name}" for path in entries if not path.is_dir()]
    found = {path.name for path in entries if path.is_dir()}
    _refuse(sorted(found - identities.keys()), f"folders of {root / 'train'} are of no class in {CLASSES}")
    folders = {wnid: f"train/{wnid}/images" for wnid in identities}
    _refuse([folder for folder in folders.values() if not (root / folder).is_dir()],
            f"classes in {CLASSES} have no images in {root}")
    images, more_strays = parse_names(root, list(folders.values()), _TRAIN_NAME, {".jpeg", ".jpg"}, "n01443537_0.JPEG")
    _refuse([f"{folder}/{path.name}" for wnid, folder in folders.items() for path, match in images[folder]
             if match["wnid"] != wnid], f"images in {root} are named after another class than their folder")
    return [Crop(path.name, identities[wnid], CAMERA, f"{folder}/{path.name}", path.read_bytes)
            for wnid, folder in folders.items() for path, _ in images[folder]], strays + more_strays


def _list_validation(root: Path, identities: dict[str, int]) -> tuple[list[Crop], list[str]]:
    images, strays = parse_names(root, ["val/images"], _VALIDATION_NAME, {".jpeg", ".jpg"}, "val_0.JPEG")
    paths = {path.name: path for path, _ in images["val/images"]}
    rows = [line.split("\t") for line in _read_text(root / ANNOTATIONS).splitlines()]
    where = f"lines of {root / ANNOTATIONS}"
    _refuse(["\t".join(row) for row in rows if len(row) < 2 or row[1] not in identities],
            f"{where} have no class of {CLASSES}")
    _refuse([row[0] for row in rows if row[0] not in paths], f"{where} name no file in val/images")
    wnids = {row[0]: row[1] for row in rows}
    _refuse(sorted(paths.keys() - wnids.keys()), f"images in {root / 'val/images'} are not in {ANNOTATIONS}")
    if len(wnids) != len(rows):
        raise UserError(f"{root / ANNOTATIONS} has {len(rows) - len(wnids)} images twice; unpack or copy it again")
    return [Crop(name, identities[wnids[name]], CAMERA, f"val/images/{name}", path.read_bytes)
            for name, path in paths.items()], strays


def _refuse(offenders: Sequence[str], what: str) -> None:
    """A UserError if there are any `offenders`; `what` follows their number."""
    if offenders:
        raise UserError(f"{len(offenders):,} {what}: {first_few(offenders)}; unpack or copy the original files again")
