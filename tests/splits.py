"""Splits of drawn images, encoded as a data set's files are."""

import dataclasses
import io

import numpy as np
from PIL import Image

from jlml_jax.datasets.split import Split, StoredImages

SIZES = [(64, 32), (128, 64), (71, 37), (40, 20), (150, 33), (64, 64)]  # height, width
BATCHES = [np.array([4, 0, 5]), np.array([1, 1, 2]), np.array([3, 5, 4])]  # of a split of that many images


def encode(pixels, kind="PNG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def drawing(height, width, seed=0):
    """Smooth, with noise: as a photograph is, and unlike its mirror image."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 3, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)


def plain(*colors):
    """Pixels of images of one colour each."""
    return np.broadcast_to(np.array(colors, np.uint8)[:, None, None], (len(colors), 32, 16, 3))


def split_of(images, identities=None, cameras=None):
    """Of encoded images; of a person each, by one camera, unless it is given otherwise."""
    count = len(images)
    return Split("test", images, np.array(range(1, count + 1) if identities is None else identities, np.int64),
                 np.array([1] * count if cameras is None else cameras, np.int64),
                 np.array([f"{i:03d}.png" for i in range(count)]))


def split_of_pixels(pixels, identities, cameras):
    return split_of([encode(crop) for crop in pixels], identities, cameras)


class Examples(list):
    """As TFDS's data sources: reads many at once, too."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]


def on_disk(split):
    images = StoredImages(Examples({"image": image} for image in split.images), np.zeros((len(split), 32), np.uint8))
    return dataclasses.replace(split, images=images)
