"""`folder/NAME`: a user's own crops, from a CSV or from a folder of images named as Market-1501's are."""

import dataclasses
import functools
import io
import itertools
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jlml_jax.datasets.base import BenchmarkBuilder, Crop, Originals, parse_names
from jlml_jax.datasets.images import (
    Box,
    clip_box,
    crop_box,
    encode_png,
    open_rgb,
    orientation,
    shows_somebody,
    upright_size,
)
from jlml_jax.datasets.listing import (
    BOX_COLUMNS,
    EXAMPLE,
    JUNK_ADVICE,
    NAME,
    NOBODY,
    box_of,
    clipped_note,
    identity_of,
    in_order,
    is_unicode,
    make_path_within,
    notes_on_identities,
    read_table,
    refuse,
    whole_number,
)
from jlml_jax.datasets.split import JUNK
from jlml_jax.errors import UserError, first_few, printable
from jlml_jax.files import cached_realpath

SPLITS = ("train", "query", "gallery")
COLUMNS = ("image", "identity")
OPTIONAL_COLUMNS = ("camera", "split")  # and those of a box
FOLDERS = {"train": ("train", "bounding_box_train"), "query": ("query",), "gallery": ("gallery", "bounding_box_test")}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SEED = 0  # of the splits that are drawn

_TURNED = range(2, 9)  # Exif orientations; 1 is upright
_FRAMES_KEPT = 4  # decoded, for the boxes that follow in them
_READ_BY_ALL = {"JPEG", "MPO", "PNG"}  # what TensorFlow decodes too; an MPO is a JPEG with further pictures behind it


@dataclasses.dataclass(frozen=True)
class _Row:
    """An image as the user annotated it."""

    path: Path
    name: str  # within the folder; with the box, if it is one of a frame
    identity: str
    camera: str  # empty: not known
    split: str  # empty: to be drawn
    origin: str  # for messages
    box: Box | None = None  # None: all of the image


class Folder(BenchmarkBuilder):
    """Splits train, query and gallery, as the user gives them or drawn; those without images are left out.

    Each NAME is a configuration of its own. Images that TensorFlow would not read, or not upright, are kept as PNG, of
    the same pixels, and so are boxes that are cropped from full frames, each at its own size; the others as they are.
    `name` is the path within the folder, of a box with the box: `frame.png box 10,5,16,20`. Identities and cameras are
    any text, numbered from 1 on in sorted order, in that of numbers if all are numbers. The metadata has

    - `identities`: those texts; that of identity i is at i - 1.
    - `cameras`: likewise; none if they are not known. Every image then has a camera of its own, so that all images of a
      person match each other.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "As the user gave it."}
    DESCRIPTION = "Crops of people, of the user's own."
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Give a CSV file with the columns image (a path within the CSV's folder), identity (any text; distractor and "
        "junk are nobody), camera (any text; leave the column out where cameras are not known) and, unless it is to be "
        "drawn, split (train, query or gallery); where images are full frames, also x, y, width and height of a box a "
        f"line, in pixels of the upright frame. Or give a folder of images named like {EXAMPLE}: the identity, 0 for "
        "a distractor, -1 for junk, and after _c the camera; the images in it are split at random, those in its "
        "folders train, query and gallery are not."
    )
    EXPECTED = None

    def __init__(self, config: str | tfds.core.BuilderConfig | None = None, **kwargs):
        name = config.name if isinstance(config, tfds.core.BuilderConfig) else config or ""
        if not re.fullmatch("[A-Za-z0-9_-]+", name):
            raise UserError(f"folder/{name}: a data set of your own needs a name of letters, digits, - and _, such as "
                            "folder/shop")
        super().__init__(config=tfds.core.BuilderConfig(name=name), **kwargs)

    @classmethod
    def inspect(cls, source: Path, clip_boxes: bool = False) -> Originals:
        """Lists the images that the CSV `source` names, or those in the folder `source`, and draws splits if need be.

        With `clip_boxes`, boxes that cross the edge of their frame are cut to it.

        Raises:
            UserError: `source` is neither, or what it says of the images cannot be.
        """
        rows, unexpected, notes = _list_folder(source) if source.is_dir() else _read_csv(source, clip_boxes)
        identities = in_order({row.identity for row in rows} - set(NOBODY), source, "identities")
        if known := any(row.camera for row in rows):
            cameras = in_order({row.camera for row in rows}, source, "cameras")
        else:
            rows = [dataclasses.replace(row, camera=row.name) for row in rows]
            cameras = sorted(row.camera for row in rows)
            notes.append("cameras are not known, so that every image counts as a camera of its own: neighbouring "
                         "frames of one video make results look better than they are")
        if given := any(row.split for row in rows):
            splits = {split: [row for row in rows if row.split == split] for split in SPLITS}
            _check_splits(splits, source)
        else:
            splits, told = _draw_splits(rows, identities, known)
            notes += told
        notes += _notes_on_queries(splits, known)
        if identities and (splits["query"] or not given) and not _seen_by_several(rows):
            notes.append(("nobody is seen by two cameras, but a match must come from another camera than the query's"
                          if known else "nobody has two images") + ": good for training alone")
        numbers = NOBODY | {name: number for number, name in enumerate(identities, 1)}
        camera_numbers = {name: number for number, name in enumerate(cameras, 1)}
        frames = functools.lru_cache(_FRAMES_KEPT)(_Frame)
        crops = {split: [Crop(row.name, numbers[row.identity], camera_numbers[row.camera], row.origin,
                              functools.partial(_read, row, frames)) for row in _by_frame(listed)]
                 for split, listed in splits.items() if listed}
        return Originals(crops, unexpected, {"identities": identities, "cameras": cameras if known else []},
                         tuple(notes))


def _read_csv(path: Path, clip_boxes: bool) -> tuple[list[_Row], list[str], list[str]]:
    """The images that a CSV lists; no unexpected files; notes."""
    lines, notes = read_table(path, COLUMNS, OPTIONAL_COLUMNS)
    given = [column for column in OPTIONAL_COLUMNS if any(cells.get(column) for _, cells in lines)]
    needed = [*COLUMNS, *given, *(BOX_COLUMNS if "x" in lines[0][1] else ())]
    refuse(path, [f"line {line} ({', '.join(empty)})" for line, cells in lines
                  if (empty := [column for column in needed if not cells[column]])],
           "lines lack a cell", "fill them in or remove the lines")
    if "split" in given:
        refuse(path, [f"line {line} ({cells['split']})" for line, cells in lines if cells["split"] not in SPLITS],
               "lines have an unknown split", f"known are {', '.join(SPLITS)}")
    refuse(path, [f"line {line}" for line, cells in lines if whole_number(cells["identity"]) == JUNK],
           f"lines have the identity {JUNK}", JUNK_ADVICE)
    numbers = [line for line, _ in lines]
    names = _paths_within(path, [(line, cells["image"]) for line, cells in lines])
    boxes = _boxes(path, lines)
    if clip_boxes:
        boxes, clipped = _clip(boxes, [path.parent / name for name in names])
        notes += [clipped_note(clipped)] if clipped else []
    _refuse_repeated(path, numbers, names, boxes)
    notes += notes_on_identities(cells["identity"] for _, cells in lines)
    rows = [_Row(path.parent / name, name + _told(box), cells["identity"], cells.get("camera", ""),
                 cells.get("split", ""), f"{name} (line {line})" if box else name, box)
            for name, box, (line, cells) in zip(names, boxes, lines, strict=True)]
    return rows, [], notes


def _told(box: Box | None) -> str:
    return " box {},{},{},{}".format(*box) if box else ""


def _boxes(path: Path, lines: Sequence[tuple[int, dict[str, str]]]) -> list[Box | None]:
    """The box of each line of CSV `path`; a UserError unless all can be."""
    boxes, bad = [], []
    for line, cells in lines:
        try:
            boxes.append(box_of(cells))
        except ValueError as error:
            bad.append(f"line {line}: {error}")
    refuse(path, bad, "lines have a bad box", "mend or remove them")
    return boxes


def _clip(boxes: Sequence[Box | None], paths: Sequence[Path]) -> tuple[list[Box | None], int]:
    """The boxes, cut to the frames in `paths`; and how many differ."""
    frames = sorted({path for path, box in zip(paths, boxes, strict=True) if box})
    with ThreadPoolExecutor() as pool:
        sizes = dict(zip(frames, pool.map(upright_size, frames), strict=True))
    clipped = [box and clip_box(box, sizes[path]) for path, box in zip(paths, boxes, strict=True)]
    return clipped, sum(one != other for one, other in zip(boxes, clipped, strict=True))


def _paths_within(path: Path, images: Sequence[tuple[int, str]]) -> list[str]:
    """The paths of `images` (line, path as given), relative to the folder of CSV `path`.

    A UserError unless all are files within that folder.
    """
    path_within, names, outside = make_path_within(os.path.realpath(path.parent)), [], []
    for line, image in images:
        try:
            names.append(path_within(image))
        except ValueError as error:
            outside.append(f"{printable(image)} (line {line}) {error}")
    refuse(path, outside, "images do not lie within its folder", "put the CSV into the folder in which they lie, "
           "and give paths from there")
    refuse(path, [image for (_, image), name in zip(images, names, strict=True)
                  if not os.path.isfile(path.parent / name)],
           f"images are not in {path.parent}", "paths start from the CSV's folder, with / between folders")
    return names


def _refuse_repeated(path: Path, lines: Sequence[int], names: Sequence[str], boxes: Sequence[Box | None]) -> None:
    """A UserError if two lines of CSV `path` are of one file, under whatever names, and of one box."""
    same, realpath = defaultdict(list), cached_realpath()
    for line, name, box in zip(lines, names, boxes, strict=True):
        same[realpath(path.parent / name), box].append(line)
    root = os.path.realpath(path.parent)
    refuse(path, [f"{os.path.relpath(file, root)}{_told(box)} (lines {', '.join(map(str, listed))})"
                  for (file, box), listed in same.items() if len(listed) > 1],
           "images are listed more than once", "remove the lines too many")


def _list_folder(root: Path) -> tuple[list[_Row], list[str], list[str]]:
    """The images in a folder, or in those for splits therein; files that do not belong there; no notes."""
    folders = {name: split for split, names in FOLDERS.items() for name in names if (root / name).is_dir()}
    for names in FOLDERS.values():
        if len(both := [name for name in names if name in folders]) > 1:
            raise UserError(f"{root} has both {' and '.join(both)}; remove or rename one")
    images, unexpected = parse_names(root, list(folders) or ["."], NAME, SUFFIXES, EXAMPLE,
                                     "remove or rename them, or list the images in a CSV")
    refuse(root, [ascii(path.name) for matches in images.values() for path, _ in matches if not is_unicode(path.name)],
           "names are not valid UTF-8", "rename them")
    if folders:
        unexpected += [path.name for path in sorted(root.iterdir()) if path.name not in folders]
    rows = [_Row(path, name := path.relative_to(root).as_posix(), identity_of(match), str(int(match["camera"])),
                 folders.get(folder, ""), name)
            for folder, matches in images.items() for path, match in matches]
    if not rows:
        raise UserError(f"{root} has no images named like {EXAMPLE}, neither in itself nor in folders "
                        f"{', '.join(SPLITS)}; rename them, or list them in a CSV")
    return rows, unexpected, []


def _check_splits(splits: Mapping[str, Sequence[_Row]], source: Path) -> None:
    refuse(source, [row.name for split in ("train", "query") for row in splits[split] if row.identity in NOBODY],
           "images of train or query are distractors or junk", "they can be in the gallery alone")
    people = {split: {row.identity for row in rows} for split, rows in splits.items()}
    refuse(source, sorted(people["train"] & (people["query"] | people["gallery"])),
           "identities are both in train and in query or gallery",
           "the result would mean nothing: give each to training or to the test")


def _draw_splits(rows: Sequence[_Row], identities: Sequence[str], cameras_known: bool
                 ) -> tuple[dict[str, list[_Row]], list[str]]:
    """Half of the people train; of each of the others an image a camera is a query if the gallery keeps a true match.

    Where cameras are not known, and each image has one of its own, one image of each is a query if there are others.
    Where that leaves no queries, all people train, and there is no test. The draw depends on the annotation alone, not
    on the order of `rows`. Returns the splits, and notes.
    """
    images: dict[str, dict[str, list[_Row]]] = defaultdict(lambda: defaultdict(list))  # of identity, of camera
    for row in sorted(rows, key=lambda row: row.name):
        images[row.identity][row.camera].append(row)
    splits: dict[str, list[_Row]] = {split: [] for split in SPLITS}
    nobody = [row for word in NOBODY for row in itertools.chain(*images[word].values())]
    splits["gallery"] += nobody

    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(identities))
    num_train = len(order) - len(order) // 2
    alone = 0
    for rank, index in enumerate(order):
        of_camera = images[identities[index]]
        if rank < num_train:
            splits["train"] += itertools.chain(*of_camera.values())
            continue
        cameras = sorted(of_camera)
        alone += len(cameras) == 1
        if not cameras_known:
            cameras = [cameras[rng.integers(len(cameras))]] if len(cameras) > 1 else []
        # Images are left for the gallery by two cameras, so that each query finds another camera's there.
        elif sum(len(of_camera[camera]) > 1 for camera in cameras) < 2:
            cameras.remove(cameras[rng.integers(len(cameras))])
        queries = {of_camera[camera][rng.integers(len(of_camera[camera]))] for camera in cameras}
        for row in itertools.chain(*of_camera.values()):
            splits["query" if row in queries else "gallery"].append(row)

    num_test = len(order) - num_train
    if not identities:
        return splits, []
    if not splits["query"]:
        people = [row for index in order for row in itertools.chain(*images[identities[index]].values())]
        return {"train": people, "query": [], "gallery": nobody}, [
            f"no test is drawn, as it would have no queries: {len(order):,} identities, all for training"]
    notes = [f"splits are drawn: {num_train:,} of {len(order):,} identities for training, {num_test:,} for the test"]
    if alone:
        notes.append(f"{alone:,} of the {num_test:,} test identities "
                     f"{'are seen by one camera alone' if cameras_known else 'have one image alone'}: they are in the "
                     "gallery, and no queries")
    return splits, notes


def _seen_by_several(rows: Iterable[_Row]) -> bool:
    """Whether anybody is seen by more than one camera."""
    pairs = {(row.identity, row.camera) for row in rows if row.identity not in NOBODY}
    return len(pairs) > len({identity for identity, _ in pairs})


def _notes_on_queries(splits: Mapping[str, Sequence[_Row]], cameras_known: bool) -> list[str]:
    if splits["train"] and not splits["query"] and {row.identity for row in splits["gallery"]} - set(NOBODY):
        return ["there are no queries, so that the people of the gallery are not searched for: good for training alone"]
    cameras = defaultdict(set)
    for row in splits["gallery"]:
        cameras[row.identity].add(row.camera)
    alone = [row.name for row in splits["query"] if not cameras[row.identity] - {row.camera}]
    if not alone:
        return []
    return [f"{len(alone):,} of {len(splits['query']):,} queries have no image of their identity "
            f"{'from another camera ' * cameras_known}in the gallery: {first_few(alone)}"]


class _Frame:
    """A full frame, decoded once for all boxes that are asked for, in whatever threads, while it is kept."""

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self._image: Image.Image | None = None

    def image(self, name: str) -> Image.Image:
        with self._lock:
            if self._image is None:
                self._image = open_rgb(self._path.read_bytes(), name, upright=True)
            return self._image


def _by_frame(rows: Sequence[_Row]) -> Sequence[_Row]:
    """The boxes of a frame one after another; other images as they are."""
    return sorted(rows, key=lambda row: row.name) if rows[0].box else rows


def _read(row: _Row, frames: Callable[[Path], _Frame]) -> bytes:
    if row.box is None:
        return _upright(row.path.read_bytes(), row.name)
    return encode_png(np.asarray(crop_box(frames(row.path).image(row.origin), row.box, row.origin)))


def _upright(encoded: bytes, name: str) -> bytes:
    """The image file as it is, if TensorFlow reads it and shows it as a viewer would; else as PNG, of what that shows.

    Cameras leave it to the viewer to turn a picture, by its Exif orientation; what decodes crops knows nothing of it.
    A UserError if it is too small to show anybody.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            shows_somebody(image, name)
            if (image.format in _READ_BY_ALL and image.mode != "CMYK" and not image.has_transparency_data
                    and orientation(image) not in _TURNED):
                return encoded
    except UserError:
        raise
    except Exception:  # Pillow's plug-ins let through whatever a damaged file makes them stumble over
        return encoded  # for decode_image to say what is wrong with it
    return encode_png(np.asarray(open_rgb(encoded, name, upright=True)))
