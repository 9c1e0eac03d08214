"""Made-up images, as a data set has them."""

import io

import numpy as np
from PIL import Image

NUM_IMAGES = 2_048
_QUALITY, _TEXTURE = 90, 4  # of JPEG; standard deviation of the texture, in levels


def crops(number: int = NUM_IMAGES) -> list[bytes]:
    """JPEG crops of 128x64: blurred colours under a fine texture."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(number):
        colours = Image.fromarray(rng.integers(0, 256, (8, 4, 3), np.uint8)).resize((64, 128), Image.Resampling.BICUBIC)
        textured = np.asarray(colours) + rng.normal(0, _TEXTURE, (128, 64, 1))
        file = io.BytesIO()
        Image.fromarray(textured.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
        encoded.append(file.getvalue())
    return encoded
