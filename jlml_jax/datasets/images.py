"""Image files decoded, cropped, resized and encoded, with Pillow."""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from jlml_jax.errors import UserError
from jlml_jax.files import write_atomically

# Of what is damaged but decodes, and of an image that is up to twice too large, which `open_rgb` refuses.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow tries formats in the order in which it came to know them. What lists a folder makes it know all: a JPEG would
# be taken for two dozen others first, for half as long as decoding it takes, and while no other thread can run Python.
Image.preinit()

# What transparent pixels show: mid-grey is about the mean that is subtracted from the network's input.
_BACKGROUND = (128, 128, 128)

MIN_SIDE = 4  # pixels; less than that shows nobody

Box = tuple[int, int, int, int]  # x, y, width, height in pixels of the upright frame


def open_rgb(encoded: bytes, name: str, *, upright: bool = False) -> Image.Image:
    """Decodes one image file as RGB, 8 bits a channel. Errors say `name`.

    Args:
        encoded: the file.
        name: for messages.
        upright: show it as a viewer would: turned as its Exif data say, what is transparent laid over mid-grey. False
            is for the images of data sets, which are kept so, and which TensorFlow must read alike.

    Raises:
        UserError: it does not decode, is greyscale of more than 8 bits, or is too large to be what it should be.
    """
    with _decoding(name), Image.open(io.BytesIO(encoded)) as image:
        return _as_rgb(image, name, upright)


def upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """An open image of Pillow's as `open_rgb` gives it, upright; raises as that does."""
    with _decoding(name):
        return _as_rgb(image, name, upright=True)


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image of a known format; replace the file") from error
    except Exception as error:  # Pillow's plug-ins let through whatever a damaged file makes them stumble over
        raise UserError(f"{name} does not decode as an image ({error}); replace the file") from error


def _as_rgb(image: Image.Image, name: str, upright: bool) -> Image.Image:
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"{name} has {image.width} x {image.height} pixels, which is no crop of a person; replace the "
                        "file")
    if image.mode.startswith(("I", "F")):  # Pillow would clip them to 8 bits, not scale
        raise UserError(f"{name} has more than 8 bits a channel; convert it to 8 bits")
    image.load()
    if upright:
        with contextlib.suppress(Exception):  # damaged Exif data, as if there were none
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image.convert("RGBA"))
    return image.convert("RGB")


def orientation(image: Image.Image) -> int | None:
    """How an open image is to be turned, by its Exif data: 1 is upright, None is not said."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except (KeyError, TypeError, ValueError, SyntaxError, struct.error):  # damaged Exif data, as if there were none
        return None


def upright_size(file: Path | BinaryIO) -> tuple[int, int] | None:
    """Width and height that `open_rgb` gives an image file if upright, mostly without decoding it; None: it is none."""
    try:
        with Image.open(file) as image:
            turned = image.format != "TIFF" and orientation(image) in range(5, 9)  # Pillow's TIFF reader has turned it
            return image.size[::-1] if turned else image.size
    except Exception:  # Pillow's plug-ins let through whatever a damaged file makes them stumble over
        return None  # for open_rgb to say what is wrong with it


def clip_box(box: Box, size: tuple[int, int] | None) -> Box:
    """The part of a box that is within a frame of `size`, its width and height; the box itself if there is none."""
    x, y, width, height = box
    right, bottom = map(min, size or (0, 0), (x + width, y + height))
    left, top = max(x, 0), max(y, 0)
    return (left, top, right - left, bottom - top) if left < right and top < bottom else box


def crop_box(frame: Image.Image, box: Box, name: str) -> Image.Image:
    """The part of a frame that is within a box. Errors say `name`.

    Raises:
        UserError: the box is not within the frame, or is too small to show anybody.
    """
    x, y, width, height = box
    if x < 0 or y < 0 or x + width > frame.width or y + height > frame.height:
        advice = " (--clip_boxes cuts it to the frame)" if clip_box(box, frame.size) != box else ""
        raise UserError(f"{name}: the box {x}, {y}, {width}, {height} is not within the frame of {frame.width} x "
                        f"{frame.height} pixels{advice}")
    return shows_somebody(frame.crop((x, y, x + width, y + height)), name)


def shows_somebody(image: Image.Image, name: str) -> Image.Image:
    """The image; a UserError, which says `name`, if it is too small to show anybody."""
    if min(image.size) < MIN_SIDE:
        raise UserError(f"{name} has {image.width} x {image.height} pixels, which shows nobody")
    return image


def decode_image(encoded: bytes, name: str, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Decodes one image file to uint8 [height, width, 3]; its own size if none is given. Errors say `name`."""
    image = open_rgb(encoded, name)
    if height is not None and width is not None:
        image = resize(image, height, width)
    return np.asarray(image)


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image at the network's input size, by an antialiased triangle filter."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def save_whole(image: Image.Image, path: Path) -> None:
    """Writes the file whole or not at all, in the format that its suffix names.

    Raises:
        KeyError: there is no such format.
        OSError, ValueError: it has no room for the image, or the file cannot be written.
    """
    encoded = io.BytesIO()
    image.save(encoded, Image.registered_extensions()[path.suffix.lower()])
    write_atomically(path, encoded.getvalue())


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [height, width, 3] without loss."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()
