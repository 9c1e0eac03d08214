"""Market-1501 (Zheng et al., ICCV 2015) from the folder as its archive unpacks."""

import re
from pathlib import Path

import tensorflow_datasets as tfds

from jlml_jax.datasets.base import BenchmarkBuilder, Crop, Originals, parse_names, unpacked_root

ROOT = "Market-1501-v15.09.15"
FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test", "multi_query": "gt_bbox"}

# 0002_c1s1_000451_03.jpg: identity, camera, sequence, frame, box of the frame. Some names end in .jpg twice.
_NAME = re.compile(r"(?P<identity>-1|\d{4})_c(?P<camera>[1-6])s\d_\d{6}_\d{2}\.jpg(\.jpg)?")


class Market1501(BenchmarkBuilder):
    """Splits train, query, gallery, and multi_query: the hand-drawn boxes whose features are pooled into a query's."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The files of Market-1501-v15.09.15."}
    DESCRIPTION = (
        "Market-1501: 1,501 people before a supermarket, seen by six cameras. Boxes of train and gallery come from a "
        "detector (DPM), those of query and multi_query are drawn by hand. Identity -1 is junk, 0 a distractor. "
        "For research only; may not be passed on."
    )
    HOMEPAGE = "https://zheng-lab.cecs.anu.edu.au/Project/project_reid.html"
    CITATION = """@inproceedings{zheng2015scalable,
  title={Scalable Person Re-identification: A Benchmark},
  author={Zheng, Liang and Shen, Liyue and Tian, Lu and Wang, Shengjin and Wang, Jingdong and Tian, Qi},
  booktitle={Proceedings of the IEEE International Conference on Computer Vision},
  year={2015}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Get {ROOT}.zip from the authors ({HOMEPAGE}), unpack it, and give the unpacked folder, with "
        f"{', '.join(FOLDERS.values())} in it."
    )
    EXPECTED = {
        "train": {"images": 12_936, "identities": 751, "cameras": 6},
        "query": {"images": 3_368, "identities": 750, "cameras": 6},
        "gallery": {"images": 19_732, "identities": 750, "cameras": 6, "distractors": 2_798, "junk": 3_819},
        "multi_query": {"images": 25_259, "identities": 1_501, "cameras": 6},
    }

    @classmethod
    def inspect(cls, source: Path) -> Originals:
        """Lists the images in `source`, the unpacked folder or the one above it, by their names."""
        root = unpacked_root(source, ROOT, [f"{folder}/" for folder in FOLDERS.values()])
        images, strays = parse_names(root, list(FOLDERS.values()), _NAME, {".jpg", ".jpeg"}, "0002_c1s1_000451_03.jpg")
        splits = {
            split: [Crop(path.name, int(match["identity"]), int(match["camera"]), f"{folder}/{path.name}",
                         path.read_bytes) for path, match in images[folder]]
            for split, folder in FOLDERS.items()}
        return Originals(splits, strays)
