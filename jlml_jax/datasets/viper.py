"""VIPeR (Gray, Brennan, Tao, PETS 2007) from the folder as its archive unpacks."""

import re
from collections.abc import Callable
from pathlib import Path

import tensorflow_datasets as tfds

from jlml_jax.datasets.base import BenchmarkBuilder, Crop, Originals, drop_unmatched, parse_names, unpacked_root
from jlml_jax.datasets.images import decode_image, encode_png

ROOT = "VIPeR"
FOLDERS = ("cam_a", "cam_b")  # cameras 1 and 2; the splits have the same names

# 001_45.bmp: person, viewing angle in degrees. The same person has another angle in the other camera.
_NAME = re.compile(r"(?P<person>\d{3})_\d{1,3}\.bmp")


class Viper(BenchmarkBuilder):
    """Splits cam_a and cam_b: one image each of the same people, whose numbers in the names, plus 1, are identities.

    The bitmaps are kept as PNG, of the same pixels: TFDS and TensorFlow's decoders want PNG or JPEG. `name` is that of
    the original file, with its folder.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The files of VIPeR.v1.0."}
    DESCRIPTION = (
        "VIPeR: 632 people outdoors, each in one image of either of two cameras, from different viewing angles. "
        "For research only; may not be passed on."
    )
    HOMEPAGE = "https://vision.soe.ucsc.edu/node/178"
    CITATION = """@inproceedings{gray2007evaluating,
  title={Evaluating Appearance Models for Recognition, Reacquisition, and Tracking},
  author={Gray, Douglas and Brennan, Shane and Tao, Hai},
  booktitle={IEEE International Workshop on Performance Evaluation for Tracking and Surveillance},
  year={2007}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Get VIPeR.v1.0.zip from the authors ({HOMEPAGE}), unpack it, and give the unpacked folder, with cam_a and "
        "cam_b in it."
    )
    EXPECTED = {
        "cam_a": {"images": 632, "identities": 632, "cameras": 1},
        "cam_b": {"images": 632, "identities": 632, "cameras": 1},
    }

    @classmethod
    def inspect(cls, source: Path) -> Originals:
        """Lists the images in `source`, the unpacked folder or the one above it, by their names."""
        root = unpacked_root(source, ROOT, [f"{folder}/" for folder in FOLDERS])
        images, strays = parse_names(root, FOLDERS, _NAME, {".bmp"}, "001_45.bmp")
        splits = {}
        for camera, folder in enumerate(FOLDERS, 1):
            splits[folder] = [
                Crop(f"{folder}/{path.name}", int(match["person"]) + 1, camera, f"{folder}/{path.name}",
                     _png_reader(path, f"{folder}/{path.name}"))
                for path, match in images[folder]]
        splits, defects = drop_unmatched(splits)
        return Originals(splits, strays, defects=defects)


def _png_reader(path: Path, origin: str) -> Callable[[], bytes]:
    return lambda: encode_png(decode_image(path.read_bytes(), origin))
