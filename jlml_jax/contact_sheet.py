"""Rows of users' images, side by side, with a line of text below each."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from jlml_jax.datasets.images import save_whole
from jlml_jax.errors import UserError
from jlml_jax.files import check_output
from jlml_jax.user_images import UserImage, load_images

_CROP, _GAP, _CAPTION = (96, 192), 8, 16  # pixels: width and height of a crop, the space around it, its line of text
_CHARACTER = 6  # pixels of width
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
MOST_ROWS = 100  # a JPEG has room for three times as many


def check(path: Path) -> None:
    """A UserError if a picture cannot be written to `path`: told before the work, not after."""
    check_output(path, "--picture")
    if not is_picture(path):
        raise UserError(f"--picture={path} has no suffix of a format of pictures; give one such as found.png")


def is_picture(path: Path) -> bool:
    """Whether `path` ends as the name of a picture does."""
    return Image.registered_extensions().get(path.suffix.lower()) in _FORMATS


def draw(path: Path, rows: Sequence[Sequence[tuple[UserImage, str]]]) -> None:
    """Draws rows of images, each with its text; a wider space follows the first image of each row.

    Raises:
        UserError: the picture cannot be written.
    """
    width, height = _CROP[0] + _GAP, _CROP[1] + 2 * _GAP + _CAPTION
    sheet = Image.new("RGB", (_GAP + width * max(map(len, rows)) + 2 * _GAP, height * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    images, corners = [], []
    for row, cells in enumerate(rows):
        for column, (image, caption) in enumerate(cells):
            left = _GAP + column * width + (2 * _GAP if column else 0)
            top = _GAP + row * height
            images.append(image)
            corners.append((left, top))
            pen.text((left, top + _GAP + _CROP[1]), caption[:_CROP[0] // _CHARACTER], fill="black")
    for loaded in load_images(images, _CROP[1], _CROP[0]):
        left, top = corners[loaded.place]
        if loaded.error is None:
            sheet.paste(Image.fromarray(loaded.pixels), (left, top))
        else:  # moved or removed since it was embedded
            pen.rectangle((left, top, left + _CROP[0] - 1, top + _CROP[1] - 1), outline="grey")
            pen.text((left + _GAP, top + _CROP[1] // 2), "file is gone", fill="grey")
    try:
        save_whole(sheet, path)
    except (OSError, ValueError) as error:  # such as a JPEG, which may be 65,500 pixels wide
        raise UserError(f"cannot write --picture={path} ({error}); what was there is as it was: make room, or give "
                        "another, such as found.png") from error
    print(f"picture in {path}")
