"""What a search has found: as a table on the terminal, a CSV, a picture."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from jlml_jax.datasets.images import save_whole
from jlml_jax.errors import UserError, printable
from jlml_jax.files import check_output, write_output
from jlml_jax.user_images import UserImage, load_one

_CROP, _GAP, _CAPTION = (96, 192), 8, 16  # pixels: width and height of a crop, the space around it, its line of text
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MAX_DRAWN = 100  # queries; a JPEG has room for three times as many


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
    """What to search for."""

    images: list[UserImage]  # one; or several of one person
    digests: list[bytes]  # theirs, as `LoadedImage` has them
    feature: np.ndarray  # float32 [D], of the one or the mean of theirs

    def __str__(self) -> str:
        others = len(self.images) - 1
        return str(self.images[0]) + (f" and {others:,} others" if others else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """The images nearest to a query, nearest first."""

    query: Query
    images: list[UserImage]
    distances: np.ndarray  # float64 [k]
    verdicts: list[str]  # k; each empty, where there are none


def show(found: Found, with_verdicts: bool, headed: bool) -> None:
    """Prints a table; `headed`: below the query's name."""
    if headed:
        print(f"\nquery {found.query}")
    width = max(map(len, found.verdicts), default=0)
    print(f"{'rank':>4} {'distance':>10}  " + (f"{'verdict':<{width}}  " if with_verdicts else "")
          + f"{'identity':<10} {'camera':<8} file")
    for rank, (image, distance, verdict) in enumerate(
            zip(found.images, found.distances, found.verdicts, strict=True), 1):
        print(f"{rank:>4} {distance:>10.4f}  " + (f"{verdict:<{width}}  " if with_verdicts else "")
              + f"{printable(image.identity) or '-':<10} {printable(image.camera) or '-':<8} {printable(image.file)}"
              + (f" box {','.join(map(str, image.box))}" if image.box else ""))


def write(path: Path, found: Sequence[Found]) -> None:
    """A CSV with a line for each image that was found, by query and rank; of images of one person, the first's name."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    box = ("x", "y", "width", "height")
    table.writerow(["query", "query_images", *(f"query_{name}" for name in box), "rank", "distance", "verdict", "image",
                    "identity", "camera", *box])
    for one in found:
        query = one.query.images[0]
        cells = [query.file, len(one.query.images), *(query.box or [""] * 4)]
        for rank, (image, distance, verdict) in enumerate(zip(one.images, one.distances, one.verdicts, strict=True), 1):
            table.writerow([*cells, rank, f"{distance:.6f}", verdict, image.file, image.identity, image.camera,
                            *(image.box or [""] * 4)])
    write_output(path, text.getvalue())
    print(f"{path}: {sum(len(one.images) for one in found):,} images found, for {len(found):,} queries")


def check_picture(path: Path) -> None:
    """A UserError if a picture cannot be written to `path`: told before the search, not after."""
    check_output(path, "--picture")
    if Image.registered_extensions().get(path.suffix.lower()) not in _FORMATS:
        raise UserError(f"--picture={path} has no suffix of a format of pictures; give one such as found.png")


def draw(path: Path, found: Sequence[Found]) -> None:
    """A row for each query: the query and what was found, side by side, with the distances."""
    width, height = _CROP[0] + _GAP, _CROP[1] + 2 * _GAP + _CAPTION
    columns = 1 + max(len(one.images) for one in found)
    sheet = Image.new("RGB", (_GAP + width * columns + 2 * _GAP, height * len(found)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, one in enumerate(found):
        captions = ["query", *(f"{distance:.4f}" for distance in one.distances)]
        for column, (image, caption) in enumerate(zip([one.query.images[0], *one.images], captions, strict=True)):
            left = _GAP + column * width + (2 * _GAP if column else 0)  # a wider space after the query
            top = _GAP + row * height
            try:
                sheet.paste(Image.fromarray(load_one(image, _CROP[1], _CROP[0])), (left, top))
            except UserError:  # moved or removed since it was embedded
                draw.rectangle((left, top, left + _CROP[0] - 1, top + _CROP[1] - 1), outline="grey")
                draw.text((left + _GAP, top + _CROP[1] // 2), "file is gone", fill="grey")
            draw.text((left, top + _GAP + _CROP[1]), caption, fill="black")
    try:
        save_whole(sheet, path)
    except (OSError, ValueError) as error:  # such as a JPEG, which may be 65,500 pixels wide
        raise UserError(f"cannot write --picture={path} ({error}); what was there is as it was: make room, or give "
                        "another, such as found.png") from error
    print(f"picture in {path}")
