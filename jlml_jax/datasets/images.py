"""Image files decoded, resized and encoded, with Pillow."""

import contextlib
import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jlml_jax.errors import UserError

# Of what is damaged but decodes, and of an image that is up to twice too large, which `open_rgb` refuses.
warnings.filterwarnings("ignore", module=r"PIL\.")

# What transparent pixels show: mid-grey is about the mean that is subtracted from the network's input.
_BACKGROUND = (128, 128, 128)


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
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise UserError(f"{name} has {image.width} x {image.height} pixels, which is no crop of a person; "
                                "replace the file")
            if image.mode.startswith(("I", "F")):  # Pillow would clip them to 8 bits, not scale
                raise UserError(f"{name} has more than 8 bits a channel; convert it to 8 bits")
            image.load()
            if upright:
                with contextlib.suppress(Exception):  # damaged Exif data, as if there were none
                    ImageOps.exif_transpose(image, in_place=True)
                if image.has_transparency_data:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), image.convert("RGBA"))
            return image.convert("RGB")
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image of a known format; replace the file") from error
    except Exception as error:  # Pillow's plug-ins let through whatever a damaged file makes them stumble over
        raise UserError(f"{name} does not decode as an image ({error}); replace the file") from error


def decode_image(encoded: bytes, name: str, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Decodes one image file to uint8 [height, width, 3]; its own size if none is given. Errors say `name`."""
    image = open_rgb(encoded, name)
    if height is not None and width is not None:
        image = resize(image, height, width)
    return np.asarray(image)


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """The image at the network's input size, by an antialiased triangle filter."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [height, width, 3] without loss."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    return encoded.getvalue()
