"""Decoding and resizing."""

import io

import numpy as np
import pytest
from PIL import Image
from splits import drawing, encode, split_of

from jlml_jax.datasets.images import decode_image
from jlml_jax.errors import UserError


def test_every_mode_decodes_to_rgb():
    pixels = drawing(40, 20)
    np.testing.assert_array_equal(decode_image(encode(pixels), "x"), pixels)
    np.testing.assert_array_equal(decode_image(encode(pixels, mode="RGBA"), "x"), pixels)
    grey = decode_image(encode(pixels, mode="L"), "x")
    np.testing.assert_array_equal(grey, np.repeat(np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, 2))
    for other in (encode(pixels, mode="P"), encode(pixels, "JPEG", "CMYK", quality=95)):
        decoded = decode_image(other, "x")
        assert decoded.shape == (40, 20, 3) and decoded.dtype == np.uint8
        assert np.abs(decoded.astype(int) - pixels).mean() < 20


def test_resizing_is_antialiased():
    """Plain bilinear interpolation would take two of eight columns and make grey into stripes or one colour."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = decode_image(encode(stripes), "x", 8, 8)
    assert small.shape == (8, 8, 3)
    assert np.abs(small[:, 1:-1].astype(int) - 127).max() <= 12
    assert decode_image(encode(stripes), "x", 16, 8).shape == (16, 8, 3)


@pytest.mark.parametrize("broken, message", [
    (b"", "not an image"), (b"hello", "not an image"), (encode(drawing(40, 20))[:300], "does not decode"),
    (encode(drawing(40, 20), "JPEG")[:300], "does not decode"),
])
def test_what_is_no_image_is_refused_by_name(broken, message):
    with pytest.raises(UserError, match=f"seen.png.*{message}"):
        decode_image(broken, "seen.png")
    split = split_of([encode(drawing(40, 20)), broken])
    with pytest.raises(UserError, match="test: 001.png"):
        split.decode(16, 8)


def test_sixteen_bits_a_channel_are_refused():
    file = io.BytesIO()
    Image.fromarray(np.full((8, 4), 4000, np.uint16)).save(file, "PNG")
    with pytest.raises(UserError, match="deep.png has more than 8 bits a channel"):
        decode_image(file.getvalue(), "deep.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [700, 300])  # the image has 800 pixels; Pillow warns above the limit, fails at twice
def test_a_huge_image_is_refused_before_it_is_decoded(limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UserError, match="huge.png"):
        decode_image(encode(drawing(40, 20)), "huge.png")
