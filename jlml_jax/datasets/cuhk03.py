"""CUHK03 (Li, Zhao, Xiao, Wang, CVPR 2014) from cuhk-03.mat, as its archive unpacks."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import tensorflow_datasets as tfds

from jlml_jax.datasets.base import BenchmarkBuilder, Crop, Originals, drop_unmatched, unpacked_root
from jlml_jax.datasets.images import encode_png
from jlml_jax.datasets.matlab import integers, read_mat
from jlml_jax.errors import UserError, first_few

ROOT = "cuhk03_release"
FILE = "cuhk-03.mat"
NEW_PROTOCOL = "cuhk03_new_protocol_config_{config}.mat"
NUM_PAIRS = 5
IMAGES_PER_VIEW = 5
NUM_TESTSETS, TESTSET_SIZE = 20, 100

# What h5py raises where a file is damaged, or what is asked for is not of the kind that it should be.
_H5PY_ERRORS = (AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError)


@dataclasses.dataclass
class Cuhk03Config(tfds.core.BuilderConfig):
    """Whose boxes: people's or a detector's."""

    num_images: int = 0  # as published


class Cuhk03(BenchmarkBuilder):
    """One split, `crops`, in two configurations: `labeled`, boxes drawn by hand, and `detected`, boxes of a detector.

    Identities are 1 and up in the file's order: the people of the first camera pair, then those of the second, and so
    on. The two views of pair p (1 to 5) are cameras 2p - 1 and 2p. Names are those of the published lists of the
    767/700 protocol: `1_001_2_07.png` is camera pair, person of that pair, view, column of the person's ten cells; the
    first five are view 1, and some are empty. Pixels are kept as PNG. The metadata has

    - `testsets`: for each of the 20 trials, its 100 test identities, sorted.
    - `new_protocol`: the 767/700 protocol, {"train": [name], "query": [name], "gallery": [name]}, from the published
      list of this configuration if it lies beside cuhk-03.mat; else None.

    Of an incomplete copy, `testsets` may name people who are not there, `new_protocol` leaves out images that are not.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The images of cuhk-03.mat."}
    BUILDER_CONFIGS = [
        Cuhk03Config(name="labeled", description="Boxes drawn by hand.", num_images=14_096),
        Cuhk03Config(name="detected", description="Boxes of a detector (DPM).", num_images=14_097),
    ]
    DESCRIPTION = (
        "CUHK03: 1,467 people on a campus, each seen by one of five pairs of cameras, in up to five images a camera. "
        "For research only; may not be passed on."
    )
    HOMEPAGE = "https://www.ee.cuhk.edu.hk/~xgwang/CUHK_identification.html"
    CITATION = """@inproceedings{li2014deepreid,
  title={DeepReID: Deep Filter Pairing Neural Network for Person Re-identification},
  author={Li, Wei and Zhao, Rui and Xiao, Tong and Wang, Xiaogang},
  booktitle={IEEE Conference on Computer Vision and Pattern Recognition},
  year={2014}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Get cuhk03_release.zip from the authors ({HOMEPAGE}), unpack it, and give the unpacked folder, with "
        f"{FILE} in it. For the 767/700 protocol, put {NEW_PROTOCOL.format(config='labeled')} and "
        f"{NEW_PROTOCOL.format(config='detected')} beside that file."
    )

    @property
    def EXPECTED(self) -> dict[str, dict[str, int]]:
        """Published counts of this configuration."""
        return {"crops": {"images": self.builder_config.num_images, "identities": 1_467, "cameras": 2 * NUM_PAIRS}}

    def inspect(self, source: Path) -> Originals:
        """Lists the images of this configuration in `source`, the folder with cuhk-03.mat or the one above it.

        The images are read from the file as they are needed; it stays open for as long as they may be.
        """
        config = self.builder_config.name
        path = unpacked_root(source, ROOT, [FILE]) / FILE
        try:
            file = h5py.File(path)
        except OSError as error:
            raise UserError(f"{path} does not open as an HDF5 file, it may be incomplete ({error}); unpack or copy it "
                            "again") from error
        try:
            if missing := [name for name in (config, "testsets") if name not in file]:
                raise UserError(f"{path} has no {' and no '.join(missing)}; unpack or copy the original file again")
            people = _people_of_pairs(file, config)
            crops = _list_crops(file, config, people)
            cells = [np.asarray(file[reference]) for reference in file["testsets"][:].ravel()]
        except _H5PY_ERRORS as error:
            raise UserError(f"{path} is damaged or not laid out as published ({error}); unpack or copy the original "
                            "file again") from error
        if not crops:
            boxes = {"labeled": "labelled", "detected": "detected"}[config]
            raise UserError(f"this copy of {path} has no {boxes} boxes: all cells of {config!r} are empty; unpack or "
                            "copy the original file again")
        views, defects = drop_unmatched({
            f"view {view}": [crop for crop in crops if crop.camera % 2 == view % 2] for view in (1, 2)})
        crops = sorted((*views["view 1"], *views["view 2"]), key=lambda crop: crop.name)
        metadata = {"testsets": _read_testsets(path, cells, [len(rows) for rows in people]), "new_protocol": None}
        notes = []
        new_protocol = path.with_name(NEW_PROTOCOL.format(config=config))
        if new_protocol.is_file():
            metadata["new_protocol"], differing = _read_new_protocol(new_protocol, crops)
            defects += differing
        else:
            notes.append(f"no {new_protocol.name} beside {FILE}: the 767/700 protocol is left out")
        return Originals({"crops": crops}, [], metadata, tuple(notes), defects)


def _people_of_pairs(file: h5py.File, config: str) -> list[np.ndarray]:
    """The cells of each camera pair: references to images, [people, 10]."""
    # MATLAB's arrays are transposed in HDF5: a 5 x 1 cell array of M x 10 cell arrays is (1, 5) of (10, M).
    pairs = [file[reference][:].T for reference in file[config][:].ravel()]
    shapes = [cells.shape for cells in pairs]
    if len(pairs) != NUM_PAIRS or any(len(shape) != 2 or shape[1] != 2 * IMAGES_PER_VIEW for shape in shapes):
        raise ValueError(f"{config!r} has cells of shapes {shapes}")
    return pairs


def _list_crops(file: h5py.File, config: str, pairs: Sequence[np.ndarray]) -> list[Crop]:
    crops, identity = [], 0
    for pair, people in enumerate(pairs, 1):
        for person, cells in enumerate(people, 1):
            identity += 1
            for column, reference in enumerate(cells, 1):
                # An empty cell is a null reference, or a vector of what would be its dimensions.
                if not reference or file[reference].ndim != 3:
                    continue
                view = 1 if column <= IMAGES_PER_VIEW else 2
                name = f"{pair}_{person:03d}_{view}_{column:02d}.png"
                origin = f"{config}{{{pair}}}{{{person},{column}}} of {FILE}"
                crops.append(Crop(name, identity, 2 * (pair - 1) + view, origin,
                                  _png_reader(file, reference, origin)))
    return crops


def _png_reader(file: h5py.File, reference: h5py.Reference, origin: str) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            pixels = file[reference][:].T  # [height, width, 3]
        except _H5PY_ERRORS as error:
            raise UserError(f"{origin} is damaged ({error})") from error
        if pixels.dtype != np.uint8 or pixels.shape[2] != 3 or not pixels.size:
            raise UserError(f"{origin} is not an image: {pixels.dtype} {list(pixels.shape)}")
        return encode_png(np.ascontiguousarray(pixels))
    return read


def _read_testsets(path: Path, cells: Sequence[np.ndarray], num_people: Sequence[int]) -> list[list[int]]:
    """The test identities of each trial, from `cells`: 1-based [camera pair, person] in columns."""
    rows = [(pair, person) for pair, number in enumerate(num_people, 1) for person in range(1, number + 1)]
    identities = {row: identity for identity, row in enumerate(rows, 1)}
    testsets = []
    for number, cell in enumerate(cells, 1):
        try:
            testset = sorted({identities[row] for row in zip(*map(integers, cell), strict=True)})
        except (KeyError, TypeError, ValueError):
            testset = []
        if cell.shape != (2, TESTSET_SIZE) or len(testset) != TESTSET_SIZE:
            raise UserError(f"test set {number} of {path} is not a list of {TESTSET_SIZE} different people, each as "
                            "[camera pair, person]; unpack or copy the original file again")
        testsets.append(testset)
    if len(testsets) != NUM_TESTSETS:
        raise UserError(f"{path} has {len(testsets)} test sets instead of {NUM_TESTSETS}; unpack or copy the original "
                        "file again")
    return testsets


def _read_new_protocol(path: Path, crops: Sequence[Crop]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """The names of the training, query and gallery images, from one of the published lists, checked against `crops`.

    Names that are not those of `crops` are left out; a defect tells of them, and of crops that are not in the list.
    """
    variables = read_mat(path, "filelist", "labels", "train_idx", "query_idx", "gallery_idx")
    try:
        names = [str(name) for name in np.atleast_1d(variables["filelist"])]
        labels = dict(zip(names, integers(variables["labels"]), strict=True))
        parts = {part: integers(variables[f"{part}_idx"]) for part in ("train", "query", "gallery")}
    except ValueError as error:
        raise UserError(f"{path} is not laid out as published ({error}); get it again") from error
    identities = {crop.name: crop.identity for crop in crops}
    conflicts = [name for name in identities if labels.get(name, identities[name]) != identities[name]]
    if conflicts:
        raise UserError(f"{path} and {FILE} beside it have different people in {len(conflicts):,} images "
                        f"({first_few(conflicts)}); unpack or copy the original files again")
    indices = sorted(index for part in parts.values() for index in part)
    if indices != list(range(1, len(names) + 1)) or len(labels) != len(names):
        raise UserError(f"{path} does not part its {len(names):,} images into training, query and gallery; get it "
                        "again")
    listed = {part: [names[index - 1] for index in of_part] for part, of_part in parts.items()}
    people = {part: {labels[name] for name in of_part} for part, of_part in listed.items()}
    if people["train"] & people["query"] or people["query"] != people["gallery"]:
        raise UserError(f"{path} tests on training identities, or its query and gallery have different people; get it "
                        "again")
    differing = sorted(labels.keys() ^ identities.keys())
    if not differing:
        return listed, ()
    return ({part: [name for name in of_part if name in identities] for part, of_part in listed.items()},
            (f"{path.name} and {FILE} differ in {len(differing):,} images: {first_few(differing)}",))
