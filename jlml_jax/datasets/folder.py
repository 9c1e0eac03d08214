"""`folder/NAME`: a user's own crops, from a CSV or from a folder of images named as Market-1501's are."""

import csv
import dataclasses
import functools
import io
import itertools
import math
import os
import re
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jlml_jax.datasets.base import DISTRACTOR, JUNK, BenchmarkBuilder, Crop, Originals, parse_names
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
from jlml_jax.errors import UserError, first_few, printable
from jlml_jax.files import cached_realpath

SPLITS = ("train", "query", "gallery")
COLUMNS = ("image", "identity")
OPTIONAL_COLUMNS = ("camera", "split")  # and those of a box
BOX_COLUMNS = ("x", "y", "width", "height")
NOBODY = {"distractor": DISTRACTOR, "junk": JUNK}  # words in the place of an identity
_MISSING = ("nan", "None", "<NA>")  # as pandas and NumPy write a missing cell as text
FOLDERS = {"train": ("train", "bounding_box_train"), "query": ("query",), "gallery": ("gallery", "bounding_box_test")}
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
SEED = 0  # of the splits that are drawn

# 0002_c1s1_000451_03.jpg or 17_c3.png: identity, camera, anything.
NAME = re.compile(r"(?P<identity>-1|[0-9]+)_c(?P<camera>[0-9]+).*(?i:\.jpe?g|\.png|\.bmp|\.webp)")
_EXAMPLE = "0002_c1s1_000451_03.jpg"

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
        f"line, in pixels of the upright frame. Or give a folder of images named like {_EXAMPLE}: the identity, 0 for "
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


# What a CSV of images may not have as an identity, and what instead.
JUNK_ADVICE = f"write junk for identity {JUNK}, and distractor where {DISTRACTOR} is nobody"


def _refuse(source: Path, offenders: Sequence[str], what: str, remedy: str) -> None:
    """A UserError if there are any `offenders`, which are `what`."""
    if offenders:
        raise UserError(f"{source}: {len(offenders):,} {what}: {first_few(offenders)}; {remedy}")


def _read_csv(path: Path, clip_boxes: bool) -> tuple[list[_Row], list[str], list[str]]:
    """The images that a CSV lists; no unexpected files; notes."""
    lines, notes = read_table(path, COLUMNS, OPTIONAL_COLUMNS)
    given = [column for column in OPTIONAL_COLUMNS if any(cells.get(column) for _, cells in lines)]
    needed = [*COLUMNS, *given, *(BOX_COLUMNS if "x" in lines[0][1] else ())]
    _refuse(path, [f"line {line} ({', '.join(empty)})" for line, cells in lines
                   if (empty := [column for column in needed if not cells[column]])],
            "lines lack a cell", "fill them in or remove the lines")
    if "split" in given:
        _refuse(path, [f"line {line} ({cells['split']})" for line, cells in lines if cells["split"] not in SPLITS],
                "lines have an unknown split", f"known are {', '.join(SPLITS)}")
    _refuse(path, [f"line {line}" for line, cells in lines if whole_number(cells["identity"]) == JUNK],
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
    _refuse(path, bad, "lines have a bad box", "mend or remove them")
    return boxes


def _clip(boxes: Sequence[Box | None], paths: Sequence[Path]) -> tuple[list[Box | None], int]:
    """The boxes, cut to the frames in `paths`; and how many differ."""
    frames = sorted({path for path, box in zip(paths, boxes, strict=True) if box})
    with ThreadPoolExecutor() as pool:
        sizes = dict(zip(frames, pool.map(upright_size, frames), strict=True))
    clipped = [box and clip_box(box, sizes[path]) for path, box in zip(paths, boxes, strict=True)]
    return clipped, sum(one != other for one, other in zip(boxes, clipped, strict=True))


def clipped_note(number: int) -> str:
    """A line to tell the user."""
    return f"{number:,} boxes cross the edge of their frame and are cut to it"


def box_of(cells: Mapping[str, str]) -> Box | None:
    """The box in a line of a CSV, rounded to pixels; None if it has none.

    Raises:
        ValueError: it cannot be one; the message says why.
    """
    if "x" not in cells:
        return None
    shown = printable(cells["image"])
    try:
        numbers = [float(cells[column]) for column in BOX_COLUMNS]
    except ValueError as error:
        raise ValueError(f"the box of {shown} is not four numbers") from error
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"the box of {shown} is not finite")
    x, y, width, height = map(round, numbers)
    if width < 1 or height < 1:
        raise ValueError(f"the box of {shown} is {width} x {height} pixels, which is nothing")
    return x, y, width, height


def read_table(path: Path, needed: Sequence[str], known: Sequence[str] = ()
               ) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """The number of each line of a CSV that is not empty, after the first, and its cells by column; notes.

    The columns of a box are known, too: if any line has cells x, all have those of `BOX_COLUMNS`.

    Raises:
        UserError: it is no such file, or it lacks a `needed` column, or one of a box, or has one that is read twice.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it has NUL characters")
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; give a CSV file or a folder of images") from error
    except ValueError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}); save it as a CSV file in UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; mend the quotation marks") from error
    if not lines:
        raise UserError(f"{path} is empty; its first line must name the columns {', '.join(needed)}")
    (_, header), *lines = lines
    if missing := [column for column in needed if column not in header]:
        first = ",".join(f'"{cell}"' if "," in cell else cell for cell in header)  # all in one cell, as Excel quotes it
        raise UserError(f"{path} has no column {' and no column '.join(missing)}: its first line is "
                        f"{first[:80]!r}, but must name {', '.join(needed)}, each a cell, with commas between them")
    if "x" in header or "y" in header:  # width and height alone are an image's
        known = (*known, *BOX_COLUMNS)
        if missing := [column for column in BOX_COLUMNS if column not in header]:
            raise UserError(f"{path} lacks {', '.join(missing)} of a box; its columns are {', '.join(BOX_COLUMNS)}, or "
                            "none of these")
    if twice := [column for column in (*needed, *known) if header.count(column) > 1]:
        raise UserError(f"{path} has two columns {twice[0]}; remove one")
    if not lines:
        raise UserError(f"{path} lists no images; add a line for each")
    _refuse(path, [f"line {number} ({len(cells)})" for number, cells in lines if len(cells) != len(header)],
            f"lines have not {len(header)} cells, as the first has", "quote cells with a comma in them")
    unread = [printable(title) for title in header if title and title not in (*needed, *known)]
    return ([(number, dict(zip(header, cells, strict=True))) for number, cells in lines],
            [f"columns that are not read: {', '.join(unread)}"] if unread else [])


def make_path_within(root: str) -> Callable[[str], str]:
    """A function of a path that a CSV in the folder `root` (as os.path.realpath has it) names: the path, relative to
    the folder, without `.` and `..`. What many lines name, such as a frame of many boxes, is looked up once.

    It raises a ValueError if the path is absolute or leads out of the folder; the message says which.
    """
    realpath = cached_realpath()

    @functools.cache
    def path_within(file: str) -> str:
        normal = os.path.normpath(file)
        if os.path.isabs(file):
            raise ValueError("is an absolute path, and must start from the folder of the CSV")
        # The text first: what lies outside is not even looked at.
        if normal == os.pardir or normal.startswith(os.pardir + os.sep):
            raise ValueError("leaves the folder of the CSV")
        if not Path(realpath(os.path.join(root, normal))).is_relative_to(root):
            raise ValueError("leaves the folder of the CSV by a symbolic link")
        return Path(normal).as_posix()

    return path_within


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
    _refuse(path, outside, "images do not lie within its folder", "put the CSV into the folder in which they lie, "
            "and give paths from there")
    _refuse(path, [image for (_, image), name in zip(images, names, strict=True)
                   if not os.path.isfile(path.parent / name)],
            f"images are not in {path.parent}", "paths start from the CSV's folder, with / between folders")
    return names


def _refuse_repeated(path: Path, lines: Sequence[int], names: Sequence[str], boxes: Sequence[Box | None]) -> None:
    """A UserError if two lines of CSV `path` are of one file, under whatever names, and of one box."""
    same, realpath = defaultdict(list), cached_realpath()
    for line, name, box in zip(lines, names, boxes, strict=True):
        same[realpath(path.parent / name), box].append(line)
    root = os.path.realpath(path.parent)
    _refuse(path, [f"{os.path.relpath(file, root)}{_told(box)} (lines {', '.join(map(str, listed))})"
                   for (file, box), listed in same.items() if len(listed) > 1],
            "images are listed more than once", "remove the lines too many")


def _list_folder(root: Path) -> tuple[list[_Row], list[str], list[str]]:
    """The images in a folder, or in those for splits therein; files that do not belong there; no notes."""
    folders = {name: split for split, names in FOLDERS.items() for name in names if (root / name).is_dir()}
    for names in FOLDERS.values():
        if len(both := [name for name in names if name in folders]) > 1:
            raise UserError(f"{root} has both {' and '.join(both)}; remove or rename one")
    images, unexpected = parse_names(root, list(folders) or ["."], NAME, SUFFIXES, _EXAMPLE,
                                     "remove or rename them, or list the images in a CSV")
    _refuse(root, [ascii(path.name) for matches in images.values() for path, _ in matches if not is_unicode(path.name)],
            "names are not valid UTF-8", "rename them")
    if folders:
        unexpected += [path.name for path in sorted(root.iterdir()) if path.name not in folders]
    rows = [_Row(path, name := path.relative_to(root).as_posix(), identity_of(match), str(int(match["camera"])),
                 folders.get(folder, ""), name)
            for folder, matches in images.items() for path, match in matches]
    if not rows:
        raise UserError(f"{root} has no images named like {_EXAMPLE}, neither in itself nor in folders "
                        f"{', '.join(SPLITS)}; rename them, or list them in a CSV")
    return rows, unexpected, []


def identity_of(match: re.Match) -> str:
    """The identity in a name that is like NAME: a number as text, or a word of NOBODY."""
    words = {str(number): word for word, number in NOBODY.items()}
    number = str(int(match["identity"]))
    return words.get(number, number)


def is_unicode(text: str) -> bool:
    """Whether a file name is valid UTF-8, which Linux does not ask for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def whole_number(name: str) -> int | None:
    """The number that a name is; also as pandas writes it where cells of the column are missing, 12.0."""
    match = re.fullmatch(r"(-?[0-9]{1,18})(\.0+)?", name)
    return int(match[1]) if match else None


def notes_on_identities(names: Iterable[str]) -> list[str]:
    """Of those that look like nobody, and are not among NOBODY."""
    return [f"identity {name} is taken for a person; where it is nobody, write distractor"
            for name in sorted(set(names)) if whole_number(name) == DISTRACTOR or name in _MISSING]


def in_order(names: set[str], source: Path, what: str) -> list[str]:
    """Sorted, in the order of numbers if all are; a UserError if a name or a number is written in two ways."""
    same = defaultdict(list)  # an é may be one character, or an e and an accent
    for name in sorted(names):
        same[unicodedata.normalize("NFC", name)].append(name)
    _refuse(source, [" and ".join(map(ascii, written)) for written in same.values() if len(written) > 1],
            f"{what} are written in two ways", "write them in one")
    numbers = {name: whole_number(name) for name in names}
    if None in numbers.values():
        return sorted(names)
    ordered = sorted(names, key=lambda name: (numbers[name], name))
    _refuse(source, [f"{one} and {other}" for one, other in itertools.pairwise(ordered)
                     if numbers[one] == numbers[other]],
            f"{what} are written in two ways", "write them in one")
    return ordered


def _check_splits(splits: Mapping[str, Sequence[_Row]], source: Path) -> None:
    _refuse(source, [row.name for split in ("train", "query") for row in splits[split] if row.identity in NOBODY],
            "images of train or query are distractors or junk", "they can be in the gallery alone")
    people = {split: {row.identity for row in rows} for split, rows in splits.items()}
    _refuse(source, sorted(people["train"] & (people["query"] | people["gallery"])),
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
