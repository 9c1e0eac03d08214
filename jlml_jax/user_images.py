"""A user's own images: listed from a folder, a CSV or a glob, then read, cropped, resized and hashed in threads."""

import argparse
import collections
import contextlib
import dataclasses
import glob
import hashlib
import io
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from jlml_jax.datasets.images import Box, clip_box, crop_box, open_rgb, resize, shows_somebody, upright_size
from jlml_jax.datasets.listing import (
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
    whole_number,
)
from jlml_jax.datasets.split import JUNK
from jlml_jax.errors import UserError, first_few, printable
from jlml_jax.files import user_path

_LOOK_ON = 255  # images after a bad one that are looked at, though not used, to name more bad ones at once
_MAX_SEEN = 1024  # known images handed on at a time
_AHEAD = 512  # images read before they are asked for: some frames for each of many threads, and bounded memory
_OF_FRAME = 256  # boxes that are cropped from a frame each time that it is decoded: all of them, but for the odd crowd


class NothingRead(UserError):
    """All images are bad."""


@dataclasses.dataclass(frozen=True)
class UserImage:
    """One image, or one box of a full frame, not yet read."""

    path: Path
    file: str  # its name for the user: within the folder, as in the CSV, as the glob gave it
    identity: str = ""  # any text; distractor and junk are nobody; empty: not known
    camera: str = ""
    box: Box | None = None  # None: all of the image
    row: int | None = None  # line of the CSV
    clip: bool = False  # cut the box to the frame, if it crosses the edge
    track: str = ""  # a tracker's name for whom it followed, through one camera; empty: of none

    def __str__(self) -> str:
        """For messages."""
        return printable(self.file) + (f" (line {self.row})" if self.row is not None else "")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images that `list_images` found, in order."""

    images: list[UserImage]
    root: Path  # what `file` is relative to
    notes: tuple[str, ...] = ()  # lines to tell the user


@dataclasses.dataclass(frozen=True)
class LoadedImage:
    """What became of an image: `pixels`, uint8 [height, width, 3]; or neither, if it was known; or an `error`."""

    image: UserImage  # of a box that was cut to the frame, with what is left of it
    digest: bytes = b""  # SHA-256 of the file's bytes and the box that is cropped
    pixels: np.ndarray | None = None
    error: str | None = None
    clipped: bool = False
    place: int = 0  # in the list that was given


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """The options of all commands that list and read images."""
    parser.add_argument("--keep_going", action="store_true",
                        help="list bad images at the end and leave them out, instead of stopping")
    parser.add_argument("--clip_boxes", action="store_true",
                        help="cut boxes that cross the edge of their frame to it, instead of refusing them")


def list_images(source: str, *, clip_boxes: bool = False) -> Listing:
    """Lists images: a folder's, searched to the bottom and sorted by path; a CSV's; a glob's, sorted; or one file.

    In a folder, linked folders are searched too; files that by their suffix are no images are left out, and so is what
    is hidden. A CSV has the columns image[,identity][,camera][,track][,x,y,width,height]; its paths are relative to its
    folder and must stay in it, also where symbolic links lead. Where all names of a folder or glob are like
    Market-1501's (0002_c1s1_000451_03.jpg), identity and camera are read from them. As in the data sets `folder/NAME`,
    distractor and junk in the place of an identity are nobody. Boxes that cross the edge of their frame are refused
    when they are read; with `clip_boxes`, they are cut to it.

    Raises:
        UserError: there are none, or the CSV has rows that cannot be right.
    """
    path = user_path(source)
    try:
        if path.is_dir():
            listing = _list_folder(path)
        elif path.suffix.lower() == ".csv" and path.is_file():
            listing = _read_csv(path, clip_boxes)
        elif path.is_file():
            listing = _with_market_names([UserImage(path, source)], Path())
        elif glob.has_magic(source):
            names = [name for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]
            listing = _with_market_names([UserImage(Path(name), name) for name in names], Path())
        else:
            raise UserError(f"{source} does not exist; give an image, a folder, a CSV or a glob in quotes")
    except OSError as error:
        raise UserError(f"cannot read {source} ({error}); give readable images") from error
    if not listing.images:
        raise UserError(f"{source} has no images; give a folder, a CSV or a glob that has")
    broken = [ascii(image.file) for image in listing.images if not is_unicode(str(image.path.absolute()))]
    if broken:
        raise UserError(f"{len(broken)} images in {printable(source)} have names, or folders, that are not valid "
                        f"UTF-8: {first_few(broken)}; rename them")
    return listing


def _list_folder(root: Path) -> Listing:
    Image.init()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    images, others = [], []
    for path in _files_below(root):
        (images if path.suffix.lower() in suffixes else others).append(path)
    named = [UserImage(path, path.relative_to(root).as_posix()) for path in sorted(images)]
    listing = _with_market_names(named, root)
    if not others:
        return listing
    left_out = first_few([printable(path.relative_to(root).as_posix()) for path in sorted(others)])
    return dataclasses.replace(listing, notes=(
        f"{len(others)} files are no images by their names and are left out: {left_out}", *listing.notes))


def _files_below(root: Path) -> Iterator[Path]:
    """All files that are not hidden, each folder's once: those of linked folders that nothing else leads to, too."""
    def fail(error: OSError) -> None:  # os.walk would pass over a folder that it cannot read
        raise error

    seen, linked = set(), collections.deque([root])
    while linked:
        for folder, subfolders, names in os.walk(linked.popleft(), onerror=fail):
            if (real := os.path.realpath(folder)) in seen:
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            linked += [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                # No pipe or device, to be waited for; a broken link is told when it is read.
                if os.path.isfile(path) or not os.path.exists(path):
                    yield path


def _with_market_names(images: list[UserImage], root: Path) -> Listing:
    """Adds identity and camera if every name has them."""
    matches = [NAME.fullmatch(image.path.name) for image in images]
    if not images or not all(matches):
        return Listing(images, root)
    images = [dataclasses.replace(image, identity=identity_of(match), camera=str(int(match["camera"])))
              for image, match in zip(images, matches, strict=True)]
    return Listing(images, root, ("identity and camera are read from the names, which are like Market-1501's",))


def _read_csv(path: Path, clip_boxes: bool) -> Listing:
    lines, notes = read_table(path, ("image",), ("identity", "camera", "track"))
    path_within, images, bad = make_path_within(os.path.realpath(path.parent)), [], []
    for number, cells in lines:
        try:
            images.append(dataclasses.replace(_csv_image(cells, number, path.parent, path_within), clip=clip_boxes))
        except ValueError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        raise UserError(f"{path} has {len(bad)} bad lines: {first_few(bad, '; ')}; mend or remove them")
    identities = {image.identity for image in images}
    in_order(identities - {"", *NOBODY}, path, "identities")
    in_order({image.camera for image in images} - {""}, path, "cameras")
    try:
        track_numbers(images)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return Listing(images, path.parent, (*notes, *notes_on_identities(identities)))


def _csv_image(cells: dict[str, str], line: int, folder: Path, path_within: Callable[[str], str]) -> UserImage:
    """One line of a CSV in `folder`, of which `path_within` is; a ValueError says what is wrong with it."""
    file = cells["image"]
    shown = printable(file)
    if not file:
        raise ValueError("it names no image")
    try:
        name = path_within(file)
    except ValueError as error:
        raise ValueError(f"{shown} {error}") from error
    if whole_number(cells.get("identity", "")) == JUNK:
        raise ValueError(JUNK_ADVICE)
    return UserImage(folder / name, name, cells.get("identity", ""), cells.get("camera", ""), box_of(cells), line,
                     track=cells.get("track", ""))


def track_numbers(images: Sequence[UserImage]) -> np.ndarray:
    """The track of each image, int64 [N], numbered from 0 by their first images; an image of no track is one by itself.

    Tracks of two cameras are different ones, whatever their names.

    Raises:
        UserError: a track has images of two identities, or two boxes of one frame.
    """
    numbers, first, of_frame = {}, {}, {}
    tracks = np.empty(len(images), np.int64)
    for row, image in enumerate(images):
        key = (image.camera, image.track) if image.track else row
        tracks[row] = numbers.setdefault(key, len(numbers))
        if image.track:
            before, beside = first.setdefault(key, image), of_frame.setdefault((key, image.path), image)
            if image.identity != before.identity:
                names = [printable(one.identity) or "none" for one in (before, image)]
                raise _no_track(before, image, f"have two identities, {' and '.join(names)}")
            if image.box != beside.box:
                raise _no_track(beside, image, "are two boxes of one frame")
    return tracks


def _no_track(one: UserImage, other: UserImage, why: str) -> UserError:
    of_camera = f" of camera {printable(one.camera)}" if one.camera else ""
    return UserError(f"track {printable(one.track)}{of_camera} is not of one person: {one} and {other} {why}; mend "
                     "them, and name each track of a camera differently")


def load_images(images: Sequence[UserImage], height: int, width: int, known: Collection[bytes] = frozenset()
                ) -> Iterator[LoadedImage]:
    """Reads images in threads and ahead of the caller: file by file, in the order in which the files are listed first.

    So that a frame is decoded once, all its boxes come together, wherever they are in the list. What has a digest in
    `known` is hashed, but not decoded.
    """
    of_file = collections.defaultdict(list)
    for place, image in enumerate(images):
        of_file[image.path].append(place)
    frames = (places[start:start + _OF_FRAME] for places in of_file.values()
              for start in range(0, len(places), _OF_FRAME))
    pool = ThreadPoolExecutor()  # Pillow and hashlib release the GIL
    pending, ahead = collections.deque(), 0
    try:
        for places in frames:
            pending.append(pool.submit(_load_frame, {place: images[place] for place in places}, height, width, known))
            ahead += len(places)
            while ahead > _AHEAD:
                loaded = pending.popleft().result()
                ahead -= len(loaded)
                yield from loaded
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_batches(images: Sequence[UserImage], height: int, width: int, batch_size: int, what: str, *,
                 keep_going: bool, known: Collection[bytes] = frozenset()
                 ) -> Iterator[tuple[list[LoadedImage], list[LoadedImage]]]:
    """Reads images as `load_images`, `batch_size` at a time, with progress, called `what`, and the time left on a
    terminal.

    Yields the images that were read, and those that were not because their digest is in `known`. Only the last batch
    of the former is smaller, but where many are known some have none. With `keep_going`, bad images are left out and
    told on stderr at the end.

    Raises:
        UserError: images are bad, and it is not to keep going.
        NothingRead: there are no others.
    """
    errors, read, seen, good, last = [], [], [], 0, len(images)
    progress = tqdm(load_images(images, height, width, known), what, len(images), unit=" images", leave=False,
                    disable=None)
    with contextlib.closing(progress):
        for position, loaded in enumerate(progress, 1):
            if loaded.error:
                last = last if errors else position + _LOOK_ON
                errors.append((loaded.place, loaded.error))
            if errors and not keep_going:
                if position == last:
                    break
                continue
            if not loaded.error:
                good += 1
                (read if loaded.pixels is not None else seen).append(loaded)
            if len(read) == batch_size:
                yield read, seen
                read, seen = [], []
            elif len(seen) == _MAX_SEEN:
                yield [], seen
                seen = []
    errors = [error for _, error in sorted(errors)]
    if errors and not keep_going:
        raise UserError(f"{len(errors)} of the first {position:,} images (of {len(images):,}) are bad: "
                        f"{first_few(errors, '; ')}; mend or remove them, or skip them with --keep_going")
    if read or seen:
        yield read, seen
    for error in errors:
        print("skipped:", printable(error), file=sys.stderr)
    if errors:
        print(f"{len(errors)} of {len(images):,} images were skipped", file=sys.stderr)
    if not good:
        raise NothingRead(f"no image can be read: {first_few(errors, '; ')}; give others")


def _load_frame(images: Mapping[int, UserImage], height: int, width: int, known: Collection[bytes]
                ) -> list[LoadedImage]:
    """Loads images of one file, by their places in the list."""
    first = next(iter(images.values()))
    try:
        encoded = first.path.read_bytes()
    except OSError as error:
        # A file of a CSV, or in a folder, is not named from where the command runs.
        path = str(first.path)
        where = f": {printable(path)}" if path != first.file else ""
        return [LoadedImage(image, error=f"{image} cannot be read ({error.strerror}{where})", place=place)
                for place, image in images.items()]
    digest = hashlib.sha256(encoded)
    clip = any(image.clip and image.box for image in images.values())
    size = upright_size(io.BytesIO(encoded)) if clip else None
    frame, loaded = None, []
    for place, image in images.items():
        listed = image.box
        if image.clip and listed is not None:
            image = dataclasses.replace(image, box=clip_box(listed, size))
        clipped = image.box != listed
        # By what is cropped: a box that is listed cut already is the same picture, and none is what was not cut.
        own = digest.copy()
        if image.box is not None:
            own.update("\0{},{},{},{}".format(*image.box).encode())
        if own.digest() in known:
            loaded.append(LoadedImage(image, own.digest(), clipped=clipped, place=place))
            continue
        try:
            if frame is None:
                frame = open_rgb(encoded, str(image), upright=True)
            pixels = np.asarray(resize(_crop(frame, image), height, width))
            loaded.append(LoadedImage(image, own.digest(), pixels, clipped=clipped, place=place))
        except UserError as error:
            loaded.append(LoadedImage(image, error=str(error), place=place))
    return loaded


def _crop(frame: Image.Image, image: UserImage) -> Image.Image:
    return shows_somebody(frame, str(image)) if image.box is None else crop_box(frame, image.box, str(image))


def tell_clipped(number: int) -> None:
    """Says, if there are any, how many boxes were cut to their frames."""
    if number:
        print(clipped_note(number))


def load_one(image: UserImage, height: int, width: int) -> np.ndarray:
    """The pixels of one image, uint8 [height, width, 3]; a UserError if it is bad."""
    loaded, = load_images([image], height, width)
    if loaded.error:
        raise UserError(loaded.error)
    return loaded.pixels


def load_query(file: str, height: int, width: int) -> tuple[UserImage, np.ndarray]:
    """The one image `file`, and its pixels, uint8 [height, width, 3]; a UserError if it is not one good image."""
    images = list_images(file).images
    if len(images) > 1 or Path(file).suffix.lower() == ".csv":
        raise UserError(f"{file} is not one image; give the file of one")
    return images[0], load_one(images[0], height, width)
