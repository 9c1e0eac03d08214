"""QMUL underGround Re-IDentification, GRID (Loy, Xiang, Gong, CVPR 2009) from the folder as its archive unpacks."""

import re
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jlml_jax.datasets.base import BenchmarkBuilder, Crop, Originals, drop_unmatched, parse_names, unpacked_root
from jlml_jax.datasets.matlab import integers, read_mat
from jlml_jax.errors import UserError

ROOT = "underground_reid"
FOLDERS = ("probe", "gallery")  # the splits have the same names
PARTITIONS = "features_and_partitions.mat"
NUM_PARTITIONS = 10

# 0001_1_25004_107_32_106_221.jpeg: identity, camera, frame, box in the frame.
_NAME = re.compile(r"(?P<identity>\d{4})_(?P<camera>[1-8])_\d+_\d+_\d+_\d+_\d+\.jpeg")


class Grid(BenchmarkBuilder):
    """Splits probe and gallery: an image each of the same people; the gallery has distractors, of identity 0, too.

    The metadata has the official partitions: `partitions`, a list of {"train": [identity], "test": [identity]}, sorted;
    of an incomplete copy, they are still those of all 250 people.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The files of underground_reid."}
    DESCRIPTION = (
        "GRID: 250 people in an underground station, each in two images from disjoint cameras, and 775 images of "
        "others. Identity 0 is a distractor. For research only; may not be passed on."
    )
    HOMEPAGE = "https://personal.ie.cuhk.edu.hk/~ccloy/downloads_qmul_underground_reid.html"
    CITATION = """@inproceedings{loy2009multi,
  title={Multi-camera Activity Correlation Analysis},
  author={Loy, Chen Change and Xiang, Tao and Gong, Shaogang},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition},
  year={2009}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Get underground_reid.zip from the authors ({HOMEPAGE}), unpack it, and give the unpacked folder, with "
        f"probe, gallery and {PARTITIONS} in it."
    )
    EXPECTED = {
        "probe": {"images": 250, "identities": 250, "cameras": 4},
        "gallery": {"images": 1_025, "identities": 250, "cameras": 6, "distractors": 775},
    }

    @classmethod
    def inspect(cls, source: Path) -> Originals:
        """Lists the images in `source`, the unpacked folder or the one above it, by their names, and the partitions."""
        root = unpacked_root(source, ROOT, [*(f"{folder}/" for folder in FOLDERS), PARTITIONS])
        images, strays = parse_names(root, FOLDERS, _NAME, {".jpeg", ".jpg"}, "0001_1_25004_107_32_106_221.jpeg")
        splits, defects = drop_unmatched({
            folder: [Crop(path.name, int(match["identity"]), int(match["camera"]), f"{folder}/{path.name}",
                          path.read_bytes) for path, match in images[folder]]
            for folder in FOLDERS})
        partitions = _read_partitions(root / PARTITIONS, cls.EXPECTED["probe"]["identities"])
        return Originals(splits, strays, {"partitions": partitions}, defects=defects)


def _read_partitions(path: Path, num_identities: int) -> list[dict[str, list[int]]]:
    """The partitions: each has one half of the identities 1 to `num_identities` for training, the other for test.

    `trainIdxAll` is a cell array of structs with index, train and test.
    """
    cells: Any = read_mat(path, "trainIdxAll")["trainIdxAll"]
    try:
        partitions = [{part: sorted(integers(cell[part])) for part in ("train", "test")} for cell in cells]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"trainIdxAll of {path} does not hold structs with train and test, lists of identities; copy "
                        "the original file again") from error
    if len(partitions) != NUM_PARTITIONS:
        raise UserError(f"{path} has {len(partitions)} partitions instead of {NUM_PARTITIONS}; copy the original file "
                        "again")
    for number, partition in enumerate(partitions, 1):
        sizes = [len(partition["train"]), len(partition["test"])]
        everyone = sorted(partition["train"] + partition["test"])
        if sizes != [num_identities // 2] * 2 or everyone != list(range(1, num_identities + 1)):
            raise UserError(f"partition {number} of {path} does not halve the identities 1 to {num_identities}: train "
                            f"has {sizes[0]}, test {sizes[1]}; copy the original file again")
    return partitions
