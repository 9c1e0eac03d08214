"""MSMT17 (Wei et al., CVPR 2018) from the folder as its archive unpacks: with all faces, or with masked ones."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from jlml_jax.datasets.base import BenchmarkBuilder, Crop, Originals, unpacked_root
from jlml_jax.errors import UserError, first_few, printable

# What the archives unpack to: the folders of train and test in each. The lists are the same.
VERSIONS = {"MSMT17_V1": ("train", "test"), "MSMT17_V2": ("mask_train_v2", "mask_test_v2")}
MASKED = "MSMT17_V2"
LISTS = {"train": ("list_train.txt", "list_val.txt"), "query": ("list_query.txt",), "gallery": ("list_gallery.txt",)}

# By the number that the lists give a person, who counts from 0 in train and again in test.
TRAIN_IDENTITIES = range(1, 1_042)
TEST_IDENTITIES = range(1_042, 4_102)

# The person, twice; number, camera, date with time of day, and what is of no matter here; the person again.
_LINE = re.compile(r"(?P<path>(?P<folder>\d{4})/(?P=folder)_\d{3}_(?P<camera>0[1-9]|1[0-5])_\d{4}[a-z]+_\d{4}_\d{1,2}"
                   r"(_ex)?\.jpg) (?P<person>\d{1,4})", re.ASCII)
_EXAMPLE = "0000/0000_045_12_0303morning_0006_2.jpg 0"


class Msmt17(BenchmarkBuilder):
    """Splits train (the images of list_train.txt and of list_val.txt, which are of the same people), query, gallery.

    The lists number the people of train from 0, and those of test, who are others, from 0 again. Here person p of train
    has identity p + 1, which is 1 to 1041, and person p of test has p + 1042, which is 1042 to 4101; there is neither
    junk nor distractors. `name` is that of the original file without its folder: it begins with p, not with the
    identity, and is unlike all others of the data set.

    The metadata has `faces_masked`, whether the files are those of MSMT17_V2.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The files of MSMT17_V1 or MSMT17_V2."}
    DESCRIPTION = (
        "MSMT17: 4,101 people on a campus, seen by 12 cameras outdoors and 3 indoors on four days. Boxes come from a "
        "detector (Faster R-CNN). In MSMT17_V2 the faces are masked. For research only; may not be passed on."
    )
    HOMEPAGE = "https://www.pkuvmc.com/dataset.html"
    CITATION = """@inproceedings{wei2018person,
  title={Person Transfer {GAN} to Bridge Domain Gap for Person Re-Identification},
  author={Wei, Longhui and Zhang, Shiliang and Gao, Wen and Tian, Qi},
  booktitle={Proceedings of the IEEE Conference on Computer Vision and Pattern Recognition},
  year={2018}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Ask the authors for MSMT17_V1 or MSMT17_V2 ({HOMEPAGE}), unpack it, and give the unpacked folder, with "
        f"{' and '.join(VERSIONS['MSMT17_V1'])} or {' and '.join(VERSIONS['MSMT17_V2'])} and the four lists, "
        "list_train.txt to list_gallery.txt, in it."
    )
    EXPECTED = {
        "train": {"images": 32_621, "identities": 1_041, "cameras": 15},
        "query": {"images": 11_659, "identities": 3_060, "cameras": 15},
        "gallery": {"images": 82_161, "identities": 3_060, "cameras": 15},
    }

    @classmethod
    def inspect(cls, source: Path) -> Originals:
        """Lists the images in `source`, the unpacked folder or the one above it, by the four lists."""
        version = _find_version(source)
        train, test = VERSIONS[version]
        root = unpacked_root(source, version, [f"{train}/", f"{test}/", *itertools.chain(*LISTS.values())])
        parts = {"train": (train, TRAIN_IDENTITIES), "query": (test, TEST_IDENTITIES),
                 "gallery": (test, TEST_IDENTITIES)}
        splits = {split: [crop for name in names for crop in _read_list(root, name, *parts[split])]
                  for split, names in LISTS.items()}
        listed = Counter(crop.origin for crops in splits.values() for crop in crops)
        if repeated := [origin for origin, number in listed.items() if number > 1]:
            raise UserError(f"the lists in {root} have {len(repeated):,} images more than once: {first_few(repeated)}; "
                            "copy the original lists again")
        found = _list_folder(root, train) | _list_folder(root, test)
        defects = ()
        if missing := [origin for origin in listed if not found.get(origin)]:
            defects = (f"{len(missing):,} images of the lists are not there and left out: {first_few(missing)}",)
        return Originals(
            {split: [crop for crop in crops if found.get(crop.origin)] for split, crops in splits.items()},
            sorted(found.keys() - listed.keys()), {"faces_masked": version == MASKED},
            (f"{version}: the faces are masked, and results say so",) if version == MASKED else (), defects)


def _find_version(source: Path) -> str:
    """The one of VERSIONS that is in `source`, or that `source` is."""
    there = {version: [(source / version).is_dir(), *((source / folder).is_dir() for folder in folders)]
             for version, folders in VERSIONS.items()}
    whole = [version for version, (above, *parts) in there.items() if above or all(parts)]
    if len(whole) > 1:
        raise UserError(f"{source} has both {' and '.join(whole)}, whose images differ; give the folder of one of them")
    return (*whole, *(version for version in there if any(there[version])), "MSMT17_V1")[0]


def _read_list(root: Path, name: str, folder: str, identities: Sequence[int]) -> list[Crop]:
    """The images of a list, whose paths are within `folder`; person p of the list has identity identities[p]."""
    crops, wrong = [], []
    for line in (root / name).read_text("utf-8", errors="replace").split("\n"):
        match = _LINE.fullmatch(line.strip())
        if match and int(match["folder"]) == int(match["person"]) < len(identities):
            path = root / folder / match["path"]
            crops.append(Crop(path.name, identities[int(match["person"])], int(match["camera"]),
                              f"{folder}/{match['path']}", path.read_bytes))
        elif line.strip():
            wrong.append(printable(line.strip()[:80]))
    if wrong:
        raise UserError(f"{len(wrong):,} lines of {root / name} are not like '{_EXAMPLE}', of people 0 to "
                        f"{len(identities) - 1}: {first_few(wrong, '; ')}; copy the original list again")
    return crops


def _list_folder(root: Path, folder: str) -> dict[str, bool]:
    """What is in `folder` and in the folders in it, by its path within `root`: whether it may be an image, a file."""
    found = {}
    for entry in (root / folder).iterdir():
        if entry.is_dir():
            found |= {f"{folder}/{entry.name}/{file.name}": file.is_file() for file in entry.iterdir()}
        else:
            found[f"{folder}/{entry.name}"] = False
    return found
