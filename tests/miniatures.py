"""Miniatures of VIPeR, GRID, CUHK03 and MSMT17 in the original layouts, with their traps; the images are noise."""

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import scipy.io
from PIL import Image

VIPER_PREFIXES = (0, 1, 5, 17, 873)  # with gaps, from 0
GRID_IDENTITIES, GRID_DISTRACTORS = 6, 3
CUHK03_PEOPLE = (90, 20, 5, 3, 2)  # of each camera pair; test sets have 100 of them, as the original's


def write_viper(folder: Path) -> dict[str, dict[str, int]]:
    """Writes the miniature into `folder` and returns its counts, in the form of `Viper.EXPECTED`."""
    rng = np.random.default_rng(0)
    for camera, angles in (("cam_a", (0, 45)), ("cam_b", (180, 90))):
        (folder / camera).mkdir(parents=True)
        (folder / camera / "Thumbs.db").write_bytes(b"not an image")
        for prefix in VIPER_PREFIXES:
            pixels = rng.integers(0, 255, (128, 48, 3), np.uint8)
            Image.fromarray(pixels).save(folder / camera / f"{prefix:03d}_{angles[prefix % 2]}.bmp")
    number = len(VIPER_PREFIXES)
    return {camera: {"images": number, "identities": number, "cameras": 1} for camera in ("cam_a", "cam_b")}


def write_grid(folder: Path) -> dict[str, dict[str, int]]:
    """Writes the miniature into `folder` and returns its counts, in the form of `Grid.EXPECTED`.

    Identities of odd number are seen by cameras 1 and 5, the others by 2 and 6; distractors by camera 2.
    """
    rng = np.random.default_rng(0)
    for subfolder in ("probe", "gallery"):
        (folder / subfolder).mkdir(parents=True)
        (folder / subfolder / "Thumbs.db").write_bytes(b"not an image")

    def write(subfolder: str, identity: int, camera: int, frame: int) -> None:
        pixels = rng.integers(0, 255, (60, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / subfolder / f"{identity:04d}_{camera}_{frame}_9_107_32_160.jpeg")

    identities = np.arange(1, GRID_IDENTITIES + 1)
    for identity in identities:
        write("probe", identity, 2 - identity % 2, 25_000 + identity)
        write("gallery", identity, 6 - identity % 2, 900 + identity)
    for distractor in range(GRID_DISTRACTORS):
        write("gallery", 0, 2, 26_000 + distractor)
    write_grid_partitions(folder, [rng.permutation(identities) for _ in range(10)])
    return {"probe": {"images": GRID_IDENTITIES, "identities": GRID_IDENTITIES, "cameras": 2},
            "gallery": {"images": GRID_IDENTITIES + GRID_DISTRACTORS, "identities": GRID_IDENTITIES, "cameras": 3,
                        "distractors": GRID_DISTRACTORS}}


def write_grid_partitions(folder: Path, orders: list[np.ndarray], variable: str = "trainIdxAll") -> None:
    """Writes partitions whose training identities are the first half of each of `orders`, the rest the test ones."""
    half = GRID_IDENTITIES // 2
    cells = np.empty((1, len(orders)), object)
    for number, order in enumerate(orders):
        # Doubles in rows, as MATLAB has them; a field `train` that comes last.
        cells[0, number] = {"index": float(number + 1), "test": order[half:].astype(float),
                            "train": order[:half].astype(float)}
    scipy.io.savemat(folder / "features_and_partitions.mat", {"features": np.zeros((4, 3)), variable: cells},
                     do_compression=True)


@dataclasses.dataclass
class Cuhk03Image:
    """An image of the miniature CUHK03."""

    identity: int
    camera: int
    pixels: np.ndarray  # uint8 [height, width, 3]


@dataclasses.dataclass
class Cuhk03Miniature:
    """What was written."""

    images: dict[str, dict[str, Cuhk03Image]]  # configuration -> name -> image
    testsets: list[list[int]]  # identities
    new_protocol: dict[str, dict[str, list[str]]]  # configuration -> train, query, gallery -> names

    def counts(self, config: str) -> dict[str, dict[str, int]]:
        """In the form of `Cuhk03.EXPECTED`."""
        return {"crops": {"images": len(self.images[config]), "identities": sum(CUHK03_PEOPLE), "cameras": 10}}


def write_cuhk03(folder: Path) -> Cuhk03Miniature:
    """Writes cuhk-03.mat and the two lists of the 767/700 protocol into `folder`.

    Everyone has an image in either view, person 1 of a pair all ten of `detected`; `labeled` lacks the last of those.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    images: dict[str, dict[str, Cuhk03Image]] = {"labeled": {}, "detected": {}}
    people = [(pair, person) for pair, number in enumerate(CUHK03_PEOPLE, 1) for person in range(1, number + 1)]
    with h5py.File(folder / "cuhk-03.mat", "w", userblock_size=512) as file:
        references = file.create_group("#refs#")

        def store(values: np.ndarray, **options) -> h5py.Reference:
            return references.create_dataset(f"x{len(references)}", data=values, **options).ref

        def store_cells(cells: list) -> np.ndarray:
            array = np.empty(len(cells), h5py.ref_dtype)
            array[:] = cells
            return array

        empty = store(np.zeros(2, np.uint64))  # a MATLAB [] is the vector of its dimensions
        references["x0"].attrs["MATLAB_empty"] = np.uint8(1)
        for config, of_config in images.items():
            pairs = []
            for pair, number in enumerate(CUHK03_PEOPLE, 1):
                cells = np.full((10, number), empty, h5py.ref_dtype)  # transposed: MATLAB has number x 10
                for person in range(1, number + 1):
                    columns = set(range(1, 11)) if person == 1 else {1 + person % 5, 6 + person % 3}
                    for column in sorted(columns - ({10} if config == "labeled" else set())):
                        pixels = rng.integers(0, 255, (8 + person % 3, 5, 3), np.uint8)
                        view = (column + 4) // 5
                        of_config[f"{pair}_{person:03d}_{view}_{column:02d}.png"] = Cuhk03Image(
                            people.index((pair, person)) + 1, 2 * pair - 2 + view, pixels)
                        cells[column - 1, person - 1] = store(pixels.T, compression="gzip")
                pairs.append(store(cells))
            file[config] = store_cells(pairs)[None]
        orders = [rng.permutation(len(people))[:100] for _ in range(20)]
        file["testsets"] = store_cells([store(np.array(people, float)[order].T) for order in orders])[None]
    new_protocol = {config: _write_new_protocol(folder, config, of_config) for config, of_config in images.items()}
    return Cuhk03Miniature(images, [sorted((order + 1).tolist()) for order in orders], new_protocol)


def _write_new_protocol(folder: Path, config: str, images: dict[str, Cuhk03Image]) -> dict[str, list[str]]:
    """Everyone of an even number is for training; of the others, the first image is a query."""
    parts: dict[str, list[str]] = {"train": [], "query": [], "gallery": []}
    seen: set[int] = set()
    for name, image in images.items():
        part = "train" if image.identity % 2 == 0 else "gallery" if image.identity in seen else "query"
        seen.add(image.identity)
        parts[part].append(name)
    names = list(images)
    columns = {f"{part}_idx": np.array([[names.index(name) + 1] for name in listed]) for part, listed in parts.items()}
    columns["labels"] = np.array([[image.identity] for image in images.values()], np.uint16)
    columns["camId"] = np.array([[2 - image.camera % 2] for image in images.values()], np.uint8)
    columns["filelist"] = np.array([[name] for name in names], object)
    scipy.io.savemat(folder / f"cuhk03_new_protocol_config_{config}.mat", columns)
    return parts


def write_msmt17(folder: Path, train: str = "train", test: str = "test") -> dict[str, dict[str, int]]:
    """Writes the miniature into `folder`, images into its `train` and `test`; returns its counts, as `Msmt17.EXPECTED`.

    Four people in train, and five others of the same numbers, from 0, in test, each in two images from three cameras,
    the second of which is in list_val.txt or a query.
    """
    rng = np.random.default_rng(0)
    lists: dict[str, list[str]] = {"train": [], "val": [], "query": [], "gallery": []}
    for subfolder, listed, number, minute in ((train, ("train", "val"), 4, 6), (test, ("gallery", "query"), 5, 307)):
        for person in range(number):
            (folder / subfolder / f"{person:04d}").mkdir(parents=True)
            for index, camera in enumerate((12, 12, 1, 1, 7 + person, 7 + person)):
                time = f"0303morning_{minute:04d}_{index + 6}" + "_ex" * (camera == 1)  # as of some in the original
                name = f"{person:04d}/{person:04d}_{index:03d}_{camera:02d}_{time}.jpg"
                pixels = rng.integers(0, 255, (40 + person, 20 + index, 3), np.uint8)
                Image.fromarray(pixels).save(folder / subfolder / name)
                lists[listed[index % 2]].append(f"{name} {person}\n")
    for name, lines in lists.items():
        (folder / f"list_{name}.txt").write_text("".join(lines[::-1]))
    return {"train": {"images": 24, "identities": 4, "cameras": 6},
            "query": {"images": 15, "identities": 5, "cameras": 7},
            "gallery": {"images": 15, "identities": 5, "cameras": 7}}
