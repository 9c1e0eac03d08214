"""The default data set: people drawn from a seed, seen by six cameras. Nothing to download."""

import io
from collections.abc import Iterable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from jlml_jax.datasets import synthetic_drawing
from jlml_jax.datasets.base import PersonDatasetBuilder

SEED = 0
TRAIN_IDENTITIES = range(1, 201)
TEST_IDENTITIES = range(201, 321)  # unseen in training
TRAIN_IMAGES_PER_CAMERA = 2
QUERY_CAMERAS_PER_IDENTITY = 2


class SyntheticPedestrians(PersonDatasetBuilder):
    """Splits train (200 identities, 2,400 images), query (240) and gallery (720), 120 unseen identities."""

    VERSION = tfds.core.Version("1.0.0")
    DRAWN = True  # built on first use, from no source
    DESCRIPTION = "Pedestrians drawn from a seed, 6 cameras: for trying out person re-identification without data."

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterable]:
        # The image index tells apart the images of one identity and camera; gallery 0, query 1.
        cameras = range(1, synthetic_drawing.NUM_CAMERAS + 1)
        train = ((identity, camera, index) for identity in TRAIN_IDENTITIES for camera in cameras
                 for index in range(TRAIN_IMAGES_PER_CAMERA))
        gallery = ((identity, camera, 0) for identity in TEST_IDENTITIES for camera in cameras)
        # Every identity is asked for by two cameras, three apart, and all cameras equally often.
        query = ((identity, cameras[(identity + 3 * k) % len(cameras)], 1) for identity in TEST_IDENTITIES
                 for k in range(QUERY_CAMERAS_PER_IDENTITY))
        return {"train": self._generate_examples(train), "query": self._generate_examples(query),
                "gallery": self._generate_examples(gallery)}

    def _generate_examples(self, images: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (identity, camera, index) in enumerate(images):
            file = io.BytesIO()
            pixels = synthetic_drawing.draw_image(SEED, identity, camera, index)
            Image.fromarray(pixels).save(file, "PNG", compress_level=1)
            file.seek(0)
            yield key, {"image": file, "identity": identity, "camera": camera,
                        "name": f"{identity:04d}_c{camera}_{index}.png"}
