"""What every person data set has in common: its features on disk, and a split of it in memory."""

import dataclasses
import hashlib
import io
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jlml_jax.errors import UserError

JUNK = -1
DISTRACTOR = 0


class PersonDatasetBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the builders: an example is an encoded crop with its identity, camera and file name.

    Identities are 1 and up, 0 is a distractor, -1 is junk (never a person, never counted). Examples keep the order in
    which they are generated, which nothing may rely on: `name` is what identifies an image.
    """

    DESCRIPTION: str
    HOMEPAGE: str | None = None
    CITATION: str | None = None

    def __init__(self, **kwargs):
        # array_record is read by index and without TensorFlow; TFDS's default, TFRecord, is neither.
        super().__init__(file_format=kwargs.pop("file_format", "array_record"), **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            features=tfds.features.FeaturesDict({
                "image": tfds.features.Image(shape=(None, None, 3)),
                "identity": np.int64,
                "camera": np.int64,
                "name": tfds.features.Text(),
            }),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one data set in memory, still encoded, with their annotation; sorted by name."""

    dataset: str
    images: Sequence[bytes]  # N encoded files
    identities: np.ndarray  # int64 [N]
    cameras: np.ndarray  # int64 [N]
    names: np.ndarray  # str [N]

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: np.ndarray) -> "Split":
        """The images at `indices` (int [M]), in that order."""
        return Split(self.dataset, [self.images[i] for i in indices], self.identities[indices],
                     self.cameras[indices], self.names[indices])

    def fingerprint(self) -> str:
        """SHA-256 over names, annotation and encoded images: equal exactly when the split is."""
        digest = hashlib.sha256()
        for name, identity, camera, image in zip(self.names, self.identities, self.cameras, self.images, strict=True):
            digest.update(f"{name}\0{identity}\0{camera}\0{len(image)}\0".encode())
            digest.update(image)
        return digest.hexdigest()

    def decode(self, height: int, width: int) -> np.ndarray:
        """All images as one uint8 array [N, height, width, 3], resized by an antialiased triangle filter."""
        def decode(index: int) -> np.ndarray:
            return decode_image(self.images[index], f"{self.dataset}: {self.names[index]}", height, width)

        decoded = np.empty((len(self), height, width, 3), np.uint8)
        with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while it decodes and resizes
            for index, image in enumerate(pool.map(decode, range(len(self)))):
                decoded[index] = image
        return decoded


def decode_image(encoded: bytes, name: str, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Decodes one image file to uint8 [height, width, 3]; its own size if none is given. Errors say `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded)) as image:
                image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{name} does not decode as an image ({error}); replace the file") from error
    if height is not None and width is not None and image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image)


def load_split(builder: tfds.core.DatasetBuilder, split: str) -> Split:
    """Reads a prepared split into memory, sorted by name. Needs no TensorFlow."""
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    examples: list[dict[str, Any]] = sorted((source[i] for i in range(len(source))), key=lambda e: e["name"])
    return Split(
        dataset=builder.name,
        images=[example["image"] for example in examples],
        identities=np.array([example["identity"] for example in examples], np.int64),
        cameras=np.array([example["camera"] for example in examples], np.int64),
        names=np.array([example["name"].decode() for example in examples]),
    )
