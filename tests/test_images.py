"""Decoding and resizing."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from splits import drawing, encode, split_of

from jlml_jax.datasets.images import clip_box, decode_image, open_rgb, upright_size
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


def test_common_formats_are_tried_first_also_once_all_are_known():
    code = "import jlml_jax.datasets.images; from PIL import Image; Image.init(); print(*Image.ID)"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"JPEG", "PNG"} <= set(tried[:8]) and len(tried) > 20


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, *range(10)])
def test_the_size_of_an_upright_image_is_that_of_its_pixels(kind, orientation):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = encode(drawing(20, 30), kind, exif=exif)
    size = open_rgb(file, "x", upright=True).size
    assert size == ((20, 30) if orientation in range(5, 9) else (30, 20))
    assert upright_size(io.BytesIO(file)) == size


def test_damaged_files_have_no_size():
    for file in (b"", b"hello", encode(drawing(40, 20))[:20]):
        assert upright_size(io.BytesIO(file)) is None
    file = encode(drawing(40, 20), "JPEG", exif=b"Exif\0\0nonsense and more of it")
    assert upright_size(io.BytesIO(file)) == open_rgb(file, "x", upright=True).size == (20, 40)


@pytest.mark.parametrize("box, expected", [
    ((0, 0, 30, 20), (0, 0, 30, 20)), ((5, 6, 7, 8), (5, 6, 7, 8)), ((-5, 6, 7, 8), (0, 6, 2, 8)),
    ((5, -6, 7, 8), (5, 0, 7, 2)), ((25, 6, 7, 8), (25, 6, 5, 8)), ((5, 16, 7, 8), (5, 16, 7, 4)),
    ((-9, -9, 99, 99), (0, 0, 30, 20)), ((30, 0, 5, 5), (30, 0, 5, 5)), ((-5, 0, 5, 5), (-5, 0, 5, 5)),
    ((0, 20, 5, 5), (0, 20, 5, 5)), ((0, -5, 5, 5), (0, -5, 5, 5)),
])
def test_a_box_is_cut_to_its_frame_unless_it_is_outside(box, expected):
    assert clip_box(box, (30, 20)) == expected
    assert clip_box(box, None) == box
